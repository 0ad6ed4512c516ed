"""Write an adapter as PEFT's folder: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from superlora.design.fold_shape import bounded_splits, ceil_divide
from superlora.errors import some
from superlora.torch.blocks import Blocks
from superlora.torch.files.safetensors_file import replacing, write_tensors
from superlora.torch.interop import formats
from superlora.torch.interop.served import check_served, served_layers, task_of
from superlora.torch.layers import Weight
from superlora.torch.replaced import Replaced
from superlora.torch.targets import is_named
from superlora.torch.walk import outside_adapters, read, tensors_of

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What the config calls the number that a scale is made of.
ALPHAS = {"lora": "lora_alpha", "loha": "alpha", "lokr": "alpha"}


def save_peft(
    blocks: Blocks,
    model: nn.Module,
    weights: Mapping[str, Weight],
    replaced: Replaced | None,
    directory: Path,
    rank: int | None,
    energy: float | None,
    serve: bool,
) -> formats.Export:
    """Write the updates of a model's layers, and what replaced parameters of it, as a folder."""
    formats.check_export(blocks, rank, energy)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"directory must be a folder: got {directory}")
    for name in (CONFIG, WEIGHTS):
        if (directory / name).is_dir():
            raise IsADirectoryError(f"directory must have no folder {name}: got {directory}")
        if (directory / name).exists() and not (directory / name).is_file():
            raise ValueError(f"directory must have a regular file {name}: got {directory / name}")
    conv = [weight.kind == "Conv1D" for weight in weights.values()]
    modules = {name: weight.module for name, weight in weights.items()}
    others = [name for name, weight in weights.items() if not _is_known(weight)]
    if others:
        kinds = sorted({type(weights[name].module).__name__ for name in others})
        raise ValueError(
            "layers must be linear, convolutions without groups or embeddings to be written for "
            f"PEFT: got {some(map(repr, others))} of type {', '.join(kinds)}"
        )
    shaped = [weight.kind for weight in weights.values() if not weight.linear]
    if serve:
        check_served(weights, replaced)
        layers, errors = served_layers(blocks, rank, energy)
        options: dict[str, Any] = {"task_type": task_of(model)}
    else:
        layers, errors, options = _layers(blocks, any(conv) or bool(shaped), rank, energy)
    tensors = {
        f"{PREFIX}{name}.{leaf}": formats.written(blocks, values)
        for name, layer in layers.items()
        for leaf, values in _shaped(weights[name], layer).items()
    }
    if replaced is not None:
        whole, saved = _saved_whole(model, modules, replaced.tensors())
        tensors |= {PREFIX + key: value for key, value in whole.items()}
        options |= saved
    config = _config(model, layers, all(conv)) | options
    directory.mkdir(parents=True, exist_ok=True)
    with replacing((directory / CONFIG).resolve()) as temporary:
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        write_tensors(directory / WEIGHTS, tensors, {"format": "pt"})
    return formats.Export(directory, {name: layer.method for name, layer in layers.items()}, errors)


def _is_known(weight: Weight) -> bool:
    """Return whether PEFT has a LoRA for a layer."""
    if weight.kind == "convolution":
        return bool(weight.module.groups == 1)
    return weight.linear or type(weight.module) is nn.Embedding


def _shaped(weight: Weight, layer: formats.Layer) -> dict[str, Tensor]:
    """Return a layer's tensors, with the window of a convolution, or as an embedding has them."""
    if weight.linear:
        return formats.named(formats.PEFT_FORMS, layer)
    ((left, right),) = layer.parts
    if weight.kind == "embedding":
        return {"lora_embedding_A": left.t(), "lora_embedding_B": right.t()}
    _, columns, *window = weight.axes.shape
    ones = [1] * len(window)
    return {
        "lora_A.weight": right.reshape(len(right), columns, *window),
        "lora_B.weight": left.reshape(*left.shape, *ones),
    }


def _layers(
    blocks: Blocks, conv: bool, rank: int | None, energy: float | None
) -> tuple[dict[str, formats.Layer], dict[str, float], dict[str, Any]]:
    """Return all layers in the one method that a folder can hold, their errors, its options."""
    exact = {name: formats.exact_layer(blocks, name) for name in blocks.plan.shapes}
    found = {name: layer for name, layer in exact.items() if layer is not None}
    methods = {layer.method if layer else "" for layer in exact.values()}
    errors = dict.fromkeys(exact, 0.0)
    if methods == {"lora"}:
        return found, errors, {}
    if methods == {"loha"} and not conv:
        return {name: formats.with_scale_one(layer) for name, layer in found.items()}, errors, {}
    options = _lokr_options(found) if methods == {"lokr"} and not conv else None
    if options is not None:
        both = options["decompose_both"]
        built = {name: formats.as_the_peers_build(layer, both) for name, layer in found.items()}
        return {n: formats.with_scale_one(layer) for n, layer in built.items()}, errors, options
    for name in exact:
        if name not in found or found[name].method != "lora":
            found[name], errors[name] = formats.low_rank_layer(blocks, name, rank, energy)
    return {name: found[name] for name in exact}, errors, {}


