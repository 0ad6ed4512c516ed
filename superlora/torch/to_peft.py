"""Write an adapter as a folder that PEFT loads."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from superlora.shapes import bounded_splits, ceil_divide
from superlora.torch.adapter import Adapter
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
from superlora.torch.files import write_tensors
from superlora.torch.from_peft import CONFIG, PREFIX, WEIGHTS
from superlora.torch.layers import is_transposed
from superlora.torch.targets import is_named
from superlora.torch.walk import outside_adapters


def save_peft(
    adapter: Adapter, directory: Path, rank: int | None = None, energy: float | None = None
) -> Export:
    """Write an adapter as PEFT's ``adapter_config.json`` and ``adapter_model.safetensors``.

    Parameters
    ----------
    adapter : Adapter
        An attached adapter.
    directory : pathlib.Path
        The folder; made if there is none.
    rank : int, optional
        Rank to truncate to, where there is no exact counterpart.
    energy : float, optional
        Keep the least rank with this part of the squares of the singular values.

    Returns
    -------
    Export
        Format and relative error of every layer.

    Raises
    ------
    AdapterError
        If the adapter is not attached.
    IsADirectoryError
        If one of the files is a folder.
    NotADirectoryError
        If `directory` is a file.
    ValueError
        If an update needs a rank or an energy and none is given.
    """
    check_export(adapter, rank, energy)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"directory must be a folder: got {directory}")
    for name in (CONFIG, WEIGHTS):
        if (directory / name).is_dir():
            raise IsADirectoryError(f"directory must have no folder {name}: got {directory}")
    layers, errors, method, options = _layers(adapter, rank, energy)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for leaf, values in _tensors(layer).items():
            tensors[f"{PREFIX}{name}.{leaf}"] = written(adapter, values)
    whole, biases, kind = _replaced(adapter)
    tensors |= {PREFIX + key: value for key, value in {**whole, **biases}.items()}
    config = _config(adapter, layers, method, options)
    if whole:
        owners = {key.rpartition(".")[0] for key in whole}
        inner = {one for one in owners for other in owners if one.startswith(f"{other}.")}
        config["modules_to_save"] = sorted(owners - inner)
    if biases:
        config["bias"] = kind
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{CONFIG}.part"
    try:
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        write_tensors(directory / WEIGHTS, tensors, {"format": "pt"})
        os.replace(temporary, directory / CONFIG)
    finally:
        temporary.unlink(missing_ok=True)
    return Export(directory, {name: layer.method for name, layer in layers.items()}, errors)


def _layers(
    adapter: Adapter, rank: int | None, energy: float | None
) -> tuple[dict[str, Layer], dict[str, float], str, dict[str, Any]]:
    """Return all layers in the one method that a folder of PEFT's can hold."""
    exact = {name: exact_layer(adapter, name) for name in adapter.plan.shapes}
    methods = {layer.method if layer else "" for layer in exact.values()}
    errors = dict.fromkeys(exact, 0.0)
    found = {name: layer for name, layer in exact.items() if layer is not None}
    conv = any(is_transposed(module) for module in adapter.layers().values())
    if methods == {"lora"}:
        return found, errors, "LORA", {}
    if methods == {"loha"} and not conv:
        return found, errors, "LOHA", {}
    if methods == {"lokr"} and not conv:
        options = _lokr_options(found)
        if options is not None:
            both = options["decompose_both"]
            built = {name: as_the_peers_build(layer, both) for name, layer in found.items()}
            return built, errors, "LOKR", options
    layers = {}
    for name, layer in exact.items():
        if layer is not None and layer.method == "lora":
            layers[name] = layer
        else:
            layers[name], errors[name] = low_rank_layer(adapter, name, rank, energy)
    return layers, errors, "LORA", {}


def _lokr_options(layers: dict[str, Layer]) -> dict[str, Any] | None:
    """Return the options with which PEFT makes blocks of just these shapes, if there are any."""
    sizes = [_sizes(layer) for layer in layers.values()]
    bounds = [-1, *sorted({size for (size, _), _ in sizes} | {size for _, (size, _) in sizes})]
    bound = next(
        (b for b in bounds if all(_factorised(m * n, b) == (m, n) for s in sizes for m, n in s)),
        None,
    )
    if bound is None:
        return None
    both = all(len(as_the_peers_build(layer, True).parts[0]) == 2 for layer in layers.values())
    return {"decompose_factor": bound, "decompose_both": both}


