"""Put the sums of weights and updates in the weights' places while a module is called."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode

from superlora.torch.autograd import is_traced

Sums = Mapping[str, Tensor]
# Makes sums again, or says that what they are made of was changed.
Remake = Callable[[], Sums]
# Those that take another kernel where functions are watched.
FAST = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
# By thread, in the first pass of a model: whose own forward runs.
INSIDE: dict[int, list[Any]] = {}
# A module has one attribute for all threads.
_PLACING = threading.RLock()


class Placeable(Protocol):
    """What has weights to put in place."""

    module: nn.Module

    def sums(self) -> tuple[Sums, Remake | None]:
        """Return what is to be put in place by the parameter's name, and what can make it again."""


class _Part(NamedTuple):
    """A view of a sum that autograd saves."""

    remake: Remake
    key: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


class _Saved:
    """Makes sums again in the backward pass, where autograd would keep them."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[Remake, str, torch.dtype]] = {}

    def add(self, sums: Sums, remake: Remake) -> None:
        """Note that sums need not be kept."""
        for key, value in sums.items():
            self.known[_memory(value)] = (remake, key, value.dtype)

    def pack(self, tensor: Tensor) -> Tensor | _Part:
        """Return what is kept of a tensor."""
        found = self.known.get(_memory(tensor))
        # A view that reads other numbers than the sum's own is kept.
        if found is None or tensor.is_conj() or tensor.is_neg() or tensor.dtype != found[2]:
            return tensor
        remake, key, _ = found
        return _Part(remake, key, tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(self, held: Tensor | _Part) -> Tensor:
        """Return a tensor that was kept."""
        if isinstance(held, Tensor):
            return held
        with torch.no_grad():
            value = held.remake()[held.key]
        return value.as_strided(held.size, held.stride, held.offset)


def _memory(tensor: Tensor) -> int:
    found: int = tensor.untyped_storage()._cdata
    return found


def call_with(
    owners: Sequence[Placeable], function: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """Call a module's forward while sums stand in the places of its weights."""
    with nullcontext() if torch.compiler.is_compiling() else _PLACING:
        return _call_with(owners, function, args, kwargs)


def _call_with(
    owners: Sequence[Placeable], function: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    placed: list[tuple[nn.Module, Sums]] = []
    flat: list[tuple[nn.Module, Any]] = []
    recomputed = _Saved() if torch.is_grad_enabled() and not is_traced() else None
    try:
        for owner in owners:
            module = owner.module
            held = module.__dict__
            sums, remake = owner.sums()
            if not sums:
                continue
            placed.append((module, sums))
            held.update(sums)
            if recomputed is not None and remake is not None:
                recomputed.add(sums, remake)
            if "_flat_weights" in held and isinstance(module, nn.RNNBase):
                # Recurrent layers read a list of their parameters.
                flat.append((module, held["_flat_weights"]))
                names = module._flat_weights_names
                held["_flat_weights"] = [getattr(module, name) for name in names]
        if recomputed is None or not recomputed.known:
            return function(*args, **kwargs)
        with torch.autograd.graph.saved_tensors_hooks(recomputed.pack, recomputed.unpack):
            return function(*args, **kwargs)
    finally:
        for module, weights in reversed(flat):
            module.__dict__["_flat_weights"] = weights
        for module, sums in placed:
            for key in sums:
                module.__dict__.pop(key, None)


def call_inside(
    owners: Sequence[Any], function: Callable[..., Any], args: Any, kwargs: Any, blind: bool = False
) -> Any:
    """Call a forward in the first pass of a model, watched or blind, that may read weights."""
    inside = INSIDE[threading.get_ident()]
    inside += owners
    mode = _get_current_function_mode() if blind else None
    try:
        if mode is not None:
            mode.__exit__(None, None, None)
        return function(*args, **kwargs)
    finally:
        if mode is not None:
            mode.__enter__()
        del inside[len(inside) - len(owners) :]


def is_noted(owners: Sequence[Any]) -> bool:
    """Return whether a forward need not, or cannot, be noted."""
    inside = INSIDE.get(threading.get_ident())
    return inside is None or all(own in inside for own in owners)
