"""Adapters in PEFT's format: a folder with adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from superlora.errors import some
from superlora.presets import vera
from superlora.torch.adapter import Adapter
from superlora.torch.files import Header, read_tensors, unfit_dtypes
from superlora.torch.foreign import (
    Foreign,
    LayerUpdate,
    Matrix,
    attach_foreign,
    check_matrices,
    factors_of,
    loha_update,
    lokr_update,
    lora_update,
    rank_of,
    refuse,
)
from superlora.torch.layers import is_adaptable

_PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# The tensors of a layer, by PEFT's name of the method.
_LEAVES = {
    "LORA": ({"lora_A.weight", "lora_B.weight"},),
    "LOHA": ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},),
    "LOKR": tuple(
        {*first, *second}
        for first in (["lokr_w1"], ["lokr_w1_a", "lokr_w1_b"])
        for second in (["lokr_w2"], ["lokr_w2_a", "lokr_w2_b"])
    ),
    "VERA": ({"vera_lambda_b", "vera_lambda_d"},),
}
_SHARED = {"VERA": ("base_model.vera_A", "base_model.vera_B")}
# Options with which the layers compute something else than the tensors above say.
_OTHER_FORWARD = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
# Initialisations that change the base weights, which such an adapter is relative to.
_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


def from_peft(model: nn.Module, directory: str | Path, *, name: str = "superlora") -> Adapter:
    """Attach an adapter that PEFT saved.

    Parameters
    ----------
    model : torch.nn.Module
        The base model that PEFT had wrapped.
    directory : str or pathlib.Path
        The folder, with ``adapter_config.json`` and ``adapter_model.safetensors``, of a
        LoRA, LoKr, LoHa or VeRA adapter.
    name : str
        The attribute of `model` under which the adapter is registered.

    Returns
    -------
    Adapter
        With the very values of the files. Ranks and scales that differ between layers are
        overrides of its spec; modules and biases that PEFT saved whole replace the
        model's own until the adapter is disabled or detached. Dropout is not taken over.

    Raises
    ------
    AdapterError
        If `model` has an attribute of that name, or a weight lies on the meta device.
    FileNotFoundError
        If a file is missing.
    ValueError
        If the method is another, tensors are missing, left over, contradict the
        config or do not fit the model: all are listed, and nothing is attached. A
        pickled file is never opened.
    """
    folder = Path(directory)
    config = _read_config(folder)
    layers: dict[str, dict[str, str]] = {}
    extra: dict[str, str] = {}

    def check(_: Mapping[str, str], header: Header) -> None:
        problems = _sort_keys(config, header, layers, extra)
        problems += _check_targets(model, config, layers)
        refuse(folder / WEIGHTS, problems)

    pickled = folder / "adapter_model.bin"
    path = folder / WEIGHTS
    if not path.exists() and pickled.exists():
        path = pickled
    tensors = read_tensors(path, check)
    updates: dict[str, LayerUpdate] = {}
    problems: list[str] = []
    for layer, keys in layers.items():
        found = {leaf: tensors[key] for leaf, key in keys.items()}
        for key in _SHARED.get(config["peft_type"], ()):
            found[key.removeprefix("base_model.")] = tensors[key]
        try:
            updates[layer] = _update(config, layer, found)
        except ValueError as error:
            problems.append(f"{layer!r}: {error}")
    refuse(path, problems)
    replaced = {parameter: tensors[key] for key, parameter in extra.items()}
    return attach_foreign(model, Foreign(folder, updates, replaced), name)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"no {CONFIG} in {folder}, the folder that PEFT saved")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON: {error}") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in _LEAVES:
        raise ValueError(f"{path} must be of peft_type {', '.join(_LEAVES)}: got {kind!r}")
    problems = [f"{option}={config[option]!r}" for option in _OTHER_FORWARD if config.get(option)]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_OTHER_BASE):
        problems.append(
            f"init_lora_weights={start!r}, relative to other base weights: save it with "
            "path_initial_model_for_weight_conversion"
        )
    if problems:
        raise ValueError(f"{path} must have no option beyond plain {kind}: got {some(problems)}")
    _check_values(path, config)
    return dict(config)


def _check_values(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a config whose numbers and patterns are none."""

    def number(value: Any, least: float = -math.inf) -> bool:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        return fits and math.isfinite(value) and value >= least

    problems = []
    if not isinstance(config.get("r"), int) or not number(config["r"], 1):
        problems.append(f"r={config.get('r')!r}")
    alpha = _alpha_key(config)
    if alpha and not number(config.get(alpha)):
        problems.append(f"{alpha}={config.get(alpha)!r}")
    for key, least in (("rank_pattern", 1), ("alpha_pattern", -math.inf)):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(number(v, least) for v in pattern.values()):
            problems.append(f"{key}={pattern!r}")
            continue
        problems += [f"{key} {name!r}" for name in pattern if not _compiles(name)]
    optional = {"exclude_modules": True, "modules_to_save": False}
    for key, pattern in {"target_modules": True, **optional}.items():
        value = config.get(key)
        listed = isinstance(value, list) and all(isinstance(item, str) for item in value)
        matched = pattern and isinstance(value, str) and _compiles(value)
        if not listed and not matched and not (value is None and key in optional):
            problems.append(f"{key}={value!r}")
    if problems:
        raise ValueError(f"{path} must have valid values: got {some(problems)}")


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _alpha_key(config: Mapping[str, Any]) -> str:
    return {"LORA": "lora_alpha", "VERA": ""}.get(config["peft_type"], "alpha")


