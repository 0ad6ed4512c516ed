"""Adapters in LyCORIS's format: one flat safetensors file, ranks read off the tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from superlora.design.fold_shape import bounded_splits
from superlora.errors import AdapterError, some
from superlora.torch.adapter import Adapter
from superlora.torch.attach import check_model
from superlora.torch.files.safetensors_file import Header, read_tensors, unfit_dtypes, write_tensors
from superlora.torch.interop import formats
from superlora.torch.layers import is_adaptable, is_transposed
from superlora.torch.walk import outside_adapters

FORMS: formats.Forms = {
    "lora": [(("lora_up.weight", "lora_down.weight"),)],
    **formats.COMMON_FORMS,
    "full": [(("diff",),)],
}
# The tensors of a layer beside its matrices.
_ALPHA, _BIAS = "alpha", "diff_b"


def from_lycoris(
    model: nn.Module, path: str | Path, *, prefix: str = "lycoris", name: str = "superlora"
) -> Adapter:
    """Attach an adapter that LyCORIS saved.

    Parameters
    ----------
    model : torch.nn.Module
        The model it was trained on.
    path : str or pathlib.Path
        A safetensors file of LoRA (LoCon), LoKr, LoHa or full layers, mixed as they may be.
    prefix : str
        What the keys begin with, before the layer's name with underscores.
    name : str
        The attribute of `model` under which the adapter is registered.

    Returns
    -------
    Adapter
        With the very factors of the file. It computes what LyCORIS computes in training; its
        merge of LoKr and LoHa multiplies by the scale once more.

    Raises
    ------
    AdapterError
        If `model` has an attribute of that name, or a weight lies on the meta device.
    FileNotFoundError
        If there is no such file.
    ValueError
        If a method is unknown, tensors are missing, left over, of wrong shapes, or a
        layer is not in the model or its name not unique: all are listed, and nothing is
        attached.
    """
    check_model(model)
    path = Path(path)

    def check(_: Mapping[str, str], header: Header) -> dict[str, dict[str, str]]:
        layers, problems = _sort_keys(model, prefix, header)
        formats.refuse(path, problems)
        return layers

    layers, tensors = read_tensors(path, check)
    updates: dict[str, formats.LayerUpdate] = {}
    replaced: dict[str, Tensor] = {}
    problems: list[str] = []
    for layer, keys in layers.items():
        found = {leaf: tensors[key] for leaf, key in keys.items()}
        alpha, change = found.pop(_ALPHA, torch.tensor(0.0)), found.pop(_BIAS, None)
        try:
            updates[layer] = _update(found, alpha)
        except ValueError as error:
            problems.append(f"{layer!r}: {error}")
        if change is not None:
            bias = model.get_submodule(layer).bias
            if not isinstance(bias, Tensor) or bias.shape != change.shape:
                problems.append(f"{layer!r} has no bias of shape {tuple(change.shape)}")
            else:
                replaced[f"{layer}.bias"] = bias.detach() + change.to(bias)
    formats.refuse(path, problems)
    return formats.attach_foreign(model, path, updates, replaced, name)


def _sort_keys(
    model: nn.Module, prefix: str, header: Header
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return a file's keys by the model's layer and leaf, and what is wrong."""
    stems: dict[str, list[str]] = {}
    for layer, module in outside_adapters(model):
        if is_adaptable(module):
            stems.setdefault(f"{prefix}_{layer}".replace(".", "_"), []).append(layer)
    layers: dict[str, dict[str, str]] = {}
    problems = unfit_dtypes(header)
    unknown: dict[str, None] = {}
    for key in header:
        stem, _, leaf = key.partition(".")
        names = stems.get(stem, [])
        if len(names) == 1:
            layers.setdefault(names[0], {})[leaf] = key
        else:
            meaning = f"the name of {names}" if names else "no layer of the model"
            unknown[f"{stem!r} is {meaning}"] = None
    problems += unknown
    for layer, found in layers.items():
        if _method(found) is None:
            problems.append(f"{layer!r} has {sorted(found)}: no form of {', '.join(FORMS)}")
    if not header:
        problems.append("no tensor")
    return layers, problems


def _method(found: Collection[str]) -> str | None:
    own = set(found) - {_ALPHA} - ({_BIAS} if "diff" in found else set())
    return next((method for method, forms in FORMS.items() if own in formats.names_of(forms)), None)


def _update(found: Mapping[str, Tensor], alpha: Tensor) -> formats.LayerUpdate:
    method = _method(found)
    assert method is not None  # or the keys were refused
    parts = formats.parts_of(found, FORMS[method])
    if method == "full":
        return formats.update_of(method, parts)
    rank = formats.rank_of(parts)
    if alpha.numel() != 1 or not torch.isfinite(alpha).all():
        raise ValueError(f"must have one finite number alpha: got {alpha}")
    # Without an alpha, or with 0, the scale is 1; two dense factors have no rank to divide by.
    number = float(alpha) if rank and float(alpha) else float(rank or 1)
    if method == "lokr":
        return formats.update_of(method, parts, scale=number / (rank or 1))
    return formats.update_of(method, parts, alpha=number)


def save_lycoris(
    adapter: Adapter, path: Path, rank: int | None, energy: float | None, prefix: str
) -> formats.Export:
    """Write an adapter as one of LyCORIS's files."""
    formats.check_export(adapter, rank, energy)
    if adapter.replaced is not None:
        raise AdapterError(
            f"adapter {adapter.name!r} has replaced parameters of the model, which the format "
            f"cannot hold: {some(adapter.replaced.names)}"
        )
    conv = [name for name, module in adapter.layers().items() if is_transposed(module)]
    if conv:
        raise ValueError(f"layers must be Linear, LyCORIS has no Conv1D: got {some(conv)}")
    names = [name for name, _ in outside_adapters(adapter.model)]
    stems = {name: f"{prefix}_{name}".replace(".", "_") for name in names}
    counts = Counter(stems.values())
    alike = [name for name in adapter.plan.shapes if counts[stems[name]] > 1]
    if alike:
        raise ValueError(
            f"layers must have names that differ once dots are underscores: got {some(alike)}"
        )
    export = formats.Export(path)
    tensors: dict[str, Tensor] = {}
    for name in adapter.plan.shapes:
        layer, error = _loadable(formats.exact_layer(adapter, name)), 0.0
        if layer is None:
            layer, error = formats.low_rank_layer(adapter, name, rank, energy)
        export.methods[name], export.errors[name] = layer.method, error
        for leaf, values in _tensors(layer).items():
            tensors[f"{stems[name]}.{leaf}"] = formats.written(adapter, values)
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
        return formats.named(FORMS, layer)
    number = layer.scale * max(layer.rank, 1)
    if not number:  # an alpha of 0 is read as the rank
        number = 1.0
        (first, *others), *parts = layer.parts
        layer = formats.Layer(layer.method, ((0 * first, *others), *parts), 1.0)
    return {_ALPHA: torch.tensor(number), **formats.named(FORMS, layer)}
