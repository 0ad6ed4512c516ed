"""Read an adapter's file, and attach it to a model that it fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from superlora.design.axes import Axes
from superlora.design.cost_rule import check_apply
from superlora.errors import some
from superlora.plan import Plan
from superlora.torch.adapter import Adapter
from superlora.torch.attach import (
    check_dropout,
    check_free,
    check_operations,
    check_ways,
    checked_model,
    host_of,
    register,
)
from superlora.torch.files.folder import file_of
from superlora.torch.files.safetensors_file import Header, read_tensors
from superlora.torch.files.state import (
    MODEL,
    Description,
    check_biases,
    check_frozen,
    check_maps,
    check_scales,
    check_tensors,
    description_of,
    print_of,
    valid_header,
)
from superlora.torch.layers import refuse_empty
from superlora.torch.offload import is_offloaded
from superlora.torch.replaced import Replaced, refuse_unfit
from superlora.torch.selection import Selection
from superlora.torch.start import checked_dtype, frozen_of, placed_or_stored
from superlora.torch.targets import find_named
from superlora.torch.walk import plain_name


def load(
    model: nn.Module,
    path: str | Path,
    *,
    name: str = "superlora",
    apply: str = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    low_memory: bool = False,
    allow_nonfinite: bool = False,
) -> Adapter:
    """Attach a saved adapter to a model.

    Parameters
    ----------
    model : torch.nn.Module
        A model with layers of the names and shapes that the file gives.
    path : str or pathlib.Path
        A file that ``Adapter.save`` wrote, or the folder of ``Adapter.save_pretrained``.
    name : str
        The attribute of `model` under which the adapter is registered.
    apply : {"auto", "factored", "formed"}
        Whether updates are formed in the forward pass, as in `attach`.
    device : torch.device or str, optional
        Where the factors go; by default to the layers' devices.
    dtype : torch.dtype, optional
        The factors' dtype; by default as saved.
    low_memory : bool
        Take a model whose weights lie on the meta device: the factors are put in place once the
        weights have memory.
    allow_nonfinite : bool
        Read NaN and infinity too, which are refused else.

    Returns
    -------
    Adapter
        With the very factors that were saved, and parameters of the model that were saved with it,
        to be trained on or used.

    Raises
    ------
    AdapterError
        If `model` has an attribute of that name, or a weight lies on the meta
        device and `low_memory` is False.
    FileNotFoundError
        If there is no such file.
    TypeError
        If `model` is not a module, or a weight is not of a floating-point type.
    ValueError
        If the file is truncated, not an adapter, of another format version, for
        other names or shapes, or has missing or extra tensors, or its maps or frozen
        blocks are not drawn as they were, or a factor is not finite: they are
        listed, and the model is as it was.
    """
    model = checked_model(model)
    path = file_of(Path(path))
    read = read_adapter(model, path, name, allow_nonfinite, device, dtype, low_memory)
    if read.description.supernet is not None:
        raise ValueError(f"{path} must be an adapter's: superlora.search.Supernet.load reads it")
    check_apply(apply, read.plan.layout)
    check_ways(read.plan, read.selection, apply)
    check_dropout(read.plan, read.selection, read.description.dropout)
    adapter = Adapter(read.plan, read.blocks, name)
    adapter.dropout = read.description.dropout
    adapter._stored = read.stored
    register(model, adapter, read.selection, read.replaced)
    adapter.scale = read.description.scale
    adapter.applied = apply
    return adapter


@dataclass
class Read:
    """A file's adapter, before it is attached."""

    plan: Plan
    description: Description
    selection: Selection
    blocks: dict[str, Tensor]
    replaced: Replaced | None
    stored: dict[str, Tensor]  # blocks that wait for the weights to have memory


def read_adapter(
    model: nn.Module,
    path: Path,
    name: str,
    nonfinite: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    low_memory: bool = False,
) -> Read:
    """Read a file, and check that its adapter fits a model; nothing is changed."""
    model = checked_model(model)

    # Modules and parameters; what a file may cost is in proportion to them.
    most = sum(1 + len(module._parameters) for module in model.modules())

    def check(metadata: Mapping[str, str], tensors: Header) -> tuple[Plan, Description, Selection]:
        description = description_of(metadata, path, most)
        rows, tied = description.rows, "once" if description.tied else "refuse"
        selection = find_layers(model, description.layers, path, rows, tied, low_memory)
        # After that, no width is beyond the model's.
        with valid_header(path):
            plan = Plan(description.spec, description.layers)
        check_tensors(plan, tensors, path)
        return plan, description, selection

    (plan, description, selection), tensors = read_tensors(path, check, nonfinite=nonfinite)
    factors = {key: value for key, value in tensors.items() if not key.startswith(MODEL)}
    values = {
        plain_name(key.removeprefix(MODEL)): value
        for key, value in tensors.items()
        if key.startswith(MODEL)
    }
    weights = selection.weights
    check_operations(plan, selection)
    check_biases(plan, weights, description, path)
    check_free(model, host_of(model, weights), name)
    check_maps(plan, description, path)
    refuse_unfit(model, values, description.shared, path)
    # Rounded as they were when they were saved.
    saved = factors[next(iter(plan.factor_shapes))].dtype
    made = {name: block.to(saved) for name, block in frozen_of(plan, weights).items()}
    dtype = checked_dtype(dtype) or saved
    check_scales(plan, description.scale, dtype, path)
    check_frozen({name: print_of(block) for name, block in made.items()}, description, path)
    blocks, stored = placed_or_stored(plan, weights, factors | made, dtype, device)
    replaced = Replaced(model, values, description.shared) if values else None
    return Read(plan, description, selection, blocks, replaced, stored)


def find_layers(
    model: nn.Module,
    layers: Mapping[str, Axes],
    path: Path,
    rows: Mapping[str, tuple[int, int]] | None = None,
    tied: str = "refuse",
    low_memory: bool = False,
) -> Selection:
    """Return the weights of a model that a file names, or list those that it has not."""
    selection, problems = find_named(model, list(layers), rows or {}, tied)
    for name, axes in layers.items():
        if name not in selection.weights:
            continue
        own = selection.weights[name].axes
        found = Axes.of(selection.shapes[name]) if name in selection.rows else own
        if found != axes:
            problems.append(f"{name!r} has shape {found.shape} instead of {axes.shape}")
    if problems:
        raise ValueError(f"the model must have the layers of {path}: {some(problems, 20)}")
    if low_memory:
        return selection
    # Giving the model memory later would wipe the factors.
    weights = {
        name: weight.parameter
        for name, weight in selection.weights.items()
        if not is_offloaded(weight.module, weight.parameter)
    }
    refuse_empty("weights must be loaded before an adapter, or low_memory be True", weights)
    return selection
