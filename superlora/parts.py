"""What a design makes of layers: the weights or supports that are grouped. Integers only."""

from __future__ import annotations

from collections.abc import Mapping

from superlora.axes import Axes
from superlora.errors import some
from superlora.spec import Spec
from superlora.supports import ADD, Supports, support_axes


def parts_of(
    design: Spec | Supports, layers: Mapping[str, Axes]
) -> tuple[
    list[tuple[Spec, list[str]]], dict[str, Axes], dict[str, dict[str, str]], dict[str, str]
]:
    """Return what a design makes of layers, without what overrides leave out.

    Parameters
    ----------
    design : Spec or Supports
        The design; a spec is that of ``add_weight``, whose supports are named like the layers.
    layers : mapping of str to Axes
        Those of every layer's weight.

    Returns
    -------
    list of (Spec, list of str)
        Specs without overrides, and the names that make up groups among themselves.
    dict of str to Axes
        Those of every weight or support by name.
    dict of str to dict of str to str
        For each layer that has any the names of its supports by operation.
    dict of str to str
        Names of supports whose entries are those of others.

    Raises
    ------
    ValueError
        If nothing is left, an override matches nothing of its own, or entries cannot be shared.
    """
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
