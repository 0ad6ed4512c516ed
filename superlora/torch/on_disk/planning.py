"""Plan an adapter for a checkpoint, of which the headers alone are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from superlora.plan import Plan
from superlora.torch.attach import (
    _design,
    _fitting,
    _leave_out_unfit,
    check_operations,
)
from superlora.torch.files.safetensors_file import DTYPES
from superlora.torch.on_disk.checkpoint import Checkpoint
from superlora.torch.on_disk.skeleton import skeleton
from superlora.torch.selection import Selection
from superlora.torch.targets import find_targets


def plan_checkpoint(
    model: str | Path | Checkpoint,
    spec: Any,
    targets: str | Sequence[str] = "all-linear",
    *,
    exclude: str | Sequence[str] | None = None,
) -> tuple[Plan, Selection]:
    """Join a design with the weights of a checkpoint; no tensor is read.

    Parameters
    ----------
    model : str or pathlib.Path
        A safetensors file, or a folder of one or of shards with their index.
    spec : Spec, Supports or mapping
        The design.
    targets, exclude : str or sequence of str
        As in `superlora.torch.attach`. ``"all-linear"`` takes every tensor ``x.weight`` of two axes
        but those whose ``x`` is named like an embedding or an output head.

    Returns
    -------
    Plan
        The design of these weights.
    Selection
        The weights, and why others are left out.

    Raises
    ------
    FileNotFoundError
        If there is no checkpoint.
    ValueError
        If it is quantised, nothing is chosen, or the design does not fit.
    """
    source = model if isinstance(model, Checkpoint) else Checkpoint(model)
    source.refuse_quantised()
    selection = find_targets(shapes_alone(source), targets, exclude=exclude)
    if isinstance(targets, str):
        _leave_out_unfit(spec, selection)
    plan = Plan(_fitting(_design(spec, selection), selection), selection.shapes)
    check_operations(plan, selection)
    return plan, selection


def shapes_alone(source: Checkpoint) -> nn.Module:
    """Return modules that stand for a model, with zeros that take no memory for its tensors."""
    tensors = {
        name: torch.zeros((), dtype=DTYPES[own.dtype]).expand(own.shape)
        for name, own in source.tensors.items()
        if own.dtype in DTYPES
    }
    return skeleton(tensors, source.turned())
