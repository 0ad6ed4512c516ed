"""Read one flat safetensors file, of LyCORIS and other programs: ranks are read off the tensors."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from superlora.errors import some
from superlora.torch.adapter import Adapter
from superlora.torch.attach import checked_model
from superlora.torch.files import strict_json
from superlora.torch.files.safetensors_file import Header, read_tensors, unfit_dtypes
from superlora.torch.interop import formats
from superlora.torch.interop.foreign import LayerUpdate, attach_foreign, refuse, update_of
from superlora.torch.interop.formats import LYCORIS_FORMS
from superlora.torch.interop.keys import is_of_other_part, places, split_key, stem
from superlora.torch.interop.to_lycoris import ALPHA
from superlora.torch.layers import is_linear
from superlora.torch.walk import outside_adapters, submodule

_BIAS = "diff_b"
_LEAVES = {ALPHA, _BIAS}.union(
    *map(set, itertools.chain(*map(formats.names_of, LYCORIS_FORMS.values())))
)


def from_lycoris(
    model: nn.Module,
    path: str | Path,
    *,
    prefix: str | None = None,
    name: str = "superlora",
    allow_nonfinite: bool = False,
) -> Adapter:
    """Attach an adapter that LyCORIS, kohya's scripts, ComfyUI or diffusers saved.

    Parameters
    ----------
    model : torch.nn.Module
        The model it was trained on.
    path : str or pathlib.Path
        A safetensors file of LoRA (LoCon), LoKr, LoHa or full layers, mixed as they may be.
    prefix : str, optional
        What the keys begin with, before the layer's name with dots or underscores: by default the
        one of the known that names layers of the model, such as ``"lycoris"``, ``"lora_unet"``,
        ``"diffusion_model"`` or ``"transformer"``. Keys of other known ones are of other parts of
        a pipeline and left out, without a `prefix` with a warning.
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
        attached. Also if several prefixes name layers of the model and none is given.
    """
    model = checked_model(model)
    path = Path(path)

    said: dict[str, Any] = {}  # of LoRA's scale, by diffusers

    def check(metadata: Mapping[str, str], header: Header) -> dict[str, dict[str, str]]:
        own, joint = _place(model, prefix, header)
        layers, problems = _sort_keys(model, own, joint, header, prefix is None)
        said.update(_said(metadata, own, problems))
        refuse(path, problems)
        return layers

    layers, tensors = read_tensors(path, check, nonfinite=allow_nonfinite)
    updates: dict[str, LayerUpdate] = {}
    replaced: dict[str, Tensor] = {}
    problems: list[str] = []
    for layer, keys in layers.items():
        found = {leaf: tensors[key] for leaf, key in keys.items()}
        alpha, change = found.pop(ALPHA, said.get("lora_alpha")), found.pop(_BIAS, None)
        try:
            alpha = torch.as_tensor(0.0 if alpha is None else alpha)
            updates[layer] = _update(found, alpha, bool(said.get("use_rslora")))
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


def _stems(model: nn.Module, prefix: str, joint: str) -> dict[str, list[str]]:
    """Return the layers that can be meant by what keys begin with."""
    stems: dict[str, list[str]] = {}
    for layer, module in outside_adapters(model):
        if is_linear(module):
            stems.setdefault(stem(layer, prefix, joint), []).append(layer)
    return stems


def _place(model: nn.Module, prefix: str | None, header: Header) -> tuple[str, str]:
    """Return the prefix and the joint that name layers of the model, the first if none does."""
    found = {split_key(key, _LEAVES)[0] for key in header}
    known = places(prefix)
    fit = [place for place in known if found & _stems(model, *place).keys()]
    if len(fit) > 1:
        raise ValueError(
            "prefix must be given where several in a file name layers of the model: got "
            f"{some(repr(each) for each, _ in fit)}"
        )
    return (fit or known)[0]


def _sort_keys(
    model: nn.Module, prefix: str, joint: str, header: Header, warn: bool
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return a file's keys by the model's layer and leaf, and what is wrong."""
    stems = _stems(model, prefix, joint)
    layers: dict[str, dict[str, str]] = {}
    problems = unfit_dtypes(header)
    unknown: dict[str, None] = {}
    others: dict[str, None] = {}
    for key in header:
        own, leaf = split_key(key, _LEAVES)
        names = stems.get(own, [])
        if len(names) == 1:
            if leaf in layers.setdefault(names[0], {}):
                problems.append(f"{key!r} and {layers[names[0]][leaf]!r} are one tensor's")
            layers[names[0]][leaf] = key
        elif not names and is_of_other_part(key, joint, prefix):
            others[own] = None
        else:
            meaning = f"the name of {names}" if names else "no layer of the model"
            unknown[f"{own!r} is {meaning}"] = None
    if others and not layers:
        problems += [f"{own!r} is no layer of the model" for own in others]
    elif others and warn:
        warnings.warn(
            f"{some(map(repr, others))} are of other parts of a pipeline than {prefix!r} and left "
            "out: give prefix to say which part is meant",
            stacklevel=5,
        )
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


def _said(metadata: Mapping[str, str], prefix: str, problems: list[str]) -> dict[str, Any]:
    """Return what the header says of LoRA's scale, as diffusers writes it."""
    text = metadata.get("lora_adapter_metadata")
    if text is None:
        return {}
    try:
        values = strict_json.parse(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        problems.append("lora_adapter_metadata must be a JSON object")
        return {}
    said = {key.removeprefix(f"{prefix}."): value for key, value in values.items()}
    unfit = ("alpha_pattern", "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices")
    problems += [f"lora_adapter_metadata has {key}={said[key]!r}" for key in unfit if said.get(key)]
    alpha = said.get("lora_alpha", 0)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        problems.append(f"lora_adapter_metadata must have a number lora_alpha: got {alpha!r}")
    return said


def _update(found: Mapping[str, Tensor], alpha: Tensor, rslora: bool) -> LayerUpdate:
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
    return update_of(method, parts, alpha=number, rslora=rslora and method == "lora")
