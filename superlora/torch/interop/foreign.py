"""Attach the updates that another library wrote: one spec for all layers, the rest overrides."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from superlora.design.spec import Spec
from superlora.errors import some
from superlora.plan import Plan
from superlora.torch.adapter import Adapter
from superlora.torch.attach import (
    check_dropout,
    check_free,
    check_ways,
    host_of,
    register,
)
from superlora.torch.dropout import Dropout
from superlora.torch.files.load import find_layers
from superlora.torch.files.state import check_scales
from superlora.torch.interop.formats import Layer, Matrix, rank_of
from superlora.torch.replaced import Replaced, refuse_unfit
from superlora.torch.start import frozen_of, placed
from superlora.torch.targets import is_named


@dataclass
class LayerUpdate:
    """What a file says of one layer: its spec, blocks by ``"split.block"``, and the widths."""

    spec: Spec
    blocks: dict[str, Tensor]
    shape: tuple[int, int]


def update_of(method: str, parts: tuple[Matrix, ...], **fields: Any) -> LayerUpdate:
    """Return the update that the matrices of a `Layer` make; fields say its scale."""
    layer = Layer(method, parts, 1.0)
    if method == "full":
        blocks = {"0.core": parts[0][0].flatten()}
        return LayerUpdate(Spec(rank="full", order=1), blocks, layer.shape)
    blocks = {}
    for split, part in enumerate(parts):
        if len(part) == 1:
            blocks[f"{split}.core"] = part[0]
        else:
            blocks[f"{split}.factor0"], blocks[f"{split}.factor1"] = part[0], part[1].t()
    fields |= {"splits": len(parts), "dense_from": "never", "rank": rank_of(parts)}
    if method == "lokr":
        fields["rank"] = tuple(part[0].shape[1] if len(part) == 2 else "full" for part in parts)
        fields["fold"] = layer.sizes
    elif method == "loha":
        fields["combine"] = "hadamard"
        if layer.sizes[0] != layer.sizes[1]:
            raise ValueError(
                f"must have two products of one shape: got {layer.sizes[0]} and {layer.sizes[1]}"
            )
    return LayerUpdate(Spec(**fields), blocks, layer.shape)


def attach_foreign(
    model: nn.Module,
    source: Path,
    updates: Mapping[str, LayerUpdate],
    replaced: Mapping[str, Tensor],
    name: str,
    dropout: Dropout | None = None,
) -> Adapter:
    """Attach an adapter that another library wrote: updates by layer, new values by parameter."""
    plan = Plan(_common_spec(updates), {layer: update.shape for layer, update in updates.items()})
    selection = find_layers(model, plan.layout.layer_axes, source)
    weights = selection.weights
    check_free(model, host_of(model, weights), name)
    check_ways(plan, selection, "auto")
    refuse_unfit(model, replaced, {}, source)
    blocks = frozen_of(plan, weights)
    dtype = torch.float32
    for layer, update in updates.items():
        group = plan.layout.grouping.pieces[layer][0].group
        for block, values in update.blocks.items():
            split, _, leaf = block.partition(".")
            own = plan.layout.block(group, int(split), leaf)
            whole = tuple(map(slice, plan.layout.block_shapes[own]))
            blocks[own] = values[whole].contiguous()
            dtype = torch.promote_types(dtype, values.dtype)
    check_scales(plan, plan.scale, dtype, source)
    blocks = placed(plan, weights, blocks, dtype)
    pending = Replaced(model, replaced) if replaced else None
    adapter = Adapter(plan, blocks, name)
    if dropout is not None:
        check_dropout(plan, selection, dropout)
        adapter.dropout = dropout
    return register(model, adapter, selection, pending)


def _common_spec(updates: Mapping[str, LayerUpdate]) -> Spec:
    """Return the spec that most layers have, with overrides for the others."""
    kinds: dict[Spec, list[str]] = {}
    for layer, update in updates.items():
        kinds.setdefault(update.spec, []).append(layer)
    # Scales are in proportion to that of the spec, which must not be 0 where another is not.
    common = max(kinds, key=lambda spec: (spec.scaling != 0, len(kinds[spec])))
    overrides = {}
    for spec, layers in kinds.items():
        fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
        changes = {key: own for key, own in fields.items() if own != getattr(common, key)}
        if changes:
            overrides[_pattern(layers, updates)] = changes
    return common.replace(overrides=overrides)


def _pattern(layers: Sequence[str], everything: Iterable[str]) -> str:
    """Return a pattern that matches these layers and no others, short where that can be."""
    wanted = set(layers)
    for count in (1, 2):
        ends = dict.fromkeys(".".join(layer.split(".")[-count:]) for layer in layers)
        if {layer for layer in everything if is_named(layer, ends)} == wanted:
            return "|".join(map(re.escape, ends))
    return "^(?:" + "|".join(map(re.escape, layers)) + ")"


def refuse(source: object, problems: list[str]) -> None:
    """Raise with all that is wrong with a file, if anything is."""
    if problems:
        raise ValueError(f"{source} cannot be read: {some(problems, 20)}")
