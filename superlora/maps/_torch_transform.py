"""The Walsh–Hadamard transform of torch tensors: its derivative, and what runs it.

The only file of the array layer that imports torch; it is imported when the first torch
tensor comes in.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from superlora._backend import zeros

_PLAIN = (torch.Tensor, torch.nn.Parameter)
zeros((), torch.float32)  # loads TensorLy's backend, see `walsh_hadamard`


def transform(x: torch.Tensor, products: Any, compiled: Any) -> Any:
    """Return ``scale H x`` along the last axis."""
    # Compilers, tracers, function transforms and subclasses have their way with plain operations.
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    mapped = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if traced or mapped or _get_current_dispatch_mode() is not None or type(x) not in _PLAIN:
        return products(x, lambda size: _block(size, x.dtype, x.device))
    if x.requires_grad and torch.is_grad_enabled():
        return _Transform.apply(x, products, compiled)  # type: ignore[no-untyped-call]
    if x.is_cpu and x.layout is torch.strided and not x._is_zerotensor():
        found = compiled(x.numpy(force=True), torch.get_num_threads())
        if found is not None:
            return torch.from_numpy(found)
    return products(x, lambda size: _kept(size, x.dtype, x.device))


class _Transform(torch.autograd.Function):
    """``scale H x``: linear and symmetric, so that every derivative is a transform again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *rest: Any) -> Any:
        ctx.rest = rest
        return transform(x, *rest)  # gradients are off here

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return transform(grads[0], *ctx.rest), None, None


def _block(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the Hadamard matrix by operations that can be traced, none larger than itself."""
    block = torch.ones((1, 1), dtype=dtype, device=device)
    while block.shape[0] < size:
        block = torch.cat((torch.cat((block, block)), torch.cat((block, -block))), dim=1)
    return block


_kept = cache(_block)
