"""Blocks without memory, on the meta device: drawn when the weights that they adapt have some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from superlora.frozen import each_frozen
from superlora.init import each_factor
from superlora.plan import Plan
from superlora.torch.adapter import Adapter
from superlora.torch.layers import parameter_of
from superlora.torch.walk import registered


def fill_after_loading(model: nn.Module, *_: Any) -> None:
    """Draw the blocks of a model's adapters that a state dict left without memory.

    Parameters
    ----------
    model : torch.nn.Module
        The model, whose weights ``load_state_dict(..., assign=True)`` may have brought.
    """
    for _path, part in registered(model):
        if isinstance(part, Adapter):
            fill(part)


def fill(adapter: Adapter) -> None:
    """Draw an adapter's blocks that have no memory, where the weights have.

    Parameters
    ----------
    adapter : Adapter
        The adapter. Singular vectors, which the weights decide, come with a state dict.
    """
    layout, blocks = adapter.plan.layout, adapter.factors()
    if not any(block.is_meta for block in blocks.values()):
        return
    layers = adapter.layers()
    devices = {name: first_weight(adapter.plan, layers, name).device for name in blocks}
    skipped = {
        name for name, own in blocks.items() if not own.is_meta or devices[name].type == "meta"
    }
    # Whatever contexts a state dict is loaded in, the factors can be trained.
    with torch.device("cpu"), torch.inference_mode(False):
        for name, values in each_factor(layout, adapter._seed, skipped=skipped):
            found = torch.from_numpy(values).to(devices[name], blocks[name].dtype)
            _put(adapter, name, nn.Parameter(found, requires_grad=blocks[name].requires_grad))
        # Of the dtype that the factors have now, which may have come with the state dict.
        for name, values in each_frozen(layout, singular=False, skipped=skipped):
            _put(adapter, name, torch.from_numpy(values).to(devices[name], adapter.dtype))
    adapter.scope.clear()
    adapter._prepare()


def first_weight(plan: Plan, modules: Mapping[str, nn.Module], block: str) -> Tensor:
    """Return the first weight of a block's group, on whose device the block lives.

    Parameters
    ----------
    plan : Plan
        What lies where.
    modules : mapping of str to torch.nn.Module
        The layers.
    block : str
        The block's name.

    Returns
    -------
    torch.Tensor
        As the layer stores it.
    """
    group = int(block.partition(".")[0])
    layout = plan.layout
    return parameter_of(modules[layout.layer_of[layout.grouping.members[group][0]]])


def _put(adapter: Adapter, block: str, values: Tensor) -> None:
    path, _, leaf = block.rpartition(".")
    owner = adapter.get_submodule(path)
    if isinstance(values, nn.Parameter):
        owner._parameters[leaf] = values
    else:
        owner._buffers[leaf] = values