def _lokr_options(layers: dict[str, formats.Layer]) -> dict[str, Any] | None:
    """Return the options with which PEFT makes blocks of just these shapes, if there are any."""
    # Of both factors the outputs, and the inputs.
    pairs = [pair for layer in layers.values() for pair in zip(*layer.sizes, strict=True)]
    for bound in [-1, *sorted({first for first, _ in pairs})]:
        if all(_factorised(first * second, bound) == (first, second) for first, second in pairs):
            built = [formats.as_the_peers_build(layer, True) for layer in layers.values()]
            both = all(len(layer.parts[0]) == 2 for layer in built)
            return {"decompose_factor": bound, "decompose_both": both}
    return None


def _factorised(size: int, bound: int) -> tuple[int, int]:
    # PEFT takes the bound itself where it divides, also where it is the larger factor.
    if bound > 0 and size % bound == 0:
        return bound, size // bound
    ((first,), (second,)) = bounded_splits((size,), 2, None if bound < 0 else bound)
    return first, second


def _rank_to_say(layer: formats.Layer) -> int:
    """Return the rank that the config has to say; of dense factors the least that makes them so."""
    if layer.rank or layer.method != "lokr":
        return layer.rank
    return max(ceil_divide(max(size), 2) for size in layer.sizes)


def _config(model: nn.Module, layers: dict[str, formats.Layer], conv: bool) -> dict[str, Any]:
    method = next(iter(layers.values())).method
    ranks = {name: _rank_to_say(layer) for name, layer in layers.items()}
    alphas = {name: _number(layer.scale * ranks[name]) for name, layer in layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config: dict[str, Any] = {
        "peft_type": method.upper(),
        "r": rank,
        "rank_pattern": {f"^{re.escape(n)}": r for n, r in ranks.items() if r != rank},
        ALPHAS[method]: alpha,
        "alpha_pattern": {f"^{re.escape(n)}": a for n, a in alphas.items() if a != alpha},
        "target_modules": _targets(model, list(layers)),
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "task_type": None,
        "modules_to_save": None,
    }
    if method == "lora":
        config |= {"bias": "none", "fan_in_fan_out": conv}
    return config


def _number(value: float) -> float:
    # Readers in other languages may take integers alone.
    return int(value) if value.is_integer() else value


def _targets(model: nn.Module, names: list[str]) -> list[str] | str:
    """Return the shortest form that chooses these modules and no others."""
    everything = [name for name, _ in outside_adapters(model)]
    for targets in (sorted({name.rpartition(".")[2] for name in names}), sorted(names)):
        if {name for name in everything if is_named(name, targets)} == set(names):
            return targets
    return "|".join(map(re.escape, names))


def _saved_whole(
    model: nn.Module, layers: Mapping[str, nn.Module], values: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return parameters of the model that go with the adapter, and what the config says of them."""
    own = {name: read(*place).detach() for name, place in tensors_of(model).items()}
    biases = [name for name in own if name.rpartition(".")[2] == "bias"]
    of_layers = [name for name in biases if name.rpartition(".")[0] in layers]
    # "all" says something of every bias of the model, which files alone may not know.
    others = {*biases} - {*of_layers}
    kind = "all" if others & values.keys() and {*biases} <= values.keys() else "lora_only"
    if kind == "lora_only":
        biases = of_layers
    owners = {name.rpartition(".")[0] for name in values if name not in biases}
    outermost = sorted(o for o in owners if not any(o.startswith(f"{p}.") for p in owners))
    below = tuple(f"{owner}." for owner in outermost)
    inside = [layer for layer in layers if layer.startswith(below)]
    if inside or "" in owners:
        raise ValueError(
            f"replaced parameters must be of modules that PEFT can save whole, without adapted "
            f"layers in them: got {outermost} with {inside}"
        )
    options: dict[str, Any] = {"modules_to_save": outermost} if outermost else {}
    found = {name: values.get(name, own[name]) for name in own if name.startswith(below)}
    if any(name in values for name in biases):
        for name in biases:
            if name not in found:
                layer = name.rpartition(".")[0]
                key = f"{layer}.base_layer.bias" if layer in layers else name
                found[key] = values.get(name, own[name])
                options["bias"] = kind
    return found, options


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a model but its adapters'."""
    return {
        f"{path}.{leaf}".lstrip("."): parameter.detach()
        for path, module in outside_adapters(model)
        for leaf, parameter in module.named_parameters(recurse=False)
    }
