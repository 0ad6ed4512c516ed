"""Put the sums of weights and updates in the weights' places while a module is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from superlora.torch.autograd import is_traced


class Placeable(Protocol):
    """What has weights to put in place."""

    module: nn.Module

    def sums(self) -> Mapping[str, Tensor]:
        """Return what is to be put in place by the parameter's name; empty for nothing."""

    def versions(self) -> Sequence[int]:
        """Return numbers that differ once what the sums are made of is changed."""


class _Part(NamedTuple):
    """A view of a sum that autograd saves."""

    owner: Placeable
    key: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt
    versions: Sequence[int]


class _Saved:
    """Makes sums again in the backward pass, where autograd would keep them."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[Placeable, str, Sequence[int]]] = {}

    def add(self, owner: Placeable, sums: Mapping[str, Tensor]) -> None:
        """Note that sums need not be kept."""
        versions = owner.versions()
        for key, value in sums.items():
            self.known[_memory(value)] = (owner, key, versions)

    def pack(self, tensor: Tensor) -> Tensor | _Part:
        """Return what is kept of a tensor."""
        found = self.known.get(_memory(tensor))
        if found is None:
            return tensor
        owner, key, versions = found
        offset = tensor.storage_offset()
        return _Part(owner, key, tensor.size(), tensor.stride(), offset, versions)

    def unpack(self, held: Tensor | _Part) -> Tensor:
        """Return a tensor that was kept."""
        if isinstance(held, Tensor):
            return held
        if held.owner.versions() != held.versions:
            raise RuntimeError(
                "a factor or a weight must not be changed in place between a forward pass and its "
                "backward pass"
            )
        with torch.no_grad():
            value = held.owner.sums()[held.key]
        return value.as_strided(held.size, held.stride, held.offset)


def _memory(tensor: Tensor) -> int:
    found: int = tensor.untyped_storage()._cdata
    return found


def call_with(
    owners: Sequence[Placeable], function: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """Call a module's forward while sums stand in the places of its weights."""
    placed: list[tuple[nn.Module, Mapping[str, Tensor]]] = []
    flat: list[tuple[nn.Module, Any]] = []
    recomputed = _Saved() if torch.is_grad_enabled() and not is_traced() else None
    try:
        for owner in owners:
            module = owner.module
            held = module.__dict__
            sums = owner.sums()
            if not sums:
                continue
            placed.append((module, sums))
            held.update(sums)
            if recomputed is not None:
                recomputed.add(owner, sums)
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
                del module.__dict__[key]
