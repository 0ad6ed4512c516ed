"""Combine adapters of one model: one adapter whose update is a weighted sum of theirs."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from superlora.design.layout import Layout
from superlora.design.spec import Spec
from superlora.design.splits import Split
from superlora.design.supports import ADD
from superlora.errors import AdapterError, some
from superlora.plan import Plan
from superlora.torch.adapter import Adapter
from superlora.torch.attach import check_free, checked_model, host_of, register, spec_of
from superlora.torch.dropout import Dropout
from superlora.torch.replaced import Replaced

# What may differ between the specs of adapters that are combined.
_FREE = {"rank", "terms", "alpha", "rslora", "scale", "overrides", "dense_from"}


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    name: str = "superlora",
) -> Adapter:
    """Put one adapter in the place of several, whose update is the weighted sum of theirs.

    Parameters
    ----------
    adapters : sequence of Adapter
        Attached to one model, unmerged, of the same weights, and of specs that differ in ranks,
        terms and scales alone.
    weights : sequence of float, optional
        One factor an adapter; by default 1 each.
    name : str
        The attribute of the model under which the new adapter is registered.

    Returns
    -------
    Adapter
        With ``ΔW = Σ wᵢ ΔWᵢ``, exact but for rounding, and scale 1. Ranks are concatenated where
        the product has one split, else the products are summed as terms; where frozen blocks are
        the same and one block alone is trained, this is the sum of those. The adapters are
        detached.

    Raises
    ------
    AdapterError
        If an adapter is not attached, is merged or disabled, or is on another model; or two bring
        parameters of the model, such as heads, of which no sum is right.
    TypeError
        If `adapters` are none, or `weights` no numbers.
    ValueError
        If the sum has no exact form, with the reason; nothing is changed then.

    Examples
    --------
    >>> import torch, superlora as sl, superlora.torch as slt
    >>> model = torch.nn.Linear(8, 8)
    >>> both = [slt.attach(model, sl.lora(rank=2), name=name) for name in ("a", "b")]
    >>> combined = slt.combine(both, weights=[0.7, 0.3])
    >>> combined.plan.factor_shapes["0.0.factor0"]
    (8, 4)
    """
    numbers = _checked(adapters, weights)
    first = adapters[0]
    model, selection = checked_model(first.model), first._selection
    replaced = [own for own in adapters if own.replaced is not None]
    scale = 1.0
    if len(adapters) == 1:  # to the last bit
        plan, scale = first.plan, first.scale * numbers[0]
        blocks = {block: own.detach().clone() for block, own in first.blocks.items()}
    else:
        plan, blocks = _sum_of(adapters, numbers)
    brought = replaced[0].replaced if replaced else None
    values = {} if brought is None else dict(brought.tensors())
    shared = {} if brought is None else brought.shared
    if name not in [own.name for own in adapters]:
        check_free(model, host_of(model, selection.weights), name)
    dtype = functools.reduce(torch.promote_types, [own.dtype for own in adapters])
    made = Adapter(plan, {block: own.to(dtype) for block, own in blocks.items()}, name)
    if not all(bool(own.isfinite().all()) for own in blocks.values()):
        raise ValueError("weights must leave the factors finite: their sum is not")
    made.scale = scale
    dropouts = [own.dropout.values for own in adapters]
    if all(own == dropouts[0] for own in dropouts):
        made.dropout = Dropout(dropouts[0])
    alone = any(own.alone_in_checkpoints for own in adapters)
    for own in adapters:
        own.detach()
    pending = Replaced(model, values, shared) if values else None
    register(model, made, selection, pending)
    if alone:
        made.alone_in_checkpoints = True
    return made


def _checked(adapters: Sequence[Adapter], weights: Sequence[float] | None) -> list[float]:
    """Return the weights, or refuse adapters that cannot be summed."""
    if not isinstance(adapters, Sequence) or not adapters:
        raise TypeError(f"adapters must be a list of at least one: got {adapters!r}")
    for own in adapters:
        if not isinstance(own, Adapter):
            raise TypeError(f"adapters must be superlora.torch.Adapter: got {type(own).__name__}")
        own._check_attached("combined")
        if not own.active:
            raise AdapterError(f"adapter {own.name!r} must be unmerged and in use to be combined")
        own._check_unchanged("combined")
    if len(set(adapters)) < len(adapters):
        raise ValueError("adapters must be different ones: got one twice")
    if len({id(own.model) for own in adapters}) > 1:
        raise AdapterError("adapters must be on one model to be combined: load them on it first")
    numbers = [1.0] * len(adapters) if weights is None else list(weights)
    if len(numbers) != len(adapters):
        raise ValueError(
            f"weights must be as many as adapters, {len(adapters)}: got {len(numbers)}"
        )
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"weights must be numbers: got {number!r}")
        if not math.isfinite(number):
            raise ValueError(f"weights must be finite: got {number!r}")
    with_parameters = [repr(own.name) for own in adapters if own.replaced is not None]
    if len(with_parameters) > 1:
        raise AdapterError(
            "one adapter at most must bring parameters of the model, such as a head, of which no "
            f"sum is right: got {some(with_parameters)}"
        )
    return numbers


def _sum_of(
    adapters: Sequence[Adapter], weights: Sequence[float]
) -> tuple[Plan, dict[str, Tensor]]:
    """Return the plan and the blocks of a weighted sum of adapters of the same weights."""
    layouts = [own.plan.layout for own in adapters]
    first = layouts[0]
    operations = {each for layout in layouts for own in layout.supports.values() for each in own}
    if operations != {ADD} or not all(isinstance(own.plan.spec, Spec) for own in adapters):
        raise ValueError(
            f"adapters must have no other operation than {ADD!r} to be combined: got "
            f"{sorted(operations)}; merge them one after the other instead"
        )
    for own in adapters[1:]:
        alike = own.plan.layout.layer_axes == first.layer_axes
        if not alike or list(own.plan.layout.layer_axes) != list(first.layer_axes):
            raise ValueError(
                f"adapters must be of the same weights to be combined: {own.name!r} has others "
                f"than {adapters[0].name!r}; merge them one after the other instead"
            )
        if own._selection.beside != adapters[0]._selection.beside:
            raise ValueError("adapters must be of the same rows and shared weights to be combined")
    problems = []
    for form in (_same_frozen, _concatenated, _summed):
        try:
            return form(adapters, weights)
        except _NoFormError as error:
            problems.append(str(error))
    reasons = "; ".join(dict.fromkeys(problems))
    raise ValueError(
        f"adapters must have a sum of their own form to be combined: {reasons}; merge "
        "them one after the other instead"
    )


class _NoFormError(Exception):
    """Why a sum cannot be written in one of the forms."""


def _plan(
    adapters: Sequence[Adapter], ranks: Callable[[list[Any]], Any], *, terms: bool, frozen: bool
) -> Plan:
    """Return a plan of scale 1 of the same weights, with ranks made of the adapters' ones."""
    designs: dict[str, Spec | None] = {}
    for name in adapters[0].plan.layout.layer_axes:
        found = [own.plan.spec.of(name) for own in adapters]  # type: ignore[union-attr]
        specs = [own for own in found if own is not None]
        if not specs:
            designs[name] = None
            continue
        if len(specs) < len(found):
            raise _NoFormError(f"some leave out {name!r}")
        one = specs[0]
        if any(own.frozen_terms for own in specs):
            raise _NoFormError(f"some of their terms are fixed at {name!r}")
        for field in dataclasses.fields(Spec):
            values = [getattr(own, field.name) for own in specs]
            if field.name not in _FREE and any(each != values[0] for each in values):
                raise _NoFormError(f"their {field.name} differs at {name!r}")
        changes: dict[str, Any] = {
            "rank": _ranks([own.rank for own in specs], ranks),
            "terms": sum(own.terms for own in specs) if terms else one.terms,
            "alpha": None,
            "rslora": False,
            "scale": 1.0,
            # Rules from which rank a matrix is dense differ where files come from elsewhere. What
            # is factored stays so; whether all of them are, the forms check.
            "dense_from": one.dense_from if len({s.dense_from for s in specs}) == 1 else "never",
        }
        if frozen:  # another term draws others
            kept = {block: own if own == "ones" else "stored" for block, own in one.frozen}
            changes["frozen"] = kept
        try:
            designs[name] = one.replace(**changes)
        except (TypeError, ValueError) as error:
            raise _NoFormError(str(error)) from None
    try:
        plan = Plan(spec_of(designs), adapters[0].plan.layout.layer_axes)
    except ValueError as error:
        raise _NoFormError(str(error)) from None
    if plan.layout.inner:
        raise _NoFormError("their blocks are maps of a vector")
    for own in adapters:
        if own.plan.layout.grouping.members != plan.layout.grouping.members:
            raise _NoFormError("their groups differ")
    return plan


