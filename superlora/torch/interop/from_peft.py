"""Read adapters that PEFT saved: a folder with a config and the tensors of one method."""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from superlora.design.patterns import check_cost, ends_of, matches, starts_of
from superlora.design.spec import Spec
from superlora.errors import some
from superlora.presets import vera
from superlora.torch.adapter import Adapter
from superlora.torch.attach import checked_model
from superlora.torch.dropout import Dropout
from superlora.torch.files import strict_json
from superlora.torch.files.safetensors_file import Header, read_tensors, short, unfit_dtypes
from superlora.torch.interop import formats
from superlora.torch.interop.foreign import LayerUpdate, attach_foreign, refuse, update_of
from superlora.torch.interop.formats import PEFT_FORMS
from superlora.torch.interop.to_peft import ALPHAS, CONFIG, PREFIX, WEIGHTS, parameters_of
from superlora.torch.layers import Weight, is_linear
from superlora.torch.targets import is_named
from superlora.torch.walk import outside_adapters

# Bytes of a config: of any, and for each module of the model.
_CHARACTERS = (1 << 16, 1 << 10)
_METHODS = [method.upper() for method in PEFT_FORMS]
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


def from_peft(
    model: nn.Module,
    directory: str | Path,
    *,
    name: str = "superlora",
    allow_nonfinite: bool = False,
) -> Adapter:
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
    allow_nonfinite : bool
        Read NaN and infinity too, which are refused else.

    Returns
    -------
    Adapter
        With the very factors of the files. Ranks and scales that differ between layers are
        overrides of its spec; modules and biases that PEFT saved whole replace the
        model's own, and train, until the adapter is disabled or detached. Dropout is that of the
        config.

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
    model = checked_model(model)
    folder = Path(directory)
    # What a config may cost is in proportion to the model.
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    config = _read_config(folder, len(names))
    _check_costs(folder / CONFIG, config, names)

    def check(_: Mapping[str, str], header: Header) -> _Keys:
        keys = _sort_keys(config, header)
        problems = [*keys.problems, *_check_targets(model, config, keys.layers)]
        refuse(folder / WEIGHTS, problems + _check_replaced(model, config, keys))
        return keys

    pickled = folder / "adapter_model.bin"
    path = folder / WEIGHTS
    if not path.exists() and pickled.exists():
        path = pickled
    keys, tensors = read_tensors(path, check, nonfinite=allow_nonfinite)
    modules = dict(outside_adapters(model))
    updates: dict[str, LayerUpdate] = {}
    problems = []
    for parameter, key in keys.base.items():
        layer, _, leaf = parameter.rpartition(".")
        own, value = modules[layer].get_parameter(leaf).detach(), tensors[key]
        if own.shape != value.shape or not torch.equal(own, value.to(own)):
            problems.append(
                f"{parameter!r} differs from the model's: it was saved with another base"
            )
    for layer, leaves in keys.layers.items():
        found = {leaf: tensors[key] for leaf, key in leaves.items()}
        for key in _SHARED.get(config["peft_type"], ()):
            found[key.removeprefix("base_model.")] = tensors[key]
        try:
            updates[layer] = _update(config, modules[layer], layer, found)
        except ValueError as error:
            problems.append(f"{layer!r}: {error}")
    refuse(path, problems)
    replaced = {parameter: tensors[key] for parameter, key in keys.replaced.items()}
    return attach_foreign(model, folder, updates, replaced, name, _dropout(config))


def _dropout(config: Mapping[str, Any]) -> Dropout:
    """Return what is left out in training; PEFT leaves it out of no other method's updates."""
    method = config["peft_type"].lower()
    names = {f"{method}_dropout": "dropout"}
    if method in ("loha", "lokr"):
        names = {"rank_dropout": "rank_dropout", "module_dropout": "module_dropout"}
    return Dropout({own: config[key] for key, own in names.items() if config.get(key)})


