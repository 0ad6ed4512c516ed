"""`Parameters`: a space as the parameters of an Optuna study, one categorical for each choice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from optuna.distributions import CategoricalDistribution

from superlora.glora.limits import Indices
from superlora.glora.space import Option, Space


class Parameters:
    """The names and distributions of a space's categoricals.

    Parameters
    ----------
    space : Space
        The configurations.

    Attributes
    ----------
    names : list of str
        ``"layer/operation"``, in the order of indices.
    distributions : dict of str to CategoricalDistribution
        In the same order.

    Examples
    --------
    >>> parameters = Parameters(Space({"q": (8, 8)}, ranks=(4,), operations={"add_weight": (4,)}))
    >>> parameters.encoded((0,))
    {'q/add_weight': 4}
    """

    def __init__(self, space: Space) -> None:
        self.names = [f"{layer}/{operation}" for layer, operation in space.categoricals]
        every = {name: CategoricalDistribution(space.operations[name]) for name in space.operations}
        operations = (operation for _, operation in space.categoricals)
        self.distributions = {
            name: every[operation] for name, operation in zip(self.names, operations, strict=True)
        }

    def encoded(self, indices: Iterable[int]) -> dict[str, Option]:
        """Return a configuration as values of the parameters.

        Parameters
        ----------
        indices : iterable of int
            The configuration.

        Returns
        -------
        dict of str to int or str
            One option for each name.
        """
        pairs = zip(self.distributions.items(), indices, strict=True)
        return {name: distribution.choices[index] for (name, distribution), index in pairs}

    def decoded(self, values: Mapping[str, Any]) -> Indices | None:
        """Return the configuration that a trial's parameters are.

        Parameters
        ----------
        values : mapping of str to int or str
            The parameters.

        Returns
        -------
        tuple of int or None
            The configuration; None where a parameter is missing, or an option unknown.
        """
        try:
            return tuple(
                distribution.choices.index(values[name])
                for name, distribution in self.distributions.items()
            )
        except (KeyError, ValueError):
            return None
