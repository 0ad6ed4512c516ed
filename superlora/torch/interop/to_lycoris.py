"""Write an adapter as one flat file: of LyCORIS, and with the key names of other programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from superlora.design.fold_shape import bounded_splits
from superlora.errors import some
from superlora.torch.blocks import Blocks
from superlora.torch.files.safetensors_file import write_tensors
from superlora.torch.interop import formats
from superlora.torch.interop.keys import KEYS, default_prefix, stem
from superlora.torch.interop.served import served_layers
from superlora.torch.layers import Weight
from superlora.torch.walk import outside_adapters

ALPHA = "alpha"


def save_lycoris(
    blocks: Blocks,
    model: nn.Module,
    weights: Mapping[str, Weight],
    path: Path,
    rank: int | None,
    energy: float | None,
    keys: str,
    prefix: str | None,
) -> formats.Export:
    """Write the updates of a model's layers as one file."""
    formats.check_export(blocks, rank, energy)
    if keys not in KEYS:
        raise ValueError(f"keys must be one of {', '.join(KEYS)}: got {keys!r}")
    row = KEYS[keys]
    prefix = default_prefix(keys, model) if prefix is None else prefix
    others = [
        name for name, weight in weights.items() if weight.kind not in ("linear", "quantised")
    ]
    if others:
        kinds = sorted({weights[name].kind for name in others})
        raise ValueError(
            f"layers must be linear to be written for LyCORIS: got {some(others)}, "
            f"{', '.join(kinds)}"
        )
    names = [name for name, _ in outside_adapters(model)]
    stems = {name: stem(name, prefix, row.joint) for name in names}
    counts = Counter(stems.values())
    alike = [name for name in blocks.plan.shapes if counts[stems[name]] > 1]
    if alike:
        raise ValueError(
            f"layers must have names that differ once dots are underscores: got {some(alike)}"
        )
    tensors: dict[str, Tensor] = {}
    layers: dict[str, formats.Layer] = {}
    errors: dict[str, float] = {}
    if row.structured:
        for name in blocks.plan.shapes:
            layer, errors[name] = _loadable(formats.exact_layer(blocks, name)), 0.0
            if layer is None:
                layer, errors[name] = formats.low_rank_layer(blocks, name, rank, energy)
            layers[name] = layer
    else:
        layers, errors = served_layers(blocks, rank, energy)
    for name, layer in layers.items():
        found = (
            _tensors(layer) if row.structured else dict(zip(row.names, *layer.parts, strict=True))
        )
        for leaf, values in found.items():
            tensors[f"{stems[name]}.{leaf}"] = formats.written(blocks, values)
    write_tensors(path, tensors)
    return formats.Export(path, {name: layer.method for name, layer in layers.items()}, errors)


def _loadable(layer: formats.Layer | None) -> formats.Layer | None:
    """Return a layer in blocks that LyCORIS makes when it reads their shapes off the file."""
    if layer is None or layer.method != "lokr":
        return layer
    built = formats.as_the_peers_build(layer, True)
    bound = _inferred(built)
    if bounded_splits(built.shape, 2, bound) != built.sizes:
        return None
    return built


def _inferred(layer: formats.Layer) -> int | None:
    """Return the bound that LyCORIS takes these sizes for: the larger of a side that fits both."""
    if bounded_splits(layer.shape, 2, None)[0] == layer.sizes[0]:
        return None
    bounds = [max(size) for size in layer.sizes]
    (rows, columns), (other_rows, other_columns) = layer.sizes
    for bound in bounds:
        fits = all(size % bound == 0 for size in layer.shape)
        if fits and bound in (rows, other_rows) and bound in (columns, other_columns):
            return bound
    return min(bounds)


def _tensors(layer: formats.Layer) -> dict[str, Tensor]:
    if layer.method == "full":
        return formats.named(formats.LYCORIS_FORMS, layer)
    if layer.method != "lora" or not layer.scale:  # an alpha of 0 is read as the rank
        layer = formats.with_scale_one(layer)
    alpha = torch.tensor(layer.scale * max(layer.rank, 1))
    return {ALPHA: alpha, **formats.named(formats.LYCORIS_FORMS, layer)}
