"""`Space`: which support tensors each layer may have, and what each choice costs. Integers only."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from superlora.search.options import (
    Configuration,
    Option,
    check_known,
    check_names,
    checked_layers,
    checked_operations,
    checked_ranks,
    checked_subset,
    cost_of,
    digest,
    refuse_rank_above,
)

if TYPE_CHECKING:
    import numpy

__all__ = ["Configuration", "Option", "Space"]


@dataclass(frozen=True, eq=False)
class Space:
    """The configurations of a supernet: one option for every layer and operation.

    Parameters
    ----------
    layers : mapping of str to (int, int)
        Output and input width of every layer, in the model's order.
    ranks : sequence of int
        The ranks that a support tensor may have; kept in descending order.
    operations : mapping of str to sequence, optional
        The operations there are, each with its options: ranks of `ranks`, ``"vector"``,
        ``"constant"``, ``"none"``. By default the five of GLoRA, each with all that it may have,
        and without ``"scale_bias"`` where no layer has a bias.
    without_bias : sequence of str
        The layers that have no bias, where ``"scale_bias"`` can only be ``"none"``.

    Raises
    ------
    TypeError, ValueError
        If a width, a rank, an operation or an option is none, or a layer without a bias is none
        of the layers.

    Notes
    -----
    The number of parameters of a support tensor of a layer (out, in) [1]_:

    ====================================  =========  ======  ========
    operation                             rank r     vector  constant
    ====================================  =========  ======  ========
    ``"scale_weight"``, ``"add_weight"``  r(out+in)  out     1
    ``"weight_to_bias"``                  r(in+1)    in      --
    ``"scale_bias"``, ``"add_bias"``      --         out     1
    ====================================  =========  ======  ========

    References
    ----------
    .. [1] A. Chavan et al., "One-for-All: Generalized LoRA for Parameter-Efficient
       Fine-tuning", 2023.

    Examples
    --------
    >>> space = Space({"q": (8, 8), "v": (8, 8)}, ranks=(4, 2))
    >>> space.size == 900**2
    True
    >>> space.num_parameters(space.fixed(add_weight=2, add_bias="vector"))
    80
    >>> Space.from_dict(space.to_dict()) == space
    True
    """

    layers: Mapping[str, tuple[int, int]]
    ranks: tuple[int, ...] = (8, 4)
    operations: Any = None
    without_bias: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", checked_layers(self.layers))
        object.__setattr__(self, "ranks", checked_ranks(self.ranks))
        bare = checked_subset(self.without_bias, self.layers)
        biases = len(bare) < len(self.layers)
        operations = checked_operations(self.operations, self.ranks, biases=biases)
        object.__setattr__(self, "operations", operations)
        object.__setattr__(self, "without_bias", bare)

    @property
    def largest_rank(self) -> int:
        """The rank that a supernet stores."""
        return self.ranks[0]

    @functools.cached_property
    def categoricals(self) -> tuple[tuple[str, str], ...]:
        """Every pair of a layer and an operation, layer by layer."""
        return tuple((layer, name) for layer in self.layers for name in self.operations)

    @functools.cached_property
    def costs(self) -> tuple[tuple[int, ...], ...]:
        """The number of parameters of every option of every categorical."""
        return tuple(
            tuple(
                cost_of(name, option, *self.layers[layer]) for option in self._options(layer, name)
            )
            for layer, name in self.categoricals
        )

    @property
    def size(self) -> int:
        """The exact number of configurations."""
        return math.prod(map(len, self.costs))

    def options(self, layer: str, operation: str) -> tuple[Option, ...]:
        """Return what a layer may have for an operation.

        Parameters
        ----------
        layer : str
            A layer's name.
        operation : str
            One of the operations.

        Returns
        -------
        tuple of int and str
            Ranks first, in descending order.

        Raises
        ------
        ValueError
            If there is no such layer or operation.
        """
        check_known("layer", layer, self.layers)
        check_known("operation", operation, self.operations)
        return self._options(layer, operation)

    def _options(self, layer: str, operation: str) -> tuple[Option, ...]:
        options: tuple[Option, ...] = self.operations[operation]
        return ("none",) if self._lacks(layer, operation) else options

    def _lacks(self, layer: str, operation: str) -> bool:
        return operation == "scale_bias" and layer in self.without_bias

    def num_parameters(self, configuration: Configuration) -> int:
        """Count the parameters of a configuration.

        Parameters
        ----------
        configuration : mapping
            An option for every layer and operation.

        Returns
        -------
        int
            The exact number.

        Raises
        ------
        TypeError, ValueError
            If it is no configuration of this space.
        """
        return self.count(self.indices(configuration))

    def count(self, indices: Iterable[int]) -> int:
        """Count the parameters of a configuration given as indices."""
        return sum(costs[index] for costs, index in zip(self.costs, indices, strict=True))

    @property
    def least(self) -> Configuration:
        """A configuration with as few parameters as there can be."""
        return self.configuration(costs.index(min(costs)) for costs in self.costs)

    @property
    def most(self) -> Configuration:
        """A configuration with as many parameters as there can be."""
        return self.configuration(costs.index(max(costs)) for costs in self.costs)

    @functools.cached_property
    def least_parameters(self) -> int:
        """The number of parameters of `least`."""
        return sum(map(min, self.costs))

    @functools.cached_property
    def most_parameters(self) -> int:
        """The number of parameters of `most`."""
        return sum(map(max, self.costs))

    def sample(self, generator: numpy.random.Generator) -> dict[str, dict[str, Option]]:
        """Draw a configuration, each with the same probability.

        Parameters
        ----------
        generator : numpy.random.Generator
            Where the numbers come from.

        Returns
        -------
        dict
            An option for every layer and operation.
        """
        return self.configuration(self.draw(generator))

    def draw(self, generator: numpy.random.Generator) -> list[int]:
        """Draw a configuration as indices, each with the same probability."""
        drawn: list[int] = generator.integers([len(costs) for costs in self.costs]).tolist()
        return drawn

    def fixed(
        self, chosen: Mapping[str, Option] | None = None, /, **options: Option
    ) -> dict[str, dict[str, Option]]:
        """Return the configuration with the same options in every layer that has them.

        Parameters
        ----------
        chosen : mapping of str to int or str, optional
            An option for some operations; the others have ``"none"``.
        **options : int or str
            The same, by name.

        Returns
        -------
        dict
            An option for every layer and operation.

        Raises
        ------
        ValueError
            If an operation has no such option.

        Examples
        --------
        >>> Space({"q": (8, 8)}, ranks=(4,), operations={"add_weight": (4, "none")}).fixed()
        {'q': {'add_weight': 'none'}}
        """
        every = {**dict(chosen or {}), **options}
        unknown = [name for name in every if name not in self.operations]
        if unknown:
            raise ValueError(
                f"options must be for the operations {list(self.operations)}: got {unknown}"
            )
        configuration: dict[str, dict[str, Option]] = {
            layer: {
                name: "none" if self._lacks(layer, name) else every.get(name, "none")
                for name in self.operations
            }
            for layer in self.layers
        }
        self.check(configuration)
        return configuration

    def indices(self, configuration: Configuration) -> tuple[int, ...]:
        """Return a configuration as the indices of its options.

        Parameters
        ----------
        configuration : mapping
            An option for every layer and operation, in any order.

        Returns
        -------
        tuple of int
            One for each of `categoricals`.

        Raises
        ------
        TypeError, ValueError
            If it is no configuration of this space.
        """
        check_names("configuration", configuration, self.layers)
        for layer in self.layers:
            check_names(f"configuration[{layer!r}]", configuration[layer], self.operations)
        return tuple(
            self._index(layer, name, configuration[layer][name])
            for layer, name in self.categoricals
        )

    def _index(self, layer: str, operation: str, option: object) -> int:
        place = f"configuration[{layer!r}][{operation!r}]"
        options = self._options(layer, operation)
        # True equals 1, and an array is equal to nothing in particular.
        if isinstance(option, bool) or not isinstance(option, int | str):
            raise TypeError(f"{place} must be an integer or a string: got {option!r}")
        refuse_rank_above(self.largest_rank, place, option)
        if option not in options:
            raise ValueError(f"{place} must be one of {list(options)}: got {option!r}")
        return options.index(option)

    def configuration(self, indices: Iterable[int]) -> dict[str, dict[str, Option]]:
        """Return the configuration with these options.

        Parameters
        ----------
        indices : iterable of int
            One for each of `categoricals`.

        Returns
        -------
        dict
            An option for every layer and operation, as JSON values.
        """
        found: dict[str, dict[str, Option]] = {layer: {} for layer in self.layers}
        for (layer, name), index in zip(self.categoricals, indices, strict=True):
            found[layer][name] = self._options(layer, name)[index]
        return found

    def check(self, configuration: Configuration) -> None:
        """Refuse what is no configuration of this space.

        Parameters
        ----------
        configuration : mapping
            An option for every layer and operation.

        Raises
        ------
        TypeError, ValueError
            If a layer, an operation or an option is missing or unknown.
        """
        self.indices(configuration)

    def key(self, configuration: Configuration) -> str:
        """Return a short name of a configuration.

        Parameters
        ----------
        configuration : mapping
            An option for every layer and operation.

        Returns
        -------
        str
            20 hexadecimal digits, the same for equal configurations.

        Raises
        ------
        TypeError, ValueError
            If it is no configuration of this space.
        """
        return digest(self.indices(configuration))

    @functools.cached_property
    def fingerprint(self) -> str:
        """20 hexadecimal digits, the same for equal spaces."""
        # The order of layers decides what a seed draws: it counts.
        return digest(list(self.to_dict().items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Space) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def to_dict(self) -> dict[str, Any]:
        """Return the space as plain JSON values.

        Returns
        -------
        dict
            For `from_dict`.
        """
        return {
            "layers": {name: list(widths) for name, widths in self.layers.items()},
            "ranks": list(self.ranks),
            "operations": {name: list(options) for name, options in self.operations.items()},
            "without_bias": list(self.without_bias),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Space:
        """Make a space from what `to_dict` gave, also after a round trip through JSON.

        Parameters
        ----------
        values : mapping
            Fields by name.

        Returns
        -------
        Space
            The space, checked.

        Raises
        ------
        TypeError, ValueError
            If a field is missing or unknown, or its value is refused.
        """
        check_names("space", values, [field.name for field in dataclasses.fields(cls)])
        return cls(**values)