def _read_config(folder: Path, most: int) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        below = sorted(found.parent.name for found in folder.glob(f"*/{CONFIG}"))
        hint = f"; its sub-folders {below} have one each" if below else ""
        raise FileNotFoundError(f"no {CONFIG} in {folder}, the folder that PEFT saved{hint}")
    longest = _CHARACTERS[0] + _CHARACTERS[1] * most
    if path.stat().st_size > longest:
        raise ValueError(
            f"{path} must have at most {longest:,} bytes for such a model: got "
            f"{path.stat().st_size:,}"
        )
    try:
        config = strict_json.parse(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON: {short(error)}") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in _METHODS:
        raise ValueError(
            f"{path} must be of peft_type {', '.join(_METHODS)}: got {short(repr(kind))}"
        )
    problems = [f"{option}={config[option]!r}" for option in _OTHER_FORWARD if config.get(option)]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_OTHER_BASE):
        problems.append(
            f"init_lora_weights={start!r}, relative to other base weights: save it with "
            "path_initial_model_for_weight_conversion"
        )
    if problems:
        raise ValueError(
            f"{path} must have no option beyond plain {kind}: got {short(some(problems))}"
        )
    _check_values(path, config)
    try:
        _dropout(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} must have valid values: {short(error)}") from None
    return dict(config)


