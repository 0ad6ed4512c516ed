"""Multiply by ``W₀ + ΔW``, formed, dropped, and formed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# Takes the factors and returns ΔW, (output width, input width).
Form = Callable[[Sequence[Tensor]], Tensor]


class FormedLinear(torch.autograd.Function):
    """``x @ (weight + form(factors))ᵀ + bias`` that keeps no formed weight.

    Saved for the backward pass are the inputs alone. There the update is formed
    once more and the weight's gradient is contracted with it at once, so that at
    most one weight's update, and one gradient of that size, lives at any time.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        form: Form,
        *factors: Tensor,
    ) -> Tensor:
        """Return the layer's output.

        Parameters
        ----------
        x : torch.Tensor, (..., input width)
            Inputs.
        weight : torch.Tensor, (output width, input width), or None
            The base weight; None for the update alone.
        bias : torch.Tensor, (output width,), or None
            The base bias.
        form : callable
            Takes the factors and returns the update.
        *factors : torch.Tensor
            The blocks that `form` reads.

        Returns
        -------
        torch.Tensor, (..., output width)
            The output.
        """
        return torch.nn.functional.linear(x, _total(x, weight, form(factors)), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the inputs, and nothing that was formed."""
        x, weight, bias, form, *factors = inputs
        ctx.form = form
        ctx.save_for_backward(x, weight, bias, *factors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of inputs, weight, bias and factors."""
        with without_autocast(gradient.device):
            return _gradients(ctx, gradient)


def autocasts(device: torch.device) -> bool:
    """Return whether automatic mixed precision is on for a kind of device."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context that computes in the operands' own precision."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, *factors = ctx.saved_tensors
    wants_x, wants_weight, wants_bias, _, *wants_factors = ctx.needs_input_grad
    # torch.func.vjp, since torch.compile does not trace torch.autograd.grad.
    delta, pull_back = torch.func.vjp(  # type: ignore[misc]
        lambda *blocks: ctx.form(blocks), *factors
    )
    rows = gradient.reshape(-1, gradient.shape[-1])
    of_x = of_weight = of_bias = None
    of_factors: tuple[Tensor | None, ...] = (None,) * len(factors)
    if wants_x:
        of_x = (gradient @ _total(gradient, weight, delta).to(gradient.dtype)).to(x.dtype)
    if wants_weight or any(wants_factors):
        of_weight = rows.t().to(delta.dtype) @ x.reshape(-1, x.shape[-1]).to(delta.dtype)
    if any(wants_factors):
        of_factors = pull_back(of_weight)
    if wants_bias:
        of_bias = rows.sum(0).to(bias.dtype)
    return of_x, of_weight if wants_weight else None, of_bias, None, *of_factors


def _total(x: Tensor, weight: Tensor | None, delta: Tensor) -> Tensor:
    return delta.to(x.dtype) if weight is None else weight + delta
