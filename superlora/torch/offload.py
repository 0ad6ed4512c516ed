"""Weights that accelerate keeps on the CPU or on disk, and brings back around a layer's forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def device_of(module: nn.Module, weight: Tensor) -> torch.device:
    """Return where a layer computes: of an offloaded weight, where it is brought to."""
    return _executes_on(module) if is_offloaded(module, weight) else weight.device


def is_offloaded(module: nn.Module, weight: Tensor) -> bool:
    """Return whether a weight without memory is brought back when its module is called."""
    return weight.is_meta and any(getattr(hook, "offload", False) for hook in _hooks(module))


def keep_in_memory(adapter: nn.Module) -> None:
    """Take accelerate's hooks off an adapter's modules: nothing calls them, to bring them back."""
    hooked = [
        module
        for module in adapter.modules()
        if any(getattr(hook, "offload", False) for hook in _hooks(module))
    ]
    if not hooked:
        return
    from accelerate.hooks import remove_hook_from_module

    device = _executes_on(hooked[0])
    for module in hooked:
        remove_hook_from_module(module)
    adapter.to(device)


def _hooks(module: nn.Module) -> list[Any]:
    """Return the hooks of accelerate on a module."""
    hook = module.__dict__.get("_hf_hook")
    return list(getattr(hook, "hooks", (hook,)))


def _executes_on(module: nn.Module) -> torch.device:
    found = (getattr(hook, "execution_device", None) for hook in _hooks(module))
    device = next((each for each in found if each is not None), "cpu")
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
