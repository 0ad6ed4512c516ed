"""`Supports`: which merge operations adapt the layers, and with which supports. Integers only."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
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


@dataclass(frozen=True)
class Supports:
    """Merge operations of one adapter, each with the design of its support tensors.

    Parameters
    ----------
    designs : tuple of (tuple of str, Spec)
        Operations whose supports make up groups among themselves, and their spec.
    shared : tuple of (str, str)
        Operations without entries of their own, and the one whose entries they take.

    Notes
    -----
    Made by `design_of` from what a user gives. A support is named like its layer, after the
    operation and a dot: overrides match that name or its end.
    """

    designs: tuple[tuple[tuple[str, ...], Spec], ...]
    shared: tuple[tuple[str, str], ...] = ()

    # Of the whole: every design has a scale of its own, which this one multiplies.
    scaling: ClassVar[float] = 1.0

    @property
    def operations(self) -> tuple[str, ...]:
        """All operations, in the order given."""
        own = [operation for operations, _ in self.designs for operation in operations]
        return (*own, *(operation for operation, _ in self.shared))

    def scaled(self, scale: float) -> Spec:
        """Return a spec of this scale, if it is a good one."""
        return Spec(scale=scale)

    def without(self, operation: str, layers: Sequence[str], *, all_of: bool = False) -> Supports:
        """Return the same without one operation's supports of some layers."""
        if any(source == operation for _, source in self.shared):
            return self  # its entries are those of another, which has its effect
        designs = []
        for operations, spec in self.designs:
            if operation not in operations:
                designs.append((operations, spec))
            elif not all_of:
                there = [name for name in layers if spec.of(f"{operation}.{name}") is not None]
                names = "|".join(map(re.escape, there))
                left_out = [(rf"{operation}\.({names})", None)] if there else []
                pairs = (*left_out, *spec.overrides)
                designs.append((operations, spec.replace(overrides=pairs)))
            elif len(operations) > 1:
                designs.append((tuple(o for o in operations if o != operation), spec))
        if not designs:
            raise ValueError(f"{operation!r} must have a layer that it changes: none has a bias")
        return Supports(tuple(designs), self.shared)

    def to_dict(self) -> dict[str, Any]:
        """Return the supports as plain JSON values."""
        designs = [[list(operations), spec.to_dict()] for operations, spec in self.designs]
        return {_KEY: [*designs, *([[operation], source] for operation, source in self.shared)]}


def design_of(given: object) -> Spec | Supports:
    """Return a spec as it is, and a mapping of operations as supports, checked."""
    if isinstance(given, (Spec, Supports)):
        return given
    if not isinstance(given, Mapping):
        raise TypeError(
            "spec must be a superlora.Spec or a mapping of merge operations to them: got "
            f"{type(given).__name__}"
        )
    designs: list[tuple[tuple[str, ...], Spec]] = []
    shared: list[tuple[str, str]] = []
    for key, value in given.items():
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
    found = Supports(tuple(designs), tuple(shared))
    if not designs:
        raise ValueError(f"spec must have an operation with a superlora.Spec: got {dict(given)!r}")
    if len(set(found.operations)) < len(found.operations):
        raise ValueError(f"spec must have every operation once: got {list(found.operations)}")
    for operation, source in shared:
        if not any(source in operations for operations, _ in designs):
            raise ValueError(
                f"spec[{operation!r}] must name an operation with a design of its own: got "
                f"{source!r}"
            )
    return found


def design_from_dict(values: Any) -> Spec | Supports:
    """Make a design from what ``to_dict`` gave, also after a round trip through JSON."""
    if not isinstance(values, Mapping) or set(values) != {_KEY}:
        return Spec.from_dict(values)
    entries = [(tuple(operations), value) for operations, value in values[_KEY]]
    # A dict would let a later entry take the place of an earlier one.
    if len({operations for operations, _ in entries}) < len(entries):
        raise ValueError(f"{_KEY} must have every operation once")
    return design_of(
        {
            operations: value if isinstance(value, str) else Spec.from_dict(value)
            for operations, value in entries
        }
    )


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
            vector = Spec(rank="full", order=1, scale=spec.scaling, fold=fold)
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
