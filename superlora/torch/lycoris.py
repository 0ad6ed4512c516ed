"""Adapters in LyCORIS's format: one flat safetensors file, ranks read off the tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from superlora.errors import AdapterError, some
from superlora.shapes import bounded_splits
from superlora.torch.adapter import Adapter
from superlora.torch.attach import check_model
from superlora.torch.export import (
    Export,
    Layer,
    as_the_peers_build,
    check_export,
    exact_layer,
    low_rank_layer,
    named_parts,
    written,
)
from superlora.torch.files import Header, read_tensors, unfit_dtypes, write_tensors
from superlora.torch.foreign import (
    LOHA_FORMS,
    LOKR_FORMS,
    Foreign,
    LayerUpdate,
    Matrix,
    attach_foreign,
    check_matrices,
    dense_update,
    factors_of,
    loha_update,
    lokr_update,
    lora_update,
    rank_of,
    refuse,
)
from superlora.torch.layers import is_adaptable, is_transposed
from superlora.torch.walk import outside_adapters

# The tensors of each method, beside an optional alpha.
_FORMS = {
    "lora": ({"lora_up.weight", "lora_down.weight"},),
    "loha": LOHA_FORMS,
    "lokr": LOKR_FORMS,
    "full": ({"diff"}, {"diff", "diff_b"}),
}


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
    layers: dict[str, dict[str, str]] = {}

    def check(_: Mapping[str, str], header: Header) -> None:
        refuse(path, _sort_keys(model, prefix, header, layers))

    tensors = read_tensors(path, check)
    updates: dict[str, LayerUpdate] = {}
    replaced: dict[str, Tensor] = {}
    problems: list[str] = []
    for layer, keys in layers.items():
        found = {leaf: tensors[key] for leaf, key in keys.items()}
        try:
            updates[layer] = _update(found)
        except ValueError as error:
            problems.append(f"{layer!r}: {error}")
        if "diff_b" in found:
            bias = model.get_submodule(layer).bias
            if not isinstance(bias, Tensor) or bias.shape != found["diff_b"].shape:
                problems.append(f"{layer!r} has no bias of shape {tuple(found['diff_b'].shape)}")
            else:
                replaced[f"{layer}.bias"] = bias.detach() + found["diff_b"].to(bias)
    refuse(path, problems)
    return attach_foreign(model, Foreign(path, updates, replaced), name)


def _sort_keys(
    model: nn.Module, prefix: str, header: Header, layers: dict[str, dict[str, str]]
) -> list[str]:
    """Sort a file's keys to the model's layers; return what is wrong."""
    flat: dict[str, list[str]] = {}
    for layer, module in outside_adapters(model):
        if is_adaptable(module):
            flat.setdefault(f"{prefix}_{layer}".replace(".", "_"), []).append(layer)
    problems = unfit_dtypes(header)
    unknown: dict[str, None] = {}
    for key in header:
        stem, _, leaf = key.partition(".")
        names = flat.get(stem, [])
        if len(names) == 1:
            layers.setdefault(names[0], {})[leaf] = key
        else:
            unknown[
                f"{stem!r} is " + (f"the name of {names}" if names else "no layer of the model")
            ] = None
    problems += list(unknown)
    for layer, found in layers.items():
        if _method(found) is None:
            problems.append(f"{layer!r} has {sorted(found)}: no form of {', '.join(_FORMS)}")
    if not header:
        problems.append("no tensor")
    return problems


def _method(found: Mapping[str, object]) -> str | None:
    own = set(found) - {"alpha"}
    return next((method for method, forms in _FORMS.items() if own in forms), None)


def _update(found: Mapping[str, Tensor]) -> LayerUpdate:
    matrices = {leaf: t for leaf, t in found.items() if leaf not in ("alpha", "diff_b")}
    check_matrices(matrices)
    method = _method(found)
    if method == "full":
        return dense_update(found["diff"])
    if method == "lora":
        parts: tuple[Matrix, ...] = ((found["lora_up.weight"], found["lora_down.weight"]),)
    else:
        parts = factors_of(found, "lokr_w" if method == "lokr" else "hada_w")
    rank = rank_of(*parts)
    alpha = found.get("alpha", torch.tensor(0.0))
    if alpha.numel() != 1 or not torch.isfinite(alpha).all():
        raise ValueError(f"must have one finite number alpha: got {alpha}")
    # Without an alpha, or with 0, the scale is 1; two dense factors have no rank to divide by.
    number = float(alpha) if rank and float(alpha) else float(rank or 1)
    if method == "lokr":
        return lokr_update(*parts, scale=number / (rank or 1))
    if method == "loha":
        return loha_update(*parts, alpha=number)
    return lora_update(*parts[0], alpha=number)


def save_lycoris(
    adapter: Adapter,
    path: Path,
    rank: int | None = None,
    energy: float | None = None,
    prefix: str = "lycoris",
) -> Export:
    """Write an adapter as one of LyCORIS's files.

    Parameters
    ----------
    adapter : Adapter
        An attached adapter.
    path : pathlib.Path
        The file; replaced if it exists.
    rank : int, optional
        Rank to truncate to, where there is no exact counterpart.
    energy : float, optional
        Keep the least rank with this part of the squares of the singular values.
    prefix : str
        What the keys begin with, before the layer's name with underscores.

    Returns
    -------
    Export
        Format and relative error of every layer.

    Raises
    ------
    AdapterError
        If the adapter is not attached, or has replaced parameters.
    ValueError
        If a layer is not one of LyCORIS's, has another's name once its dots are underscores, or
        needs a rank or an energy that is not given.
    """
    check_export(adapter, rank, energy)
    if adapter.replaced is not None:
        raise AdapterError(
            f"adapter {adapter.name!r} has replaced parameters of the model, which the format "
            f"cannot hold: {some(adapter.replaced.names)}"
        )
    conv = [name for name, module in adapter.layers().items() if is_transposed(module)]
    if conv:
        raise ValueError(f"layers must be Linear, LyCORIS has no Conv1D: got {some(conv)}")
    modules = [name for name, _ in outside_adapters(adapter.model)]
    stems = {name: f"{prefix}_{name}".replace(".", "_") for name in modules}
    counts = Counter(stems.values())
    alike = [name for name in adapter.plan.shapes if counts[stems[name]] > 1]
    if alike:
        raise ValueError(
            f"layers must have names that differ once dots are underscores: got {some(alike)}"
        )
    export = Export(path)
    tensors: dict[str, Tensor] = {}
    for name in adapter.plan.shapes:
        layer, error = _loadable(exact_layer(adapter, name)), 0.0
        if layer is None:
            layer, error = low_rank_layer(adapter, name, rank, energy)
        export.methods[name], export.errors[name] = layer.method, error
        for leaf, values in _tensors(layer).items():
            tensors[f"{stems[name]}.{leaf}"] = written(adapter, values)
    write_tensors(path, tensors)
    return export


def _loadable(layer: Layer | None) -> Layer | None:
    """Return a layer in blocks that LyCORIS makes when it reads their shapes off the file."""
    if layer is None or layer.method != "lokr":
        return layer
    built = as_the_peers_build(layer, True)
    first, second = built.parts
    sizes = [(part[0].shape[0], part[-1].shape[1]) for part in built.parts]
    shape = (sizes[0][0] * sizes[1][0], sizes[0][1] * sizes[1][1])
    for bound in (None, *sorted({*sizes[0], *sizes[1]})):
        if _inferred(sizes) == bound and bounded_splits(shape, 2, bound) == tuple(sizes):
            if not built.rank:  # of two dense factors it takes no scale
                return Layer("lokr", ((first[0] * layer.scale,), second), 1.0)
            return built
    return None


def _inferred(sizes: list[tuple[int, int]]) -> int | None:
    """Return the bound that LyCORIS takes these sizes for: the larger of a side that fits both."""
    (rows, columns), (other_rows, other_columns) = sizes
    shape = (rows * other_rows, columns * other_columns)
    if bounded_splits(shape, 2, None)[0] == (rows, columns):
        return None
    for bound in (max(rows, columns), max(other_rows, other_columns)):
        fits = all(size % bound == 0 for size in shape)
        if fits and bound in (rows, other_rows) and bound in (columns, other_columns):
            return bound
    return min(max(rows, columns), max(other_rows, other_columns))


def _tensors(layer: Layer) -> dict[str, Tensor]:
    if layer.method == "full":
        return {"diff": layer.parts[0][0]}
    rank = max(layer.rank, 1)
    if not layer.scale:  # an alpha of 0 is read as the rank
        (first, *others), *parts = layer.parts
        layer = Layer(layer.method, ((0 * first, *others), *parts), 1.0)
    found = {"alpha": torch.tensor(layer.scale * rank)}
    if layer.method == "lora":
        ((up, down),) = layer.parts
        return {**found, "lora_up.weight": up, "lora_down.weight": down}
    return found | named_parts(layer)
