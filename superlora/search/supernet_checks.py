"""What a model must be to carry a supernet."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from superlora.errors import AdapterError, some
from superlora.torch.adapter import adapters_of
from superlora.torch.layers import computes_plainly, parameter_of


def dtype_of(modules: Mapping[str, nn.Module], dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of a supernet's tensors."""
    if dtype is None:
        dtypes = (parameter_of(module).dtype for module in modules.values())
        return functools.reduce(torch.promote_types, dtypes, torch.float32)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype: got {dtype!r}")
    return dtype


def check_alone(
    model: nn.Module, modules: Mapping[str, nn.Module], supernets: Sequence[str]
) -> None:
    """Refuse models and layers that something else has adapted, and that do not fit."""
    present = [*(adapter.name for adapter in adapters_of(model)), *supernets]
    if present:
        raise AdapterError(
            f"model must have no adapter and no other supernet: detach {some(map(repr, present))} "
            "first"
        )
    for layer, module in modules.items():
        if "forward" in module.__dict__:
            raise AdapterError(
                f"targets must match layers whose forward is their own: that of {layer!r} is "
                "wrapped by another library or adapter"
            )
        if not computes_plainly(module):
            raise ValueError(
                "targets must match layers that compute x Wᵀ + b and nothing else: "
                f"{layer!r} is a {type(module).__name__}"
            )
        if parameter_of(module).is_meta:
            raise AdapterError(
                f"weights must be loaded before a supernet: {layer!r} lies on the meta device"
            )