def _ranks(ranks: list[Any], make: Callable[[list[Any]], Any]) -> Any:
    if all(isinstance(own, int) for own in ranks):
        return make(ranks)
    if all(isinstance(own, tuple) for own in ranks) and len({len(own) for own in ranks}) == 1:
        return tuple(_ranks(list(own), make) for own in zip(*ranks, strict=True))
    if any(own != ranks[0] for own in ranks):
        raise _NoFormError(f"their ranks are of different kinds, {ranks}")
    return ranks[0]


def _same_frozen(
    adapters: Sequence[Adapter], weights: Sequence[float]
) -> tuple[Plan, dict[str, Tensor]]:
    """Sum the one trained block of each product, where all else is frozen and the same."""
    first = adapters[0].plan.layout
    alone = all(
        len([block for block in blocks if block not in first.frozen]) == 1
        for group in range(len(first.groups))
        for blocks in first.term_blocks(group)
    )
    if not alone:
        raise _NoFormError("more than one block of a product is trained")
    plan = _plan(adapters, max, terms=False, frozen=False)
    for own in adapters:
        if own.plan.layout.input_shapes != plan.layout.input_shapes:
            raise _NoFormError("their blocks differ in shape")
        for block in plan.layout.frozen:
            if not torch.equal(own.blocks[block], adapters[0].blocks[block]):
                raise _NoFormError(f"their frozen block {block!r} differs")
    found = {block: adapters[0].blocks[block].detach().clone() for block in plan.layout.frozen}
    for own, weight in zip(adapters, weights, strict=True):
        for block, value in _weighted(own, weight).items():
            if block not in plan.layout.frozen:
                found[block] = found[block] + value if block in found else value
    return plan, found


