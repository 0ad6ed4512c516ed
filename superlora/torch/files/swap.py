"""Put the factors of another file into an adapter, in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from superlora.design.spec import Spec
from superlora.design.supports import Supports
from superlora.errors import some
from superlora.torch.blocks import Blocks, scale_in_force
from superlora.torch.files import state
from superlora.torch.files.safetensors_file import DTYPES, Header, other_shapes, read_tensors
from superlora.torch.layers import Weight
from superlora.torch.replaced import Replaced
from superlora.torch.sharded import spread

# The fields of a spec that decide its scale alone.
_SCALES = ("alpha", "rslora", "scale")
# Version and fingerprint of frozen blocks, while these live.
_PRINTS: Any = WeakTensorKeyDictionary()


def swap_blocks(
    blocks: Blocks,
    weights: Mapping[str, Weight],
    replaced: Replaced | None,
    beside: Mapping[str, Any],
    path: Path,
    nonfinite: bool,
) -> float:
    """Copy the factors of a file of the same design into blocks, and return its scale."""
    own = {name: blocks[name] for name in state.stored_shapes(blocks.plan)}
    if replaced is not None:
        own |= {state.MODEL + name: value for name, value in replaced.tensors().items()}

    def check(metadata: Mapping[str, str], tensors: Header) -> state.Description:
        description = state.description_of(metadata, path, len(blocks.plan.layout.layer_axes))
        # The seed of a supernet says nothing of its tensors.
        spaces = [
            (of or {}).get("space") for of in (beside.get(state.SUPERNET), description.supernet)
        ]
        if spaces[0] != spaces[1]:
            raise ValueError(
                f"{path} must be of a supernet of the same space, or of none where the adapter is "
                "none"
            )
        _check_selection(beside, description, path)
        _check_design(blocks, description, path)
        if isinstance(blocks.plan.spec, Supports):
            state.check_biases(blocks.plan, weights, description, path)
        state.check_tensors(blocks.plan, tensors, path)
        _check_replaced(own, tensors, path)
        state.check_maps(blocks.plan, description, path)
        state.check_scales(blocks.plan, description.scale, blocks.dtype, path)
        _check_frozen(blocks, description, tensors, path)
        return description

    # Not cloned: they are copied below, while the file lies there.
    description, found = read_tensors(path, check, owned=False, nonfinite=nonfinite)
    fitted = {name: _fitted(name, found[name], tensor, path) for name, tensor in own.items()}
    with torch.inference_mode(False), torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(spread(fitted[name], tensor))
    return description.scale


def _check_selection(beside: Mapping[str, Any], description: state.Description, path: Path) -> None:
    """Refuse a file of other rows of the layers, or of other shared weights."""
    own = {name: tuple(rows) for name, rows in beside.get("rows", {}).items()}
    tied = beside.get("tied", [])
    if (own, tied) != (description.rows, description.tied):
        raise ValueError(
            f"{path} must be of the adapter's rows and shared weights, {own or tied or 'none'}: "
            f"got {description.rows or description.tied or 'none'}"
        )


def _check_design(blocks: Blocks, description: state.Description, path: Path) -> None:
    """Refuse a file of another design than the adapter's, or list what differs."""
    layers = blocks.plan.layout.layer_axes
    own, found = (
        {name: axes.shape for name, axes in each.items()} for each in (layers, description.layers)
    )
    problems = _other_fields(blocks.plan.spec, description.spec)
    problems += other_shapes(own, found, ("no layer", "another layer", "has"))
    if not problems and list(own) != list(found):
        problems = ["the layers in another order"]
    if not problems:
        problems = _other_scales(blocks, description)
    if problems:
        raise ValueError(f"{path} must be of the adapter's design: {some(problems, 20)}")


