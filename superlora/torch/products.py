"""Products with an update that is not formed, and what they keep for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from superlora.factored import apply_factored, apply_pair, low_rank_pair
from superlora.layout import Layout
from superlora.torch.formed import (
    differentiated_once,
    linearized,
    transforms,
    without_autocast,
)
from superlora.torch.sources import LEFT, RIGHT, again

# Columns from which on a matrix product is fast either way.
_THIN = 32

# Takes inputs and factors and returns the product.
Product = Callable[[Tensor, Sequence[Tensor]], Tensor]


def low_rank(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, left: Tensor, right: Tensor | None
) -> Tensor:
    """Return ``x @ (W₀ + left (I ⊗ right))ᵀ + bias``.

    Parameters
    ----------
    x : torch.Tensor, (..., input width)
        Inputs.
    weight : torch.Tensor, (output width, input width), or None
        The base weight; None for the update alone.
    bias : torch.Tensor, (output width,), or None
        The base bias.
    left : torch.Tensor, (output width, q r)
        As `superlora.factored.low_rank_pair` gives it.
    right : torch.Tensor, (r, g), or None
        Its other factor transposed; None for the identity.

    Returns
    -------
    torch.Tensor, (..., output width)
        Of the inputs' dtype.
    """
    if transforms() or (weight is None and torch.compiler.is_compiling()):
        flat = x.reshape(-1, x.shape[-1])
        other = None if right is None else right.t()
        y: Tensor = apply_pair(left, other, flat).reshape(*x.shape[:-1], left.shape[0])
        return y if weight is None else y + torch.nn.functional.linear(x, weight, bias)
    # Flat, since what a Function returns must be no view to be changed in place afterwards.
    y = LowRankLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias, left, right)  # type: ignore[no-untyped-call]
    return y.reshape(*x.shape[:-1], left.shape[0])


class LayerProduct:
    """A product with one layer's update; holds no factor.

    Parameters
    ----------
    layout : Layout
        What lies where.
    name : str
        The layer.
    way : str
        One of ``layout.ways(name)``.
    blocks : dict of str to torch.Tensor
        What the update is made of, for their names and kind.
    """

    def __init__(self, layout: Layout, name: str, way: str, blocks: dict[str, Tensor]) -> None:
        self.layout, self.name, self.way = layout, name, way
        # The kind of mapping says whether blocks are mapped.
        self.kind, self.names = again(blocks), tuple(blocks)

    def __call__(self, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """Return the product."""
        blocks = self.kind(zip(self.names, factors, strict=True))
        y: Tensor = apply_factored(self.layout, blocks, self.name, x, 1.0, self.way)
        return y

    def pair(self, factors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return what a product of low rank is made of."""
        blocks = self.kind(zip(self.names, factors, strict=True))
        if LEFT in blocks:
            left, right = blocks[LEFT], blocks.get(RIGHT)
            return left.reshape(self.layout.shapes[self.name][0], -1), right
        left, right = low_rank_pair(self.layout, blocks, self.name)
        return left, None if right is None else right.t().contiguous()


class LowRankLinear(torch.autograd.Function):
    """The layer and its update in as few passes over inputs and outputs as can be.

    Kept are the inputs, the factors and the inputs' product with the last of them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        left: Tensor,
        right: Tensor | None,
    ) -> Tensor:
        """Return the layer's output."""
        reduced = _reduced(x, left, right)
        if weight is None:
            y = reduced @ left.t()
        else:
            y = torch.nn.functional.linear(x, weight, bias)
            y.addmm_(reduced, left.t())
        ctx.save_for_backward(x, weight, left, right, reduced)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of all arguments, differentiable themselves."""
        x, weight, left, right, reduced = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, wants_left, wants_right = ctx.needs_input_grad
        again = torch.is_grad_enabled()  # a gradient of this gradient may be asked for
        if again:
            reduced = _reduced(x, left, right)
        (of_y,) = gradients
        of_x = of_weight = of_bias = of_left = of_right = None
        of_reduced = of_y @ _columns(left) if wants_x or wants_right else of_y
        if right is not None and (wants_x or wants_right):
            of_reduced = of_reduced.view(-1, right.shape[0])
        if wants_left:
            # Of a thin matrix, the few rows of the transpose are faster to have.
            thin = left.shape[1] < _THIN
            of_left = (reduced.t() @ of_y).t() if thin else of_y.t() @ reduced
        if wants_right:
            of_right = of_reduced.t() @ x.reshape(-1, right.shape[1])
        if wants_x:
            of_x = _of_inputs(of_y, weight, of_reduced, right, again).view(x.shape)
        if wants_weight:
            of_weight = of_y.t() @ x
        if wants_bias:
            of_bias = of_y.sum(0)
        return of_x, of_weight, of_bias, of_left, of_right


def _reduced(flat: Tensor, left: Tensor, right: Tensor | None) -> Tensor:
    if right is not None:
        flat = flat.reshape(-1, right.shape[1]) @ right.t()
    return flat.reshape(-1, left.shape[1])


def _columns(factor: Tensor) -> Tensor:
    """Return a thin matrix with its columns in a row: products with it are twice as fast."""
    return factor.t().contiguous().t() if factor.shape[1] < _THIN else factor


def _of_inputs(
    of_y: Tensor, weight: Tensor | None, of_reduced: Tensor, right: Tensor | None, again: bool
) -> Tensor:
    if weight is None:
        return of_reduced if right is None else of_reduced @ right
    of_x = of_y @ weight
    if right is None:
        return of_x + of_reduced
    blocks = of_x.view(-1, right.shape[1])
    if again:
        return torch.addmm(blocks, of_reduced, right)
    return blocks.addmm_(of_reduced, right)


class Recomputed(torch.autograd.Function):
    """A product that keeps its operands alone and is computed again in the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, product: Product, *factors: Tensor) -> Tensor:
        """Return the product."""
        return product(x, factors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the operands."""
        x, product, *factors = inputs
        ctx.product = product
        ctx.save_for_backward(x, *factors)

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of inputs and factors."""
        wants_x, _, *wants = ctx.needs_input_grad
        with without_autocast(gradient.device):
            _, pull = linearized(
                lambda x, *factors: ctx.product(x, factors), ctx.saved_tensors, (wants_x, *wants)
            )
            found = pull(gradient)
        return found[0], None, *found[1:]
