"""The Walsh–Hadamard transform of torch tensors: its derivative, and what runs it.

The only file of the array layer that imports torch; it is imported when the first torch
tensor comes in.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils import _python_dispatch

from superlora._backend import Array, zeros

# Takes a tensor, a scale and the blocks of a size; the plain form of the transform.
Pure = Callable[[Array, float, Callable[[int], Array]], Array]

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_NATIVE = {torch.float32: "float32", torch.float64: "float64"}
_blocks: dict[Any, torch.Tensor] = {}
zeros((), torch.float32)  # loads TensorLy's backend, see `walsh_hadamard`
_current_mode: Any = _python_dispatch._get_current_dispatch_mode

_LEAST_ADVISED = 1 << 22  # bytes: numpy's own choice for its arrays
_HUGEPAGE = getattr(mmap, "MADV_HUGEPAGE", 0)
_madvise: Any = getattr(ctypes.CDLL(None), "madvise", None) if _HUGEPAGE else None
if _madvise is not None:
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def transform(x: torch.Tensor, scale: float, pure: Pure, native: Any) -> Any:
    """Return ``scale H x`` along the last axis.

    Parameters
    ----------
    x : torch.Tensor, (..., n)
        Of single or double precision; n a power of two.
    scale : float
        Multiplies the result.
    pure : callable
        The transform by plain operations: ``pure(x, scale, block)``.
    native : callable
        ``native(source, target, count, size, type name, threads, scale)`` writes the
        transform of memory and says whether it did.

    Returns
    -------
    torch.Tensor, (..., n)
        A new tensor.
    """
    # A compiler, a tracer or a subclass has its own way with plain operations.
    if (
        torch.compiler.is_compiling()
        or type(x) not in _PLAIN
        or torch._C._get_tracing_state() is not None
    ):
        return pure(x, scale, lambda size: _make_block(size, x))
    if _is_differentiated(x):
        return _apply(x, scale, pure, native)
    return _compute(x, scale, pure, native)


def _is_differentiated(x: torch.Tensor) -> bool:
    """Return whether anything but the values of `x` may be asked for."""
    return (
        (x.requires_grad and torch.is_grad_enabled())
        or getattr(forward_ad, "_current_level", 0) >= 0
        or torch._C._are_functorch_transforms_active()
    )


def _compute(x: torch.Tensor, scale: float, pure: Pure, native: Any) -> Any:
    if type(x) not in _PLAIN or _current_mode() is not None:
        return pure(x, scale, lambda size: _make_block(size, x))
    name = _NATIVE.get(x.dtype)
    if name is not None and x.is_cpu and x.layout is torch.strided and not x._is_zerotensor():
        found = _run_native(x, scale, name, native)
        if found is not None:
            return found
    return pure(x, scale, lambda size: _block(size, x))


def _run_native(x: torch.Tensor, scale: float, name: str, native: Any) -> torch.Tensor | None:
    values = x.detach()
    if values.is_neg():
        values = values.resolve_neg()
    values = values.contiguous()
    own = values.data_ptr() != x.data_ptr()
    # A copy that was just made is overwritten.
    target = values if own else torch.empty_like(values)
    if not own and values.nbytes >= _LEAST_ADVISED:
        _advise_huge_pages(target.data_ptr(), values.nbytes)
    done = native(
        values.data_ptr(),
        target.data_ptr(),
        values.numel(),
        values.shape[-1],
        name,
        torch.get_num_threads(),
        scale,
    )
    return target if done else None


def _advise_huge_pages(address: int, size: int) -> None:
    """Ask for large pages for new memory: touching small ones costs more than a transform."""
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    if _madvise is not None:  # a refusal is no error
        _madvise(start, (address + size - start) // mmap.PAGESIZE * mmap.PAGESIZE, _HUGEPAGE)


class _Transform(torch.autograd.Function):
    """``scale H x``: linear and symmetric, so that every derivative is a transform again."""

    @staticmethod
    def forward(x: torch.Tensor, scale: float, pure: Pure, native: Any) -> Any:
        return _compute(x, scale, pure, native)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.rest = inputs[1:]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _apply(grads[0], *ctx.rest), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _apply(tangents[0], *ctx.rest)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        x: torch.Tensor,
        scale: float,
        pure: Pure,
        native: Any,
    ) -> tuple[torch.Tensor, int]:
        return _apply(x.movedim(in_dims[0], 0), scale, pure, native), 0


_apply: Any = _Transform.apply


def _make_block(size: int, like: torch.Tensor) -> torch.Tensor:
    """Return the Hadamard matrix of `size` by operations that can be traced."""
    block = torch.ones((1, 1), dtype=like.dtype, device=like.device)
    while block.shape[0] < size:
        pair = torch.cat((block, block)), torch.cat((block, -block))
        block = torch.cat(pair, dim=1)
    return block


def _block(size: int, like: torch.Tensor) -> torch.Tensor:
    key = size, like.dtype, like.device
    block = _blocks.get(key)
    if block is None:
        with torch.inference_mode(False), torch.no_grad():
            block = _blocks[key] = _make_block(size, like)
    return block