def _other_fields(ours: Spec | Supports, theirs: Spec | Supports) -> list[str]:
    if type(ours) is not type(theirs):
        return ["only one of the two has merge operations"]
    if isinstance(ours, Supports) and isinstance(theirs, Supports):
        parts = [[operations for operations, _ in each.designs] for each in (ours, theirs)]
        if parts[0] != parts[1] or ours.shared != theirs.shared:
            return ["other operations, or others together"]
    own, found = _fields(ours), _fields(theirs)
    return [
        f"{field} {found[field]!r} instead of {value!r}"
        for field, value in own.items()
        if found[field] != value
    ]


def _fields(design: Spec | Supports) -> dict[str, Any]:
    if isinstance(design, Spec):
        return {field: own for field, own in design.to_dict().items() if field not in _SCALES}
    return {
        f"{field} of {'/'.join(operations)}": own
        for operations, spec in design.designs
        for field, own in spec.to_dict().items()
    }


def _other_scales(blocks: Blocks, description: state.Description) -> list[str]:
    """Return the layers whose scale the adapter's would not give, since overrides have another."""
    plan, spec, scale = blocks.plan, description.spec, description.scale
    if isinstance(spec, Supports) or not spec.overrides or spec.scaling == plan.scale:
        return []
    wrong = []
    for name in plan.shapes:
        own = spec.of(name)
        assert own is not None  # or the overrides would differ
        theirs = scale_in_force(own.scaling, spec.scaling, scale)
        ours = scale_in_force(plan.layout.scaling(name), plan.scale, scale)
        if abs(theirs - ours) > 1e-9 * abs(theirs):
            wrong.append(f"{name!r} of scale {theirs:.6g} where this one's would be {ours:.6g}")
    return wrong


def _check_replaced(own: Mapping[str, Tensor], tensors: Header, path: Path) -> None:
    """Refuse a file whose parameters of the model itself are not those that were replaced."""
    expected = {
        name: tuple(value.shape) for name, value in own.items() if name.startswith(state.MODEL)
    }
    found = {name: shape for name, (shape, _) in tensors.items() if name.startswith(state.MODEL)}
    problems = other_shapes(expected, found)
    if problems:
        raise ValueError(
            f"{path} must hold the parameters that the adapter replaced in the model: "
            f"{some(problems, 20)}"
        )


def _check_frozen(
    blocks: Blocks, description: state.Description, tensors: Header, path: Path
) -> None:
    stored = state.stored_shapes(blocks.plan)
    made = {name: block for name, block in blocks.items() if name not in stored}
    if not made:
        return
    kind = DTYPES[tensors[next(iter(stored))][1]]
    theirs, ours = torch.finfo(kind).eps, torch.finfo(blocks.dtype).eps
    # Those of the file were rounded to its dtype, and ours to the adapter's.
    if kind is blocks.dtype or theirs < ours:
        found = {name: _print_of(block) for name, block in made.items()}
    else:
        found = {name: state.print_of(block.to(kind)) for name, block in made.items()}
    tolerance = state.TOLERANCE if kind is blocks.dtype else state.TOLERANCE + 4 * ours
    state.check_frozen(found, description, path, tolerance)


def _print_of(block: Tensor) -> float:
    """Return a frozen block's fingerprint, taken once while it stays as it is."""
    if block.is_inference():  # does not count its changes
        return state.print_of(block)
    known: tuple[int, float] | None = _PRINTS.get(block)
    if known is None or known[0] != block._version:
        known = (block._version, state.print_of(block))
        _PRINTS[block] = known
    return known[1]


def _fitted(name: str, value: Tensor, own: Tensor, path: Path) -> Tensor:
    """Return a file's tensor in the dtype of the adapter's, or refuse what that cannot hold."""
    if value.dtype == own.dtype:
        return value
    if not (value.is_floating_point() and own.is_floating_point()):
        raise ValueError(f"{name!r} of {path} must be of {own.dtype}: got {value.dtype}")
    fitted = value.to(own.dtype)
    if torch.finfo(own.dtype).max < torch.finfo(value.dtype).max and not torch.equal(
        fitted.isfinite(), value.isfinite()
    ):
        raise ValueError(
            f"{name!r} of {path} must fit the adapter's {own.dtype}: it holds larger numbers of "
            f"{value.dtype}"
        )
    return fitted
