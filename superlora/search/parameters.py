"""`Parameters`: a space as the parameters of an Optuna study, one categorical for each choice."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from optuna.distributions import CategoricalDistribution

from superlora.search.limits import Indices
from superlora.search.space import Option, Space


class Parameters:
    """The names and distributions of a space's categoricals.

    Parameters
    ----------
    space : Space
        The configurations.

    Attributes
    ----------
    distributions : dict of str to CategoricalDistribution
        By name, ``"layer/operation"``, in the order of indices.

    Examples
    --------
    >>> parameters = Parameters(Space({"q": (8, 8)}, ranks=(4,), operations={"add_weight": (4,)}))
    >>> parameters.encoded((0,))
    {'q/add_weight': 4}
    """

    def __init__(self, space: Space) -> None:
        # One of each, however many layers have it.
        every = functools.cache(CategoricalDistribution)
        self._options: dict[str, tuple[Option, ...]] = {}
        self.distributions: dict[str, CategoricalDistribution] = {}
        for layer, operation in space.categoricals:
            name = f"{layer}/{operation}"
            self._options[name] = space.options(layer, operation)
            self.distributions[name] = every(self._options[name])

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
        pairs = zip(self._options.items(), indices, strict=True)
        return {name: options[index] for (name, options), index in pairs}

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
            return tuple(options.index(values[name]) for name, options in self._options.items())
        except (KeyError, ValueError):
            return None