def _sizes(layer: Layer) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the outputs and the inputs of both factors of a LoKr."""
    first, second = layer.parts
    outputs = (first[0].shape[0], second[0].shape[0])
    return outputs, (first[-1].shape[1], second[-1].shape[1])


def _factorised(size: int, bound: int) -> tuple[int, int]:
    # PEFT takes the bound itself where it divides, also where it is the larger factor.
    if bound > 0 and size % bound == 0:
        return bound, size // bound
    ((first,), (second,)) = bounded_splits((size,), 2, None if bound < 0 else bound)
    return first, second


def _tensors(layer: Layer) -> dict[str, Tensor]:
    if layer.method == "lora":
        ((up, down),) = layer.parts
        return {"lora_A.weight": down, "lora_B.weight": up}
    return named_parts(layer)


def _rank(layer: Layer) -> int:
    """Return the rank that the config has to say; of dense factors the least that makes them so."""
    if layer.rank or layer.method != "lokr":
        return layer.rank
    return max(ceil_divide(max(part[0].shape), 2) for part in layer.parts)


def _config(
    adapter: Adapter, layers: dict[str, Layer], method: str, options: dict[str, Any]
) -> dict[str, Any]:
    ranks = {name: _rank(layer) for name, layer in layers.items()}
    alphas = {name: layer.scale * ranks[name] for name, layer in layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    model = adapter.model
    config: dict[str, Any] = {
        "peft_type": method,
        "r": rank,
        "rank_pattern": {f"^{re.escape(n)}": r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(n)}": a for n, a in alphas.items() if a != alpha},
        "target_modules": _targets(model, list(layers)),
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "task_type": None,
        "modules_to_save": None,
        **options,
    }
    if method == "LORA":
        conv = all(is_transposed(module) for module in adapter.layers().values())
        return {**config, "lora_alpha": alpha, "bias": "none", "fan_in_fan_out": conv}
    return {**config, "alpha": alpha}


def _targets(model: nn.Module, names: list[str]) -> list[str] | str:
    """Return the shortest form that chooses these modules and no others."""
    everything = [name for name, _ in outside_adapters(model)]
    for targets in (sorted({name.rpartition(".")[2] for name in names}), sorted(names)):
        if {name for name in everything if is_named(name, targets)} == set(names):
            return targets
    return "|".join(map(re.escape, names))


def _replaced(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """Return parameters of modules saved whole, biases, and PEFT's word for which biases."""
    if adapter.replaced is None:
        return {}, {}, "none"
    model, layers, values = adapter.model, adapter.layers(), adapter.replaced.values()
    own = {
        f"{path}.{leaf}".lstrip("."): parameter.detach()
        for path, module in outside_adapters(model)
        for leaf, parameter in module.named_parameters(recurse=False)
    }
    every_bias = {name for name in own if name.rpartition(".")[2] == "bias"}
    kind = "all" if every_bias <= set(values) else "lora_only"
    of_layers = {f"{layer}.bias" for layer in layers}
    chosen = every_bias if kind == "all" else every_bias & of_layers
    owners = {name.rpartition(".")[0] for name in values if name not in chosen}
    outermost = sorted(o for o in owners if not any(o.startswith(f"{p}.") for p in owners))
    whole = {
        name: values.get(name, own[name])
        for name in own
        if name.startswith(tuple(f"{o}." for o in outermost))
    }
    inside = [layer for layer in layers if layer.startswith(tuple(f"{o}." for o in outermost))]
    if inside or "" in owners:
        raise ValueError(
            f"replaced parameters must be of modules that PEFT can save whole, without adapted "
            f"layers in them: got {outermost} with {inside}"
        )
    biases = {}
    if set(values) & chosen:
        for name in sorted(chosen - set(whole)):
            layer = name.rpartition(".")[0]
            key = f"{layer}.base_layer.bias" if layer in layers else name
            biases[key] = values.get(name, own[name])
    return whole, biases, kind if biases else "none"
