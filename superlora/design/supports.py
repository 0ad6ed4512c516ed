"""`Supports`: which merge operations adapt the layers, and with which supports. Integers only."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from superlora.design.axes import Axes
from superlora.design.spec import Spec
from superlora.errors import some

ADD = "add_weight"
# Of an operation's support for a layer of some output and input width.
_SHAPES: dict[str, Callable[[int, int], tuple[int, int]]] = {
    ADD: lambda rows, columns: (rows, columns),
    "scale_weight": lambda rows, columns: (rows, columns),
    "right_weight": lambda rows, columns: (columns, columns),
    "left_weight": lambda rows, columns: (rows, rows),
    "weight_to_bias": lambda rows, columns: (columns, 1),
    "scale_bias": lambda rows, columns: (rows, 1),
    "add_bias": lambda rows, columns: (rows, 1),
}
OPERATIONS = tuple(_SHAPES)
# Those that change the bias; the others change the weight.
OF_BIAS = frozenset({"weight_to_bias", "scale_bias", "add_bias"})
_KEY = "supports"  # in the plain form

# One operation, or several whose supports are grouped together.
Operations = str | tuple[str, ...]


def support_shape(operation: str, shape: tuple[int, int]) -> tuple[int, int]:
    """Return the shape of an operation's support tensor.

    Parameters
    ----------
    operation : str
        One of the merge operations.
    shape : (int, int)
        Output and input width of the layer.

    Returns
    -------
    (int, int)
        That of S; a vector is a matrix of one column.

    Raises
    ------
    ValueError
        If there is no such operation.

    Examples
    --------
    >>> support_shape("right_weight", (6, 4)), support_shape("weight_to_bias", (6, 4))
    ((4, 4), (4, 1))
    """
    check_operation(operation)
    return _SHAPES[operation](*shape)


@functools.lru_cache(maxsize=4096)
def support_axes(operation: str, axes: Axes) -> Axes:
    """Return the axes of an operation's support tensor for a weight of these."""
    if operation in (ADD, "scale_weight"):
        return axes
    # Inputs meet a stack, and a window, otherwise than as the columns of a matrix.
    if axes.stack or (axes.window and operation in ("right_weight", "weight_to_bias")):
        expected = "no stack" if axes.stack else "two axes"
        raise ValueError(f"{operation!r} must have weights of {expected}: got {axes.shape}")
    return Axes(*support_shape(operation, axes.matrix))


def check_operation(operation: object) -> None:
    """Refuse what is no merge operation."""
    if operation not in _SHAPES:
        close = difflib.get_close_matches(str(operation), OPERATIONS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"operations must be among {OPERATIONS}: got {operation!r}{hint}")


