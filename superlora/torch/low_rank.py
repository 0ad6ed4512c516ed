"""Updates of convolutions and embeddings that are a product of two matrices, applied unformed."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from superlora.design.layout import Layout, kept
from superlora.torch.autograd import autocasts, is_traced, without_autocast
from superlora.torch.layers import CONVOLUTIONS
from superlora.torch.support import Support

_CONVOLVE = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


@kept
def low_rank(layout: Layout, name: str) -> int:
    """Return the rank of an update that is a product of two factors; 0 where it is none."""
    pieces = layout.grouping.pieces[name]
    return _rank(layout, pieces[0].group, layout.shapes[name]) if len(pieces) == 1 else 0


@kept
def stack_rank(layout: Layout, name: str) -> int:
    """Return the rank of the products that each matrix of a stack is; 0 where they are none."""
    pieces = layout.grouping.pieces[name]
    axes = layout.axes[name]
    if len(pieces) != axes.matrices or axes.window:
        return 0
    ranks = {_rank(layout, piece.group, (axes.out, axes.in_)) for piece in pieces}
    return ranks.pop() if len(ranks) == 1 else 0


def _rank(layout: Layout, group: int, shape: tuple[int, int]) -> int:
    own, item = layout.specs[group], layout.groups[group]
    if item.fold != shape or own.splits > 1 or own.orders != (2,) or not layout.in_place(group):
        return 0
    if layout.maps[group].joint or not layout.maps[group].is_identity:
        return 0
    ranks = []
    for (split,) in layout.terms(group):
        shapes = split.block_shapes
        if {"factor0", "factor1"} - set(shapes) or len(shapes.get("core", (1, 1))) != 2:
            return 0
        ranks.append(min(shapes["factor0"][1], shapes["factor1"][1]))
    return sum(ranks)


def stacked_factors(support: Support) -> tuple[Tensor, Tensor]:
    """Return the factors of all matrices of a stack, (stack, out, rank) and (stack, rank, in)."""
    layout = support.blocks.plan.layout
    names = _plain_names(layout, support.name)
    if names:
        # At once: a layer may have hundreds of experts.
        tensors, make = support.blocks.inputs_of(names)
        made = make(tensors)
        count = len(made) // 2
        left, right = torch.stack(made[:count]), torch.stack(made[count:])
    else:
        pieces = layout.grouping.pieces[support.name]
        every = [factors(support, piece.group, scaled=False) for piece in pieces]
        left = torch.stack([own for own, _ in every])
        right = torch.stack([other.t() for _, other in every])
    if support.scale.value != 1 or torch.compiler.is_compiling():
        left = left * _number(support)
    return left, right.mT


@kept
def _plain_names(layout: Layout, name: str) -> tuple[str, ...]:
    """Return the left factors of a stack and then the right ones, where there is nothing else."""
    groups = [piece.group for piece in layout.grouping.pieces[name]]
    shapes = [split.block_shapes for group in groups for (split,) in layout.terms(group)]
    names = [layout.block(g, 0, leaf) for leaf in ("factor0", "factor1") for g in groups]
    alone = len(shapes) == len(groups) and all(len(each) == 2 for each in shapes)
    own = [each[leaf] for leaf in ("factor0", "factor1") for each in shapes if alone]
    whole = alone and own == [layout.block_shapes[each] for each in names]
    return tuple(names) if whole else ()


def _number(support: Support) -> Tensor | float:
    return support.scale.number if torch.compiler.is_compiling() else support.scale.value


def factors(
    support: Support, group: int | None = None, scaled: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the two matrices, (output, rank) and (rank, input), the scale multiplied in."""
    blocks, layout = support.blocks, support.blocks.plan.layout
    if group is None:
        group = layout.grouping.pieces[support.name][0].group
    left, right = [], []
    for index, (split,) in enumerate(layout.terms(group)):
        shapes = split.block_shapes
        names = [layout.block(group, index, leaf) for leaf in shapes]
        tensors, make = blocks.inputs_of(names)
        found = {
            leaf: made[tuple(map(slice, shapes[leaf]))]
            for leaf, made in zip(shapes, make(tensors), strict=True)
        }
        one = found["factor0"]
        left.append(one @ found["core"] if "core" in found else one)
        right.append(found["factor1"].t())
    both = torch.cat(left, 1) if len(left) > 1 else left[0]
    other = torch.cat(right) if len(right) > 1 else right[0]
    if not scaled or (support.scale.value == 1 and not torch.compiler.is_compiling()):
        return both, other
    return both * _number(support), other


def pays(module: nn.Module, x: Tensor, shape: tuple[int, int], rank: int) -> bool:
    """Return whether two thin products cost less than to form the update and its gradient."""
    rows, columns = shape
    if is_traced():  # no compiler is to see a size compared
        return True
    if isinstance(module, nn.Embedding):
        return x.numel() < rows
    assert isinstance(module, CONVOLUTIONS)
    tokens = x.numel() // (module.in_channels or 1) // math.prod(module.stride)
    thin = tokens * rank * (columns * module.groups + rows)
    formed = rows * columns * rank
    if torch.is_grad_enabled():  # the weight's gradient is one more product with all inputs
        return 3 * thin < 3 * formed + tokens * rows * columns
    return thin < formed


def low_rank_output(
    module: nn.Module, x: Tensor, support: Support, y: Tensor | None = None
) -> Tensor:
    """Return the update's part of the output of a convolution or an embedding, added to `y`."""
    device = x.device
    if y is not None and isinstance(module, nn.Embedding):
        return y + low_rank_output(module, x, support).to(y.dtype)
    if support.rows is not None:  # of an embedding
        start, stop = support.rows
        with without_autocast(device):
            formed = support.form(device)
        own = functional.embedding((x - start).clamp(0, stop - start - 1), formed)
        return own * ((x >= start) & (x < stop)).unsqueeze(-1).to(own.dtype)
    with without_autocast(device):
        left, right = (each.to(device) for each in factors(support))
    if isinstance(module, nn.Embedding):
        rows = functional.embedding(x, left, module.padding_idx)
        return rows @ right
    assert isinstance(module, CONVOLUTIONS)
    window = module.kernel_size
    if not autocasts(device):
        x = x.to(right.dtype)
    # A transposed factor would be packed anew inside the convolution, which takes longer.
    first = right.contiguous().view(right.shape[0], module.in_channels // module.groups, *window)
    if module.groups > 1:
        first = first.repeat(module.groups, *(1,) * (1 + len(window)))
    # Its own, so that padding of every mode is the layer's.
    thin: Tensor = module._conv_forward(x, first, None)
    fused = y is not None and y.dtype == thin.dtype == left.dtype and y.is_contiguous()
    if y is not None and fused and module.groups == 1 and thin.dim() == len(window) + 2:
        # In the same pass as the sum with the base's output.
        every = left.expand(thin.shape[0], *left.shape)
        return torch.baddbmm(y.flatten(2), every, thin.flatten(2)).view_as(y)
    last = left.reshape(*left.shape, *(1,) * len(window))
    found = _CONVOLVE[len(window)](thin, last, groups=module.groups)
    return found if y is None else y + found.to(y.dtype)


def applies(module: nn.Module) -> bool:
    """Return whether an update of a layer of this class can be applied unformed."""
    kind = type(module)
    convolves = "_conv_forward" not in module.__dict__ and any(
        kind.forward is own.forward and getattr(kind, "_conv_forward", None) is own._conv_forward
        for own in CONVOLUTIONS
        if isinstance(module, own)
    )
    return convolves or (
        type(module).forward is nn.Embedding.forward and getattr(module, "max_norm", 0) is None
    )