def _concatenated(
    adapters: Sequence[Adapter], weights: Sequence[float]
) -> tuple[Plan, dict[str, Tensor]]:
    """Put ranks side by side: the cores are blocks of one core, along all modes with a factor."""
    plan = _plan(adapters, sum, terms=False, frozen=False)
    layout = plan.layout
    if layout.frozen:
        raise _NoFormError("some of their blocks are frozen")
    if any(own.splits > 1 or own.terms > 1 for each in adapters for own in each.plan.layout.specs):
        raise _NoFormError("their products have several splits")
    axes: dict[str, tuple[bool, ...]] = {}
    for group, item in enumerate(layout.groups):
        for leaf in item.splits[0].block_shapes:
            axes[layout.block(group, 0, leaf)] = _rank_axes(item.splits[0], leaf)
    found: dict[str, Tensor] = {}
    starts = {name: [0] * len(ranked) for name, ranked in axes.items()}
    for own, weight in zip(adapters, weights, strict=True):
        blocks = _weighted(own, weight)
        if blocks.keys() != axes.keys():
            raise _NoFormError("the sum of their ranks makes a factor dense")
        for name, ranked in axes.items():
            value, start = blocks[name], starts[name]
            whole = found.setdefault(name, value.new_zeros(layout.block_shapes[name]))
            stops = list(map(operator.add, start, value.shape))
            if any(map(operator.gt, stops, whole.shape)):
                raise _NoFormError("the sum of their ranks is more than a factor can have")
            whole[tuple(map(slice, start, stops))] += value
            starts[name] = [
                stop if is_rank else 0 for stop, is_rank in zip(stops, ranked, strict=True)
            ]
    for name, ranked in axes.items():
        ends = zip(starts[name], found[name].shape, ranked, strict=True)
        if any(is_rank and end != size for end, size, is_rank in ends):
            raise _NoFormError("the sum of their ranks is not that of the whole")
    return plan, found