@dataclass(frozen=True, init=False, repr=False)
class Supports(Mapping[Operations, Spec | str]):
    """Merge operations of one adapter, each with the design of its support tensors.

    Parameters
    ----------
    spec : mapping of str, or tuple of str, to Spec or str
        A spec for each merge operation of `OPERATIONS`. Operations in a tuple have their supports
        grouped together, by one spec. The name of another operation in place of a spec: the
        entries of the support are those of that operation's, a vector.

    Attributes
    ----------
    designs : tuple of (tuple of str, Spec)
        Operations whose supports make up groups among themselves, and their spec.
    shared : tuple of (str, str)
        Operations without entries of their own, and the one whose entries they take.

    Raises
    ------
    TypeError
        If `spec` is no mapping, or a value is neither a spec nor a name.
    ValueError
        If an operation is unknown or there twice, none has a spec, or a name is not that of an
        operation with a spec.

    Notes
    -----
    A layer's weight W₀ and bias b₀ become W and b. The support S of an operation is what the
    equation of its `Spec` gives, scale included; the support of an absent operation is zero::

        W = W₀ + S_add_weight + W₀ ∘ S_scale_weight + W₀ S_right_weight + S_left_weight W₀
        b = b₀ + S_add_bias + b₀ ∘ S_scale_bias + W₀ S_weight_to_bias

    Supports are read as the mapping that they are made of, with the operations that have a spec
    first. Equal ones have their operations in the same order, by which groups are numbered. A
    support is named like its layer, after the operation and a dot: overrides match that name or
    its end.

    Examples
    --------
    >>> import superlora as sl
    >>> supports = sl.Supports({"scale_weight": sl.lora(rank=1), "add_bias": sl.dense()})
    >>> supports["add_bias"]
    Spec(rank='full', order=1)
    >>> sl.Plan(supports, {"q": (6, 4)}).num_parameters
    16
    >>> supports == sl.Supports.from_dict(supports.to_dict())
    True
    """

    designs: tuple[tuple[tuple[str, ...], Spec], ...]
    shared: tuple[tuple[str, str], ...]

    # Of the whole: every design has a scale of its own, which this one multiplies.
    scaling: ClassVar[float] = 1.0

    def __init__(self, spec: Mapping[Any, Spec | str]) -> None:
        if not isinstance(spec, Mapping):
            raise TypeError(
                "spec must be a superlora.Spec or a mapping of merge operations to them: got "
                f"{type(spec).__name__}"
            )
        designs: list[tuple[tuple[str, ...], Spec]] = []
        shared: list[tuple[str, str]] = []
        for key, value in spec.items():
            operations = key if isinstance(key, tuple) else (key,)
            for operation in operations:
                check_operation(operation)
            if isinstance(value, str) and len(operations) == 1:
                shared.append((*operations, value))
            elif isinstance(value, Spec) and operations:
                designs.append((operations, value))
            else:
                raise TypeError(
                    f"spec[{key!r}] must be a superlora.Spec, or the name of an operation whose "
                    f"entries one other shares: got {value!r}"
                )
        object.__setattr__(self, "designs", tuple(designs))
        object.__setattr__(self, "shared", tuple(shared))
        self._check()

    def _check(self) -> None:
        if not self.designs:
            raise ValueError(
                f"spec must have an operation with a superlora.Spec: got {self._as_dict()}"
            )
        if len(set(self.operations)) < len(self.operations):
            raise ValueError(f"spec must have every operation once: got {list(self.operations)}")
        for operation, source in self.shared:
            if not any(source in operations for operations, _ in self.designs):
                raise ValueError(
                    f"spec[{operation!r}] must name an operation with a design of its own: got "
                    f"{source!r}"
                )

    def _as_dict(self) -> dict[Operations, Spec | str]:
        own = {names if len(names) > 1 else names[0]: spec for names, spec in self.designs}
        return {**own, **dict(self.shared)}

    def __getitem__(self, key: Operations) -> Spec | str:
        return self._as_dict()[key]

    def __iter__(self) -> Iterator[Operations]:
        return iter(self._as_dict())

    def __len__(self) -> int:
        return len(self.designs) + len(self.shared)

    def __repr__(self) -> str:
        return f"Supports({self._as_dict()})"

    @property
    def operations(self) -> tuple[str, ...]:
        """All operations, those with a spec first."""
        own = [operation for operations, _ in self.designs for operation in operations]
        return (*own, *(operation for operation, _ in self.shared))

    def to_dict(self) -> dict[str, Any]:
        """Return the supports as plain JSON values.

        Returns
        -------
        dict
            Under one key a list of pairs: operations, and a spec's own dict or a name.
        """
        designs = [[list(operations), spec.to_dict()] for operations, spec in self.designs]
        return {_KEY: [*designs, *([[operation], source] for operation, source in self.shared)]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Supports:
        """Make supports from what `to_dict` gave, also after a round trip through JSON.

        Parameters
        ----------
        values : mapping
            The plain values.

        Returns
        -------
        Supports
            The supports, checked.

        Raises
        ------
        TypeError
            If `values` or a spec in it is no mapping.
        ValueError
            If `values` has other keys, or an operation or a spec is refused.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"supports must be a mapping: got {type(values).__name__}")
        if set(values) != {_KEY}:
            raise ValueError(f"supports must have the key {_KEY!r} alone: got {list(values)}")
        entries = [(tuple(operations), value) for operations, value in values[_KEY]]
        # A dict would let a later entry take the place of an earlier one.
        if len({operations for operations, _ in entries}) < len(entries):
            raise ValueError(f"{_KEY} must have every operation once")
        return cls(
            {
                operations: value if isinstance(value, str) else Spec.from_dict(value)
                for operations, value in entries
            }
        )


def without(
    design: Supports, operation: str, layers: Sequence[str], *, all_of: bool = False
) -> Supports:
    """Return the same without one operation's supports of some layers."""
    if any(source == operation for _, source in design.shared):
        return design  # its entries are those of another, which has its effect
    designs: dict[Any, Spec | str] = {}
    for operations, spec in design.designs:
        if operation not in operations:
            designs[operations] = spec
        elif not all_of:
            there = [name for name in layers if spec.of(f"{operation}.{name}") is not None]
            names = "|".join(map(re.escape, there))
            left_out = [(rf"{operation}\.({names})", None)] if there else []
            designs[operations] = spec.replace(overrides=(*left_out, *spec.overrides))
        elif len(operations) > 1:
            designs[tuple(o for o in operations if o != operation)] = spec
    if not designs:
        raise ValueError(f"{operation!r} must have a layer that it changes: none has a bias")
    return Supports(designs | dict(design.shared))


def unnamed(design: Spec | Supports, layer: str) -> Spec | Supports | None:
    """Return a design without overrides, or None where one of them names the layer."""
    if isinstance(design, Spec):
        return design.replace(overrides=()) if design.override_of(layer) is None else None
    designs: dict[Any, Spec | str] = {}
    for operations, spec in design.designs:
        if any(spec.override_of(f"{operation}.{layer}") is not None for operation in operations):
            return None
        designs[operations] = spec.replace(overrides=())
    return Supports(designs | dict(design.shared))


def design_of(given: Any) -> Spec | Supports:
    """Return a spec and supports as they are, and a mapping of operations as supports."""
    return given if isinstance(given, (Spec, Supports)) else Supports(given)


def design_from_dict(values: Any) -> Spec | Supports:
    """Make a design from what ``to_dict`` gave, also after a round trip through JSON."""
    of_operations = isinstance(values, Mapping) and set(values) == {_KEY}
    return Supports.from_dict(values) if of_operations else Spec.from_dict(values)


def parts_of(
    design: Spec | Supports, layers: Mapping[str, Axes]
) -> tuple[
    list[tuple[Spec, list[str]]], dict[str, Axes], dict[str, dict[str, str]], dict[str, str]
]:
    """Return what a design makes of layers, without what overrides leave out."""
    shared: dict[str, str] = {}
    if isinstance(design, Spec):
        places = {layer: (ADD, layer) for layer in layers}
        designs = _designs(design, list(layers))
    else:
        places = {f"{op}.{layer}": (op, layer) for op in design.operations for layer in layers}
        designs = []
        for operations, spec in design.designs:
            designs += _designs(spec, [f"{op}.{layer}" for op in operations for layer in layers])
        for operation, source in design.shared:
            own = {f"{source}.{layer}": f"{operation}.{layer}" for layer in layers}
            shared |= _share(designs, operation, source, own)
    kept = {name for _, names in designs for name in names}
    axes = {}
    supports: dict[str, dict[str, str]] = {layer: {} for layer in layers}
    for name, (operation, layer) in places.items():
        if name not in kept:
            continue
        try:
            axes[name] = support_axes(operation, layers[layer])
        except ValueError as error:
            raise ValueError(f"{error} for {layer!r}") from None
        supports[layer][operation] = name
    return designs, axes, {layer: own for layer, own in supports.items() if own}, shared


def _share(
    designs: list[tuple[Spec, list[str]]], operation: str, source: str, own: Mapping[str, str]
) -> dict[str, str]:
    """Add the designs of supports whose entries are those of others, and return whose."""
    shared: dict[str, str] = {}
    for spec, names in list(designs):
        taken = [name for name in names if name in own]
        if not taken:
            continue
        if _is_vector(spec):
            fold = spec.fold if spec.fold == "natural" else "balanced"  # as many groups a stack
            vector = Spec(
                rank="full",
                order=1,
                scale=spec.scaling,
                fold=fold,
                terms=spec.terms,
                frozen_terms=spec.frozen_terms,
            )
            designs.append((vector, [own[name] for name in taken]))
            shared |= {own[name]: name for name in taken}
        elif spec.map.repeated() != "outputs":  # what scales inputs leaves the bias alone
            raise ValueError(
                f"spec[{operation!r}] must share a vector, of order 1 and a group a weight: the "
                f"design of {source!r} is another"
            )
    return shared


def _is_vector(spec: Spec) -> bool:
    """Return whether a design's trained entries are a vector of one entry an output."""
    if spec.modes > 1 or spec.frozen or spec.factor_map is not None or spec.groups != "weight":
        return False
    return spec.map.is_identity or spec.map.repeated() == "inputs"


def _designs(spec: Spec, names: list[str]) -> list[tuple[Spec, list[str]]]:
    """Return the specs of some weights, without overrides, and the weights of each."""
    if not spec.overrides:
        return [(spec, names)]
    parts: dict[Spec, list[str]] = {}
    own: dict[str | None, Spec | None] = {}
    for name in names:
        pattern = spec.override_of(name)
        if pattern not in own:
            own[pattern] = spec.of(name)
        found = own[pattern]
        if found is not None:
            parts.setdefault(found, []).append(name)
    unused = [pattern for pattern, _ in spec.overrides if pattern not in own]
    if unused:
        raise ValueError(
            f"overrides must match weights of their own: {some(map(repr, unused))} matched "
            f"none of {some(map(repr, names))}"
        )
    if not parts:
        raise ValueError(f"overrides must not leave out all of {some(map(repr, names))}")
    return list(parts.items())
