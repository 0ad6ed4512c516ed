"""What several files need of torch's differentiation: which kind is at work, and recomputation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Takes the gradient of a value and returns those of what it was made from.
Pull = Callable[[Tensor], list[Tensor | None]]


def autocasts(device: torch.device) -> bool:
    """Return whether automatic mixed precision is on for a kind of device."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context that computes in the operands' own precision."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def is_traced() -> bool:
    """Return whether a compiler, a tracer, torch.func or forward mode sees each operation."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or getattr(forward_ad, "_current_level", -1) >= 0
    )


def linearized(
    function: Callable[..., Tensor], operands: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Tensor, Pull]:
    """Compute a function, and what takes gradients back through it."""
    with torch.enable_grad():
        own = [
            operand.detach().requires_grad_(want)
            for operand, want in zip(operands, wanted, strict=True)
        ]
        value = function(*own)
    return value.detach(), lambda gradient: gradients(value, own, gradient)


def gradients(
    value: Tensor, operands: Sequence[Tensor | None], gradient: Tensor, *, again: bool = False
) -> list[Tensor | None]:
    """Return the gradients of a value's operands, None for those that require none."""
    asked = [each for each in operands if each is not None and each.requires_grad]
    if not asked or not value.requires_grad:
        return [None] * len(operands)
    found = iter(torch.autograd.grad(value, asked, gradient, allow_unused=True, create_graph=again))
    return [next(found) if each is not None and each.requires_grad else None for each in operands]


def aliases(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors that are the given ones to autograd, but not what these were made of."""
    # Inputs may depend on a factor that layers before have too: its gradient is to leave that out.
    return [tensor.view_as(tensor) for tensor in tensors]


class Made(torch.autograd.Function):
    """A value that is made of factors, and made again in the backward pass.

    Nothing goes through the hooks of saved tensors: layers that are checkpointed one by one may
    share a value that one of them made.
    """

    @staticmethod
    def forward(ctx: Any, make: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Return the value."""
        ctx.make, ctx.tensors = make, tensors
        ctx.versions = _versions(tensors)
        found = make(*tensors)
        # A value that is a factor's own memory would be differentiated as that factor.
        return found.view_as(found) if any(found is tensor for tensor in tensors) else found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients."""
        if _versions(ctx.tensors) != ctx.versions:
            raise RuntimeError(
                "a factor was changed in place between the forward and the backward pass"
            )
        again = torch.is_grad_enabled()
        with torch.enable_grad(), without_autocast(gradient.device):
            if again:
                own = aliases(ctx.tensors)
            else:
                own = [t.detach().requires_grad_(t.requires_grad) for t in ctx.tensors]
            return None, *gradients(ctx.make(*own), own, gradient, again=again)


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


class Linear(torch.autograd.Function):
    """A fixed linear map, by it and by its adjoint; differentiable any number of times."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, move: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the value."""
        ctx.move, ctx.back = move, back
        return move(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients."""
        with without_autocast(gradient.device):
            return Linear.apply(gradient, ctx.back, ctx.move), None, None  # type: ignore[no-untyped-call]


class Parts(torch.autograd.Function):
    """Ranges of a tensor's first axis, whose gradients are added up once all of them are known."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, *ranges: tuple[int, int]) -> tuple[Tensor, ...]:
        """Return the parts."""
        ctx.shape, ctx.ranges = whole.shape, ranges
        ctx.set_materialize_grads(False)
        return tuple(whole[start:stop] for start, stop in ranges)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients."""
        found = None
        for (start, stop), gradient in zip(ctx.ranges, gradients, strict=True):
            if gradient is not None:
                found = gradient.new_zeros(ctx.shape) if found is None else found
                found[start:stop] += gradient
        return found, *[None] * len(ctx.ranges)


def parts(whole: Tensor, ranges: Iterable[tuple[int, int]]) -> tuple[Tensor, ...]:
    """Return ranges of a tensor's first axis, which many layers take their gradients back to."""
    found: tuple[Tensor, ...] = Parts.apply(whole, *ranges)  # type: ignore[no-untyped-call]
    return found


def made(make: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """Return a value that is made again in the backward pass, where there will be one."""
    with without_autocast(tensors[0].device):
        if torch.is_grad_enabled() and not is_traced():
            found: Tensor = Made.apply(make, *tensors)  # type: ignore[no-untyped-call]
            return found
        return make(*tensors)


def moved(x: Tensor, move: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a fixed linear map's value, differentiated by the adjoint where that is seen."""
    with without_autocast(x.device):
        if torch.is_grad_enabled() and not is_traced():
            found: Tensor = Linear.apply(x, move, back)  # type: ignore[no-untyped-call]
            return found
        return move(x)