def _summed(
    adapters: Sequence[Adapter], weights: Sequence[float]
) -> tuple[Plan, dict[str, Tensor]]:
    """Sum the products as terms; smaller ranks are filled with zeros."""
    plan = _plan(adapters, max, terms=True, frozen=True)
    layout = plan.layout
    found: dict[str, Tensor] = {}
    for group in range(len(layout.groups)):
        start = 0
        for own, weight in zip(adapters, weights, strict=True):
            theirs = own.plan.layout
            blocks = _weighted(own, weight)
            for index, split in enumerate(theirs.groups[group].splits):
                for leaf in split.block_shapes:
                    name = layout.block(group, start + index, leaf)
                    value = blocks[theirs.block(group, index, leaf)]
                    shape = layout.block_shapes.get(name)
                    ranked = _rank_axes(split, leaf)
                    if (
                        shape is None
                        or len(shape) != value.dim()
                        or any(
                            size > whole or (size < whole and not is_rank)
                            for size, whole, is_rank in zip(value.shape, shape, ranked, strict=True)
                        )
                    ):
                        raise _NoFormError("a smaller rank cannot be filled with zeros")
                    filled = value.new_zeros(shape)
                    filled[tuple(map(slice, value.shape))] = value
                    if name in found and not torch.equal(found[name], filled):
                        raise _NoFormError("what their groups share differs")
                    found[name] = filled
            start += len(theirs.groups[group].splits)
    return plan, found


def _rank_axes(split: Split, leaf: str) -> tuple[bool, ...]:
    """Return which axes of a block are ranks, over which the product sums."""
    if split.core == "train":
        mode = int(leaf.removeprefix("core"))
        return (mode > 0, False, mode < len(split.sizes) - 1)
    if leaf != "core":
        return (False, True)
    return split.factored if split.core == "full" else (True,)


def _weighted(adapter: Adapter, weight: float) -> dict[str, Tensor]:
    """Return an adapter's blocks, with weight and scale multiplied into one of each product."""
    layout = adapter.plan.layout
    found = {name: block.detach() for name, block in adapter.blocks.items()}
    taken: dict[str, float] = {}
    for group, members in enumerate(layout.grouping.members):
        number = weight * adapter.blocks.scales[members[0]].value
        for blocks in layout.term_blocks(group):
            trained = [block for block in blocks if block not in layout.frozen]
            own = [block for block in trained if block not in _tied(layout, group)]
            block = (own or trained)[0]
            if block in taken and taken[block] != number:
                raise _NoFormError("they have several scales for what groups share")
            if block not in taken:
                taken[block] = number
                found[block] = found[block] * number
    return found


def _tied(layout: Layout, group: int) -> set[str]:
    """Return the blocks of a group that others have too."""
    own = layout.specs[group]
    tied = set()
    for index, split in enumerate(layout.groups[group].splits):
        for leaf in split.block_shapes:
            if f"{index % own.splits}.{leaf}" in own.tied:
                tied.add(layout.block(group, index, leaf))
    return tied
