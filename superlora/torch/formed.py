"""Multiply by ``W₀ + ΔW``, formed, dropped, and formed again in the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Takes the gradient of a value and returns those of what it was made from.
Pull = Callable[[Tensor], list[Tensor | None]]


def differentiated_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse gradients of a Function's gradients.

    Parameters
    ----------
    backward : callable
        Takes the context and the gradients of the outputs.

    Returns
    -------
    callable
        The same. What it returns depends on all that it read: torch's own ``once_differentiable``
        is passed by where gradients are asked for of some of that alone.
    """
    plain = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def wrapped(ctx: Any, *gradients: Tensor | None) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or transforms():
            return plain(ctx, *gradients)
        with torch.no_grad():
            found = backward(ctx, *gradients)
        read = (*ctx.saved_tensors, *getattr(ctx, "tensors", ()), *gradients)
        tied = [each for each in read if isinstance(each, Tensor) and each.requires_grad]
        if not tied:
            return found
        return tuple(
            None if each is None else _Refused.apply(each, *tied)  # type: ignore[no-untyped-call]
            for each in found
        )

    return wrapped


class _Refused(torch.autograd.Function):
    """A value whose gradient is refused, for all that it was made from."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *tied: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "a gradient of this gradient must not be asked for: an update that is formed, shared by"
            " layers or FourierFT's is differentiated once, but by transforms of torch.func"
        )


def run(function: type[torch.autograd.Function], *operands: Any) -> Tensor:
    """Apply a Function whose `forward` takes no context, or that alone where no gradient is asked.

    Parameters
    ----------
    function : type
        The Function.
    *operands : Any
        What it takes.

    Returns
    -------
    torch.Tensor
        Its output.
    """
    if torch.is_grad_enabled() or (not torch.compiler.is_compiling() and transforms()):
        y: Tensor = function.apply(*operands)
        return y
    # torch.compile traces the Function itself only for its gradient.
    y = function.forward(*operands)
    return y


class Form(Protocol):
    """What forms rows of ΔW from the factors.

    Attributes
    ----------
    rows : int
        How many are best formed at once, so that they stay in the cache; 0 for all of them.
    """

    rows: int

    def __call__(
        self, factors: Sequence[Tensor], rows: tuple[int, int] | None
    ) -> Tensor:  # pragma: no cover
        """Return rows of the update, (rows, input width), all of them for None."""
        ...

    def linearized(
        self, factors: Sequence[Tensor], rows: tuple[int, int] | None, wanted: Sequence[bool]
    ) -> tuple[Tensor, Pull]:  # pragma: no cover
        """Return the same, and what takes its gradient back to the factors."""
        ...


class FormedLinear(torch.autograd.Function):
    """``x @ (weight + form(factors))ᵀ + bias`` that keeps no formed weight.

    Saved for the backward pass are the inputs alone. There the update is formed once more, some
    rows at a time, and the weight's gradient is contracted with it at once, so that only these
    rows of the update, and of the gradient, live at any time.
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
        form : Form
            Takes the factors and returns the update.
        *factors : torch.Tensor
            The blocks that `form` reads.

        Returns
        -------
        torch.Tensor, (..., output width)
            The output.
        """
        if weight is None or not form.rows or _is_traced():
            total = _total(x, weight, form(factors, None))
        else:
            total = torch.empty_like(weight)  # laid out as it is, so that sums round alike
            for rows in _chunks(weight.shape[0], form.rows):
                cut = slice(*rows)
                torch.add(weight[cut], form(factors, rows), out=total[cut])
        return torch.nn.functional.linear(x, total, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the inputs, and nothing that was formed."""
        x, weight, bias, form, *factors = inputs
        ctx.form = form
        ctx.save_for_backward(x, weight, bias, *factors)

    @staticmethod
    @differentiated_once
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


def transforms() -> bool:
    """Return whether a transform of torch.func, or forward differentiation, is at work."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return getattr(forward_ad, "_current_level", -1) >= 0


def linearized(
    function: Callable[..., Tensor], operands: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Tensor, Pull]:
    """Compute a function, and what takes gradients back through it.

    Parameters
    ----------
    function : callable
        Takes the operands.
    operands : sequence of torch.Tensor
        Where.
    wanted : sequence of bool
        Which gradients are asked for; the others are None.

    Returns
    -------
    torch.Tensor
        The function's value.
    callable
        Takes a gradient of that value and returns those of the operands; to be called once.
    """
    if _is_traced():
        # torch.compile does not trace torch.autograd.grad.
        value, back = torch.func.vjp(function, *operands)  # type: ignore[misc]
        return value, lambda gradient: [
            found if want else None for found, want in zip(back(gradient), wanted, strict=True)
        ]
    with torch.enable_grad():
        own = [
            operand.detach().requires_grad_(want)
            for operand, want in zip(operands, wanted, strict=True)
        ]
        value = function(*own)
    asked = [operand for operand in own if operand.requires_grad]

    def pull(gradient: Tensor) -> list[Tensor | None]:
        if not asked or not value.requires_grad:
            return [None] * len(own)
        rest = iter(torch.autograd.grad(value, asked, gradient, allow_unused=True))
        return [next(rest) if want else None for want in wanted]

    return value.detach(), pull


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or transforms()


def _chunks(height: int, rows: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of about as many rows."""
    count = max(1, round(height / rows))
    for index in range(count):
        yield index * height // count, (index + 1) * height // count


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, *factors = ctx.saved_tensors
    wants_x, wants_weight, wants_bias, _, *wanted = ctx.needs_input_grad
    of_y = gradient.reshape(-1, gradient.shape[-1])
    flat = x.reshape(-1, x.shape[-1])
    whole = weight is None or wants_weight or not ctx.form.rows or _is_traced()
    bounds = [None] if whole else _chunks(weight.shape[0], ctx.form.rows)
    of_x = of_weight = None
    of_factors: list[Tensor | None] = [None] * len(factors)
    for rows in bounds:
        delta, pull = ctx.form.linearized(factors, rows, wanted)
        cut = slice(None) if rows is None else slice(*rows)
        part = of_y[:, cut]
        if wants_x:
            total = _total(part, None if weight is None else weight[cut], delta).to(part.dtype)
            of_x = part @ total if of_x is None else of_x.addmm_(part, total)
        if wants_weight or any(wanted):
            of_weight = part.t().to(delta.dtype) @ flat.to(delta.dtype)
        if any(wanted):
            of_factors = list(map(_added, of_factors, pull(of_weight)))
    return (
        None if of_x is None else of_x.to(x.dtype).view(x.shape),
        of_weight if wants_weight else None,
        of_y.sum(0).to(bias.dtype) if wants_bias else None,
        None,
        *of_factors,
    )


def _added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other


def _total(x: Tensor, weight: Tensor | None, delta: Tensor) -> Tensor:
    return delta.to(x.dtype) if weight is None else weight + delta
