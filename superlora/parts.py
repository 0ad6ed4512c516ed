"""What a design makes of layers: the weights or supports that are grouped. Integers only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from superlora.axes import Axes
from superlora.errors import some
from superlora.maps import Broadcast, Identity
from superlora.spec import Spec
from superlora.supports import ADD, Supports, support_axes


@dataclass(frozen=True)
class Parts:
    """What a design makes of layers.

    Attributes
    ----------
    axes : dict of str to Axes
        Those of every weight or support by name.
    supports : dict of str to dict of str to str
        For each layer that has any the names of its supports by operation.
    designs : list of (Spec, list of str)
        Specs without overrides, and the names that make up groups among themselves.
    shared : dict of str to str
        Names of supports whose entries are those of others.
    """

    axes: dict[str, Axes]
    supports: dict[str, dict[str, str]]
    designs: list[tuple[Spec, list[str]]]
    shared: dict[str, str]


@contextlib.contextmanager
def named(design: Spec | Supports, names: Sequence[str]) -> Iterator[None]:
    """Say in an error which operations a spec is for, where a design has several.

    Parameters
    ----------
    design : Spec or Supports
        The whole design.
    names : sequence of str
        The supports that the spec is for.

    Yields
    ------
    None
        Nothing.

    Raises
    ------
    ValueError
        What was raised inside, with the operations before its message.
    """
    try:
        yield
    except ValueError as error:
        if isinstance(design, Spec):
            raise
        operations = dict.fromkeys(name.partition(".")[0] for name in names)
        raise ValueError(f"{', '.join(operations)}: {error}") from None


def parts_of(design: Spec | Supports, layers: Mapping[str, Axes]) -> Parts:
    """Return what a design makes of layers.

    Parameters
    ----------
    design : Spec or Supports
        The design; a spec is that of ``add_weight``, whose supports are named like the layers.
    layers : mapping of str to Axes
        Those of every layer's weight.

    Returns
    -------
    Parts
        Without what overrides leave out.

    Raises
    ------
    ValueError
        If nothing is left, an override matches nothing of its own, or entries cannot be shared.
    """
    if isinstance(design, Spec):
        designs = _designs(design, list(layers))
        found = dict(layers)
        if design.overrides:
            kept = {name for _, names in designs for name in names}
            found = {name: axes for name, axes in layers.items() if name in kept}
        return Parts(found, {name: {ADD: name} for name in found}, designs, {})
    places = {f"{op}.{layer}": (op, layer) for op in design.operations for layer in layers}
    designs = []
    for operations, spec in design.designs:
        designs += _designs(spec, [f"{op}.{layer}" for op in operations for layer in layers])
    shared: dict[str, str] = {}
    for operation, source in design.shared:
        own = {f"{source}.{layer}": f"{operation}.{layer}" for layer in layers}
        sources = []
        for spec, names in list(designs):
            taken = [name for name in names if name in own]
            sources += [spec] * bool(taken)
            if taken and _is_vector(spec):
                fold = spec.fold if spec.fold == "natural" else "balanced"  # as many groups a stack
                vector = Spec(rank="full", order=1, scale=spec.scaling, fold=fold)
                designs.append((vector, [own[name] for name in taken]))
                shared |= {own[name]: name for name in taken}
        # What scales the inputs of a layer leaves its bias alone.
        if not all(_is_vector(spec) or spec.map == Broadcast(along="outputs") for spec in sources):
            raise ValueError(
                f"spec[{operation!r}] must share a vector, of order 1 and a group a weight: the "
                f"design of {source!r} is another"
            )
    kept = {name for _, names in designs for name in names}
    supports: dict[str, dict[str, str]] = {}
    for layer in layers:
        named = {op: f"{op}.{layer}" for op in design.operations if f"{op}.{layer}" in kept}
        if named:
            supports[layer] = named
    found = {}
    for name, (operation, layer) in places.items():
        if name in kept:
            try:
                found[name] = support_axes(operation, layers[layer])
            except ValueError as error:
                raise ValueError(f"{error} for {layer!r}") from None
    return Parts(found, supports, designs, shared)


def _is_vector(spec: Spec) -> bool:
    """Return whether a design's trained entries are a vector of one entry an output."""
    if spec.modes > 1 or spec.frozen or spec.factor_map is not None or spec.groups != "weight":
        return False
    return spec.map in (Identity(), Broadcast(along="inputs"))


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