def _check_values(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a config whose numbers and patterns are none."""
    targets, indices = config.get("target_modules"), config.get("layers_to_transform")
    many = indices if isinstance(indices, list) else [0 if indices is None else indices]
    fits = {
        "r": isinstance(config.get("r"), int) and _is_number(config["r"], 1),
        # A list of targets holds ends of names, all else is or may be a pattern.
        "target_modules": _are_names(targets, patterns=isinstance(targets, str)),
        "layers_to_transform": all(type(index) is int for index in many),
        "bias": isinstance(config.get("bias", "none"), str),
        "fan_in_fan_out": isinstance(config.get("fan_in_fan_out", False), bool),
        "use_rslora": isinstance(config.get("use_rslora", False), bool),
    }
    alpha = ALPHAS.get(config["peft_type"].lower())
    if alpha:
        fits[alpha] = _is_number(config.get(alpha))
    for key in ("exclude_modules", "modules_to_save", "layers_pattern"):
        value = config.get(key)
        listed = isinstance(value, list) or key != "modules_to_save"
        fits[key] = value is None or (listed and _are_names(value))
    problems = []
    for key, least in (("rank_pattern", 1), ("alpha_pattern", -math.inf)):
        pattern = config.get(key) or {}
        fits[key] = isinstance(pattern, dict) and all(
            _is_number(number, least) for number in pattern.values()
        )
        names = pattern if fits[key] else ()
        problems += [f"{key} {name!r}" for name in names if not _are_names(name)]
    problems += [f"{key}={config.get(key)!r}" for key, good in fits.items() if not good]
    if problems:
        raise ValueError(f"{path} must have valid values: got {short(some(problems))}")


def _is_number(value: object, least: float = -math.inf) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= sys.float_info.max and value >= least


def _are_names(value: object, patterns: bool = True) -> bool:
    """Return whether a value is a name or a list of names, which are valid patterns if asked."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return False
    try:
        for name in names if patterns else ():
            re.compile(name)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


@dataclass
class _Keys:
    """A file's keys: by layer and leaf, by the model's parameter, and what is wrong."""

    layers: dict[str, dict[str, str]]
    replaced: dict[str, str]
    base: dict[str, str]  # weights of adapted layers, which PEFT saves beside an adapted head
    problems: list[str]


def _sort_keys(config: Mapping[str, Any], header: Header) -> _Keys:
    method = config["peft_type"].lower()
    known = set().union(*formats.names_of(PEFT_FORMS[method]))
    shared = _SHARED.get(config["peft_type"], ())
    keys = _Keys({}, {}, {}, [])
    rest: dict[str, str] = {}
    for key in header:
        path = re.sub(r"\.modules_to_save\.(default\.)?", ".", key.removeprefix(PREFIX))
        leaf = next((leaf for leaf in known if path.endswith(f".{leaf}")), None)
        if key in shared or ".original_module." in path:
            continue
        if not key.startswith(PREFIX):
            keys.problems.append(f"extra {key!r}")
        elif leaf is not None:
            keys.layers.setdefault(path.removesuffix(f".{leaf}"), {})[leaf] = key
        else:
            rest[path.replace(".base_layer.", ".")] = key
    for parameter, key in rest.items():
        layer, _, leaf = parameter.rpartition(".")
        biased = leaf == "bias" and config.get("bias", "none") != "none"
        # With ensure_weight_tying the modules that shared a weight with a saved one too.
        if biased or _is_saved_whole(config, layer) or config.get("ensure_weight_tying"):
            keys.replaced[parameter] = key
        elif layer in keys.layers and leaf == "weight":
            keys.base[parameter] = key
        else:
            keys.problems.append(f"extra {key!r}")
    whole = set(keys.replaced.values())  # with counts of batches
    keys.problems += unfit_dtypes({key: own for key, own in header.items() if key not in whole})
    keys.problems += [f"missing {key!r}" for key in shared if key not in header]
    for layer, found in keys.layers.items():
        if set(found) not in formats.names_of(PEFT_FORMS[method]):
            keys.problems.append(f"{layer!r} has {sorted(found)}, none of the forms of its method")
    if not keys.layers:
        keys.problems.append(f"no tensor of a {config['peft_type']} layer")
    return keys


def _is_saved_whole(config: Mapping[str, Any], module: str) -> bool:
    """Return whether PEFT saves a module, or one that has it: by the end of its name."""
    parts = module.split(".")
    names = tuple(config.get("modules_to_save") or ())
    return any(".".join(parts[: count + 1]).endswith(names) for count in range(len(parts)))


def _check_replaced(model: nn.Module, config: Mapping[str, Any], keys: _Keys) -> list[str]:
    """Return the parameters that PEFT would have saved and the file lacks."""
    kind = config.get("bias", "none")
    problems = []
    for name in parameters_of(model):
        path, _, leaf = name.rpartition(".")
        # "lora_only", "vera_only"
        chosen = kind == "all" or (kind.endswith("_only") and path in keys.layers)
        biased = chosen and leaf == "bias"
        if (biased or _is_saved_whole(config, path)) and name not in keys.replaced:
            problems.append(f"missing {name!r}, which the config says was saved")
    return problems


def _check_targets(
    model: nn.Module, config: Mapping[str, Any], layers: Mapping[str, Any]
) -> list[str]:
    """Return where config, tensors and model disagree on the layers."""
    modules = dict(outside_adapters(model))
    problems = [f"no layer {layer!r} in the model" for layer in layers if layer not in modules]
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    problems += [
        f"{layer!r} has another name too, under which PEFT leaves it as it was"
        for layer in layers
        if layer in modules and names[id(modules[layer])] > 1
    ]
    targets = config["target_modules"]
    if targets == "all-linear":
        return problems
    problems += [
        f"{layer!r} is no target of the config"
        for layer in layers
        if not _matches(targets, layer) or _is_excluded(config, layer)
    ]
    wanted = [
        layer
        for layer, module in modules.items()
        if is_linear(module) and _matches(targets, layer) and _is_transformed(config, layer)
    ]
    problems += [f"missing the tensors of {name!r}" for name in wanted if name not in layers]
    for key in ("rank_pattern", "alpha_pattern"):
        problems += [
            f"{key} {pattern!r} matches no layer with tensors"
            for pattern in config.get(key) or ()
            if not any(_has_pattern(pattern, layer) for layer in layers)
        ]
    return problems + _turned(config, modules, layers)


def _turned(
    config: Mapping[str, Any], modules: Mapping[str, nn.Module], layers: Mapping[str, Any]
) -> list[str]:
    """Return the layers for whose class PEFT itself would correct what the config says."""
    kinds = {type(modules[layer]).__name__ == "Conv1D" for layer in layers if layer in modules}
    said = config.get("fan_in_fan_out")
    # It corrects it layer by layer, with a warning; wrong for all, the config is another model's.
    if config["peft_type"] != "LORA" or said is None or len(kinds) != 1 or said in kinds:
        return []
    return [f"fan_in_fan_out={said} contradicts the layers, which are all of the other kind"]


def _matches(names: Any, layer: str) -> bool:
    if isinstance(names, str):
        return matches(names, layer)
    return is_named(layer, names or ())


def _is_transformed(config: Mapping[str, Any], layer: str) -> bool:
    """Return whether PEFT adapts a layer that is named like a target."""
    saved = config.get("modules_to_save") or ()
    if any(ends_of(_whole(name), layer) for name in saved):
        return False
    return not _is_excluded(config, layer)


def _is_excluded(config: Mapping[str, Any], layer: str) -> bool:
    """Return whether a config leaves out a layer that is named like a target."""
    if _matches(config.get("exclude_modules"), layer):
        return True
    indices = config.get("layers_to_transform")
    targets = config["target_modules"]
    if indices in (None, []) or isinstance(targets, str) or layer in targets:
        return False
    names = config.get("layers_pattern") or []
    names = [names] if isinstance(names, str) else names
    parts = layer.split(".")
    numbers = [place for place, part in enumerate(parts[:-1]) if part.isdecimal()]
    for name in names or [None]:
        for place in numbers:
            before = ".".join(parts[:place])
            found = place > 1 if name is None else matches(name, before, starts_of(before))
            if found and (place or name is None):
                return int(parts[place]) not in ([indices] if isinstance(indices, int) else indices)
    return True


def _whole(name: str) -> str:
    """Return the pattern by which PEFT finds what lies in a module that is saved whole."""
    return rf"(^|.*\.){name}($|\..*)"


def _has_pattern(pattern: str, layer: str) -> bool:
    return matches(rf"(?:{pattern})$", layer, starts_of(layer))


def _check_costs(path: Path, config: Mapping[str, Any], names: list[str]) -> None:
    """Refuse patterns that cost too much to match with a model's names."""
    many = [config.get(key) for key in ("target_modules", "exclude_modules")]
    patterns = [own for own in many if isinstance(own, str)]
    own = config.get("layers_pattern") or []
    patterns += [own] if isinstance(own, str) else own
    patterns += map(_whole, config.get("modules_to_save") or ())
    for key in ("rank_pattern", "alpha_pattern"):
        if len(config.get(key) or ()) > len(names):
            raise ValueError(f"{path} must have no more patterns than layers: got more in {key}")
        patterns += [f"(?:{pattern})$" for pattern in config.get(key) or ()]
    try:
        check_cost(patterns, names)
    except (ValueError, re.error, RecursionError) as error:
        raise ValueError(f"{path} must have valid values: {short(error)}") from None


def _update(
    config: Mapping[str, Any], module: nn.Module, layer: str, found: Mapping[str, Tensor]
) -> LayerUpdate:
    method = config["peft_type"].lower()
    rank = _of_pattern(config.get("rank_pattern"), layer, config["r"])
    if method == "vera":
        return _vera_update(rank, Weight.of(module).shape[1] if is_linear(module) else 1, found)
    alpha = _of_pattern(config.get("alpha_pattern"), layer, config[ALPHAS[method]])
    parts = formats.parts_of(found, PEFT_FORMS[method])
    if formats.rank_of(parts) not in (None, rank):
        raise ValueError(f"must have rank {rank}, as the config says: got {formats.rank_of(parts)}")
    if method == "lokr":  # its rank sets the scale of dense factors too
        return update_of(method, parts, scale=alpha / rank)
    rslora = method == "lora" and bool(config.get("use_rslora"))
    return update_of(method, parts, alpha=alpha, rslora=rslora)


def _vera_update(rank: int, columns: int, found: Mapping[str, Tensor]) -> LayerUpdate:
    right, left = found["vera_A"], found["vera_B"]
    b, d = found["vera_lambda_b"], found["vera_lambda_d"]
    fits = left.dim() == right.dim() == 2 and formats.rank_of([(left, right)]) == rank
    if not fits or d.shape != (rank,) or b.dim() != 1:
        shapes = {leaf: tuple(tensor.shape) for leaf, tensor in found.items()}
        raise ValueError(f"must have rank {rank}, as the config says: got {shapes}")
    spec = vera(rank)
    fields = {key: getattr(spec, key) for key in ("rank", "splits", "combine", "core", "tied")}
    fields["frozen"] = {"0.factor0": "stored", "0.factor1": "stored", "1.factor1": "ones"}
    blocks = {"0.core": d, "0.factor0": left, "0.factor1": right.t(), "1.factor0": b[:, None]}
    return LayerUpdate(Spec(**fields), blocks, (len(b), columns))


def _of_pattern(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if _has_pattern(pattern, layer):
            return value
    return default
