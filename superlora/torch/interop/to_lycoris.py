"""Write an adapter as one of LyCORIS's files."""

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
    prefix: str,
) -> formats.Export:
    """Write the updates of a model's layers as one file."""
    formats.check_export(blocks, rank, energy)
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
    stems = {name: f"{prefix}_{name}".replace(".", "_") for name in names}
    counts = Counter(stems.values())
    alike = [name for name in blocks.plan.shapes if counts[stems[name]] > 1]
    if alike:
        raise ValueError(
            f"layers must have names that differ once dots are underscores: got {some(alike)}"
        )
    export = formats.Export(path)
    tensors: dict[str, Tensor] = {}
    for name in blocks.plan.shapes:
        layer, error = _loadable(formats.exact_layer(blocks, name)), 0.0
        if layer is None:
            layer, error = formats.low_rank_layer(blocks, name, rank, energy)
        export.methods[name], export.errors[name] = layer.method, error
        for leaf, values in _tensors(layer).items():
            tensors[f"{stems[name]}.{leaf}"] = formats.written(blocks, values)
    write_tensors(path, tensors)
    return export


def _loadable(layer: formats.Layer | None) -> formats.Layer | None:
    """Return a layer in blocks that LyCORIS makes when it reads their shapes off the file."""
    if layer is None or layer.method != "lokr":
        return layer
    built = formats.as_the_peers_build(layer, True)
    bound = _inferred(built)
    if bounded_splits(built.shape, 2, bound) != built.sizes:
        return None
    if built.rank:
        return built
    first, second = built.parts  # of two dense factors it takes no scale
    return formats.Layer("lokr", ((first[0] * layer.scale,), second), 1.0)


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
    number = layer.scale * max(layer.rank, 1)
    if not number:  # an alpha of 0 is read as the rank
        number = 1.0
        (first, *others), *parts = layer.parts
        layer = formats.Layer(layer.method, ((0 * first, *others), *parts), 1.0)
    return {ALPHA: torch.tensor(number), **formats.named(formats.LYCORIS_FORMS, layer)}
