"""The blocks that an adapter starts with: drawn or given, and terms that cancel given ones."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Container, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

from superlora._backend import backend_of, check_floating, widened
from superlora.algebra.form import with_blocks
from superlora.algebra.frozen import each_frozen
from superlora.algebra.init import each_factor, zero_block
from superlora.design.layout import Layout
from superlora.design.spec import Spec
from superlora.design.supports import Supports
from superlora.errors import some
from superlora.plan import Plan
from superlora.torch.files.safetensors_file import other_shapes
from superlora.torch.files.state import TOLERANCE, print_of, stored_shapes
from superlora.torch.layers import Weight, refuse_empty
from superlora.torch.offload import device_of
from superlora.torch.sharded import whole


def checked_dtype(dtype: Any) -> torch.dtype | None:
    """Return a dtype that factors can have, or None for none; refuse others."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype: got {dtype!r}")
    return dtype


def starting(
    plan: Plan,
    weights: Mapping[str, Weight],
    seed: int,
    dtype: torch.dtype | None,
    init: Mapping[str, Any] | None,
    keep_output: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the blocks that an adapter starts with, and those that wait for memory."""
    if init is not None:
        dtype = _factors_dtype(weights, dtype)
        blocks = _given(plan, init, frozen_of(plan, weights), dtype, keep_output)
        return placed_or_stored(plan, weights, blocks, dtype)
    if keep_output:
        raise ValueError("keep_output must come with init: without, the output is kept anyway")
    stored = [block for block, source in plan.layout.frozen.items() if source == "stored"]
    if stored:
        raise ValueError(
            f"spec must say how frozen blocks are made to be attached: {some(stored)} are 'stored' "
            "in a file; or init must hold them"
        )
    return initial(plan, weights, seed, dtype), {}


def _factors_dtype(weights: Mapping[str, Weight], dtype: Any) -> torch.dtype:
    """Return the dtype that factors get."""
    given = checked_dtype(dtype)
    dtypes = (weight.dtype for weight in weights.values())
    return given or functools.reduce(torch.promote_types, dtypes, torch.float32)


def initial(
    plan: Plan, weights: Mapping[str, Weight], seed: int, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Draw the factors that an adapter starts with, and make its frozen blocks."""
    dtype = _factors_dtype(weights, dtype)
    # A block without memory is not drawn before it has some.
    shapes = plan.layout.input_shapes
    empty = [name for name in shapes if device_beside(plan, weights, name).type == "meta"]
    found = drawn(plan, weights, seed, dtype, set(empty), own=_matrices(plan, weights))
    for block in empty:
        shape = plan.layout.input_shapes[block]
        found[block] = torch.empty(shape, device="meta", dtype=dtype)
    return found


def drawn(
    plan: Plan,
    weights: Mapping[str, Weight],
    seed: int,
    dtype: torch.dtype,
    skipped: Container[str],
    own: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return initial factors and frozen blocks, singular vectors only of given weights."""
    layout = plan.layout
    # Whatever contexts we are called in, the factors hold values and can be trained.
    with torch.device("cpu"), torch.inference_mode(False):
        factors = each_factor(layout, seed, skipped=skipped)
        frozen = each_frozen(layout, own, singular=own is not None, skipped=skipped)
        # One at a time: all of them in float64 would be twice the adapter.
        return {
            block: torch.from_numpy(values).to(device_beside(plan, weights, block), dtype)
            for block, values in itertools.chain(factors, frozen)
        }


def _layer(plan: Plan, block: str) -> str:
    """Return the first layer of a block's group."""
    layout = plan.layout
    return layout.layer_of[layout.grouping.members[int(block.partition(".")[0])][0]]


def _weight(plan: Plan, weights: Mapping[str, Weight], block: str) -> Weight:
    """Return the weight beside which a block lives."""
    return weights[_layer(plan, block)]


def device_beside(plan: Plan, weights: Mapping[str, Weight], block: str) -> torch.device:
    """Return where a block lies, beside the first weight of its group."""
    weight = _weight(plan, weights, block)
    return device_of(weight.module, weight.parameter)


def _matrices(plan: Plan, weights: Mapping[str, Weight]) -> dict[str, Tensor]:
    """Return the weights whose values are asked for, as plans have them."""
    if not any(source.startswith("singular") for source in plan.layout.frozen.values()):
        return {}
    empty = {name: weight.parameter for name, weight in weights.items()}
    refuse_empty("weights must be loaded where a spec takes their singular vectors", empty)
    found = {}
    for name, weight in weights.items():
        if not weight.summable:
            raise ValueError(f"a spec must not take the singular vectors of {name!r}: quantised")
        axes = plan.layout.layer_axes[name]
        matrix = weight.form().matrix(weight.parameter.detach())
        if matrix.shape != axes.matrix:
            raise ValueError(
                f"a spec must not take the singular vectors of rows: {name!r} has some"
            )
        found[name] = matrix.reshape(axes.shape)
    return found


def placed(
    plan: Plan,
    weights: Mapping[str, Weight],
    blocks: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Move blocks to their group's first weight, or to a device, all in one dtype."""
    own = {name: device_beside(plan, weights, name) for name in blocks}
    return {
        name: block.to(own[name] if device is None or own[name].type == "meta" else device, dtype)
        for name, block in blocks.items()
    }


def placed_or_stored(
    plan: Plan,
    weights: Mapping[str, Weight],
    blocks: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return blocks as `placed` does, and those that wait for their weights to have memory."""
    found = placed(plan, weights, blocks, dtype, device)
    return found, {name: blocks[name].to(dtype) for name, own in found.items() if own.is_meta}


def frozen_of(plan: Plan, weights: Mapping[str, Weight]) -> dict[str, Tensor]:
    """Make the frozen blocks that no file stores, in float64 and on the CPU."""
    frozen: dict[str, Tensor] = plan.frozen(_matrices(plan, weights), like=torch.float64)
    return frozen


def with_opposite_terms(design: Spec | Supports) -> Spec | Supports:
    """Return a design of twice the terms, of which the second half is fixed."""
    if isinstance(design, Supports):
        twice = {operations: _with_opposite(own) for operations, own in design.designs}
        return Supports(twice | dict(design.shared))
    return _with_opposite(design)


def _with_opposite(design: Spec) -> Spec:
    overrides = {
        pattern: changes if changes is None else dict(changes) | _twice(design, dict(changes))
        for pattern, changes in design.overrides
    }
    return design.replace(**_twice(design, {}), overrides=overrides)


def _twice(design: Spec, changes: Mapping[str, Any]) -> dict[str, int]:
    """Return the fields that double the terms of a design with some changes."""
    terms = changes.get("terms", design.terms)
    frozen = changes.get("frozen_terms", design.frozen_terms)
    if frozen or terms > 8:
        raise ValueError(
            "keep_output must have a design of at most 8 terms, of which none is fixed: got "
            f"terms={terms} and frozen_terms={frozen}"
        )
    return {"terms": 2 * terms, "frozen_terms": terms}


def opposite_terms(layout: Layout, blocks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the blocks of the fixed half of the terms, by which the update is zero."""
    found: dict[str, Tensor] = {}
    for group, own in enumerate(layout.specs):
        products = layout.term_blocks(group)
        for term in range(own.trained_terms):
            made = with_blocks(layout, blocks, products[term])
            # One block of each product, also where groups share some.
            negative = zero_block(layout, group, term)
            fixed = products[own.trained_terms + term]
            for name, copy in zip(products[term], fixed, strict=True):
                found[copy] = -made[name] if name == negative else made[name].clone()
    return found


def _given(
    plan: Plan, init: Any, made: Mapping[str, Tensor], dtype: torch.dtype, opposite: bool
) -> dict[str, Tensor]:
    """Return all blocks of a plan on the CPU: given factors, frozen ones, opposite terms."""
    layout = plan.layout
    found = _tensors(init)
    expected = dict(layout.factor_shapes) if opposite else stored_shapes(plan)
    # Frozen blocks may be given too, as `Adapter.factors` returns them, if they are the plan's.
    expected |= {name: layout.input_shapes[name] for name in made if name in found}
    shapes = {name: tuple(own.shape) for name, own in found.items()}
    problems = other_shapes(expected, shapes, ("missing", "unknown", "has"))
    if not problems:
        problems = [
            f"{name!r} is frozen and has other values"
            for name, own in made.items()
            if name in found
            and not abs(print_of(found[name]) - print_of(own.to(found[name].dtype))) < TOLERANCE
        ]
        problems += [
            f"{name!r} is not finite in {dtype}"
            for name, own in found.items()
            if not own.to(dtype).isfinite().all()
        ]
    if problems:
        raise ValueError(f"init must hold the blocks of the plan: {some(problems, 20)}")
    blocks = {name: own.to(dtype) for name, own in {**made, **found}.items()}
    return blocks | opposite_terms(layout, blocks) if opposite else blocks


def _tensors(init: Any) -> dict[str, Tensor]:
    """Return copies of arrays of any library as tensors on the CPU."""
    if not isinstance(init, Mapping):
        raise TypeError(
            "init must be a mapping of block names to arrays, as the factors that Plan.fit "
            f"returns: got {type(init).__name__}"
        )
    found = {}
    for name, array in init.items():
        check_floating(f"init[{name!r}]", array)
        if isinstance(array, Tensor):
            refuse_empty("init must have memory", {name: array})
            array = whole(array.detach()).cpu().clone(memory_format=torch.contiguous_format)
        else:
            array = backend_of(array).to_numpy(widened(array))
            array = torch.from_numpy(numpy.array(array, order="C"))
        found[name] = array
    return found
