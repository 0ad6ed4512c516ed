"""Read adapters that LyCORIS saved: one flat safetensors file, ranks read off the tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from superlora.torch.adapter import Adapter
from superlora.torch.attach import checked_model
from superlora.torch.files.safetensors_file import Header, read_tensors, unfit_dtypes
from superlora.torch.interop import formats
from superlora.torch.interop.foreign import LayerUpdate, attach_foreign, refuse, update_of
from superlora.torch.interop.formats import LYCORIS_FORMS
from superlora.torch.interop.to_lycoris import ALPHA
from superlora.torch.layers import is_linear
from superlora.torch.walk import outside_adapters, submodule

_BIAS = "diff_b"


def from_lycoris(
    model: nn.Module,
    path: str | Path,
    *,
    prefix: str = "lycoris",
    name: str = "superlora",
    allow_nonfinite: bool = False,
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
    allow_nonfinite : bool
        Read NaN and infinity too, which are refused else.

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
    model = checked_model(model)
    path = Path(path)

    def check(_: Mapping[str, str], header: Header) -> dict[str, dict[str, str]]:
        layers, problems = _sort_keys(model, prefix, header)
        refuse(path, problems)
        return layers

    layers, tensors = read_tensors(path, check, nonfinite=allow_nonfinite)
    updates: dict[str, LayerUpdate] = {}
    replaced: dict[str, Tensor] = {}
    problems: list[str] = []
    for layer, keys in layers.items():
        found = {leaf: tensors[key] for leaf, key in keys.items()}
        alpha, change = found.pop(ALPHA, torch.tensor(0.0)), found.pop(_BIAS, None)
        try:
            updates[layer] = _update(found, alpha)
        except ValueError as error:
            problems.append(f"{layer!r}: {error}")
        if change is not None:
            bias = getattr(submodule(model, layer), "bias", None)
            if not isinstance(bias, Tensor) or bias.shape != change.shape:
                problems.append(f"{layer!r} has no bias of shape {tuple(change.shape)}")
            else:
                replaced[f"{layer}.bias"] = bias.detach() + change.to(bias)
    refuse(path, problems)
    return attach_foreign(model, path, updates, replaced, name)


def _sort_keys(
    model: nn.Module, prefix: str, header: Header
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return a file's keys by the model's layer and leaf, and what is wrong."""
    stems: dict[str, list[str]] = {}
    for layer, module in outside_adapters(model):
        if is_linear(module):
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
            problems.append(f"{layer!r} has {sorted(found)}: no form of {', '.join(LYCORIS_FORMS)}")
    if not header:
        problems.append("no tensor")
    return layers, problems


def _method(found: Collection[str]) -> str | None:
    own = set(found) - {ALPHA} - ({_BIAS} if "diff" in found else set())
    return next(
        (method for method, forms in LYCORIS_FORMS.items() if own in formats.names_of(forms)), None
    )


def _update(found: Mapping[str, Tensor], alpha: Tensor) -> LayerUpdate:
    method = _method(found)
    assert method is not None  # or the keys were refused
    parts = formats.parts_of(found, LYCORIS_FORMS[method])
    if method == "full":
        return update_of(method, parts)
    rank = formats.rank_of(parts)
    if alpha.numel() != 1 or not torch.isfinite(alpha).all():
        raise ValueError(f"must have one finite number alpha: got {alpha}")
    # Without an alpha, or with 0, the scale is 1; two dense factors have no rank to divide by.
    number = float(alpha) if rank and float(alpha) else float(rank or 1)
    if method == "lokr":
        return update_of(method, parts, scale=number / (rank or 1))
    return update_of(method, parts, alpha=number)