def _sort_keys(
    config: Mapping[str, Any],
    header: Header,
    layers: dict[str, dict[str, str]],
    extra: dict[str, str],
) -> list[str]:
    """Sort a file's keys to layers and to the model's own parameters; return what is wrong."""
    known = set().union(*_LEAVES[config["peft_type"]])
    shared = _SHARED.get(config["peft_type"], ())
    whole = tuple(config.get("modules_to_save") or ())
    problems = unfit_dtypes(header)
    for key in header:
        if key in shared:
            continue
        path = key.removeprefix(_PREFIX)
        leaf = next((leaf for leaf in known if path.endswith(f".{leaf}")), None)
        parameter = path.replace(".base_layer.", ".")
        module, _, last = parameter.rpartition(".")
        if path == key:
            problems.append(f"extra {key!r}")
        elif leaf is not None:
            layers.setdefault(path.removesuffix(f".{leaf}"), {})[leaf] = key
        elif any(f".{module}.".find(f".{name}.") >= 0 for name in whole) or (
            last == "bias" and config.get("bias", "none") != "none"
        ):
            extra[key] = parameter
        else:
            problems.append(f"extra {key!r}")
    problems += [f"missing {key!r}" for key in shared if key not in header]
    for layer, found in layers.items():
        if set(found) not in _LEAVES[config["peft_type"]]:
            problems.append(f"{layer!r} has {sorted(found)}, none of the forms of its method")
    if not layers:
        problems.append(f"no tensor of a {config['peft_type']} layer")
    return problems


def _check_targets(
    model: nn.Module, config: Mapping[str, Any], layers: Mapping[str, Any]
) -> list[str]:
    """Return where config and tensors, or config and model, disagree on the layers."""
    targets = config["target_modules"]
    if targets == "all-linear":
        return []

    def matches(names: Any, layer: str) -> bool:
        if isinstance(names, str):
            return re.fullmatch(names, layer) is not None
        return any(layer == name or layer.endswith(f".{name}") for name in names or ())

    problems = [
        f"{layer!r} is no target of the config" for layer in layers if not matches(targets, layer)
    ]
    if config.get("layers_to_transform") is not None:
        return problems
    wanted = [
        layer
        for layer, module in model.named_modules()
        if is_adaptable(module)
        and matches(targets, layer)
        and not matches(config.get("exclude_modules"), layer)
    ]
    if isinstance(targets, list):
        problems += [
            f"no layer of the model is the target {target!r}"
            for target in targets
            if not any(matches([target], layer) for layer in {*wanted, *layers})
        ]
    return problems + [
        f"missing the tensors of {layer!r}" for layer in wanted if layer not in layers
    ]


def _update(config: Mapping[str, Any], layer: str, found: Mapping[str, Tensor]) -> LayerUpdate:
    kind = config["peft_type"]
    rank = _of_pattern(config.get("rank_pattern"), layer, config["r"])
    alpha = _of_pattern(config.get("alpha_pattern"), layer, config.get(_alpha_key(config), 1))
    if kind == "VERA":
        return _vera_update(rank, found)
    check_matrices(found)
    if kind == "LORA":
        parts: tuple[Matrix, ...] = ((found["lora_B.weight"], found["lora_A.weight"]),)
    else:
        parts = factors_of(found, "lokr_w" if kind == "LOKR" else "hada_w")
    if rank_of(*parts) not in (None, rank):
        raise ValueError(f"must have rank {rank}, as the config says: got {rank_of(*parts)}")
    if kind == "LOKR":  # its rank sets the scale of dense factors too
        return lokr_update(*parts, scale=alpha / rank)
    if kind == "LOHA":
        return loha_update(*parts, alpha=alpha)
    if config.get("use_rslora"):
        return lora_update(*parts[0], scale=alpha / math.sqrt(rank))
    return lora_update(*parts[0], alpha=alpha)


def _vera_update(rank: int, found: Mapping[str, Tensor]) -> LayerUpdate:
    columns, rows = found["vera_A"], found["vera_B"]
    b, d = found["vera_lambda_b"], found["vera_lambda_d"]
    if rank_of((rows, columns)) != rank or d.shape != (rank,) or b.dim() != 1:
        shapes = {leaf: tuple(tensor.shape) for leaf, tensor in found.items()}
        raise ValueError(f"must have rank {rank}, as the config says: got {shapes}")
    spec = vera(rank)
    fields = {key: getattr(spec, key) for key in ("rank", "splits", "combine", "core", "tied")}
    frozen = {"0.factor0": "stored", "0.factor1": "stored", "1.factor1": "ones"}
    blocks = {
        "0.core": d,
        "0.factor0": rows,
        "0.factor1": columns.t(),
        "1.factor0": b.reshape(-1, 1),
    }
    return LayerUpdate({**fields, "frozen": frozen}, blocks, (b.shape[0], None))


def _of_pattern(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default
