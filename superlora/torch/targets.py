"""Choose the weights to adapt, and say of each layer that is left out why."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from superlora.errors import some
from superlora.torch.heads import heads_of
from superlora.torch.layers import ADAPTABLE, KINDS, Weight, is_linear
from superlora.torch.reads import returns_several
from superlora.torch.selection import Inventory, Selection, complete

Predicate = Callable[[str, nn.Module], bool]
Targets = str | Sequence[str] | Predicate | Mapping[str, Any]

ALL_LINEAR = "all-linear"
ALL = "all"
# Parameters that "all" leaves out: they are added to activations, or index them.
_NO_MATRIX = re.compile(r"embed|token|pos|bias|quer|mask|prompt|latent|gamma|scale|anchor|cls|mean")


# Of diffusers' attention, by the projections that `fuse_projections` joins.
FUSED = {
    **dict.fromkeys(("to_q", "to_k", "to_v"), ("to_qkv",)),
    **dict.fromkeys(("to_k", "to_v"), ("to_qkv", "to_kv")),
    **dict.fromkeys(("add_q_proj", "add_k_proj", "add_v_proj"), ("to_added_qkv",)),
}


def find_targets(
    model: nn.Module,
    targets: Targets,
    *,
    exclude: Any = None,
    layers: Any = None,
    tied: str = "refuse",
) -> Selection:
    """Return the weights of `model` that `targets` chooses, in the model's order."""
    if tied not in ("refuse", "once"):
        raise ValueError(f"tied must be 'refuse' or 'once': got {tied!r}")
    held = Inventory(model)
    left_out: dict[str, str] = {}
    rows: dict[str, tuple[int, int]] = {}
    designs: dict[str, Any] = {}
    if isinstance(targets, Mapping):
        chosen = _of_mapping(held, targets, left_out, rows, designs, tied)
    else:
        chosen = _choose(held, targets, left_out, tied)
    kept = _without(held, chosen, exclude, left_out, rows)
    kept = _of_numbers(kept, layers, left_out)
    if not kept:
        why = f": {some(f'{n!r} {w}' for n, w in left_out.items())}" if left_out else ""
        raise ValueError(f"targets must match at least one layer: all are left out{why}")
    weights: dict[str, Weight] = {}
    for name in kept:
        layer = name.rpartition(".")[0] if name in rows else name
        weight = held.get(layer)
        if weight is None:
            raise ValueError(_not_adaptable(held, kept))
        _check_fit(held, layer, weight, tied)
        weights[name] = weight
    selection = Selection(
        weights,
        {name: rows[name] for name in kept if name in rows},
        left_out=left_out,
        designs={name: designs[name] for name in kept if name in designs},
    )
    complete(selection, held, tied)
    return selection


def find_named(
    model: nn.Module, names: Sequence[str], rows: Mapping[str, tuple[int, int]], tied: str
) -> tuple[Selection, list[str]]:
    """Return the weights of these names, in this order, and what is wrong with others."""
    held = Inventory(model)
    found: dict[str, Weight] = {}
    problems = []
    for name in names:
        layer = name.rpartition(".")[0] if name in rows else name
        weight = held.get(layer)
        if weight is None:
            module = held.modules.get(layer)
            kind = f"{layer!r} is a {type(module).__name__}"
            problems.append(f"no layer {layer!r}" if module is None else kind)
            continue
        height = weight.shape[0] if name in rows else 0
        if name in rows and not 0 <= rows[name][0] < rows[name][1] <= height:
            problems.append(f"{layer!r} has {height} rows instead of {rows[name]}")
            continue
        found[name] = weight
    if not problems:
        for name, weight in found.items():
            _check_fit(held, name.rpartition(".")[0] if name in rows else name, weight, tied)
    selection = Selection(found, dict(rows))
    if not problems:
        complete(selection, held, tied)
    return selection, problems


def fused_into(parent: nn.Module | None, leaf: str) -> str:
    """Return the layer into which diffusers has fused a projection, if it has."""
    if not getattr(parent, "fused_projections", False):
        return ""
    whole = FUSED.get(leaf, ())
    return next((each for each in whole if hasattr(parent, each)), "")


def is_named(name: str, ends: Iterable[str]) -> bool:
    """Return whether a dotted name is one of `ends`, or ends with one after a dot."""
    tails = [name[place + 1 :] for place, before in enumerate(name) if before == "."]
    return not {name, *tails}.isdisjoint(ends)


def _choose(held: Inventory, targets: Any, left_out: dict[str, str], tied: str) -> list[str]:
    none = "the model has none"
    if callable(targets) and not isinstance(targets, nn.Module):
        names = [n for n, m in held.modules.items() if n or n in held.layers]
        chosen = [name for name in names if targets(name, held.modules[name])]
        none = "the predicate chose none"
    elif isinstance(targets, str) and targets in (ALL_LINEAR, ALL):
        chosen = _all(held, targets, left_out, tied)
        if left_out:
            none = some(f"{name!r} {why}" for name, why in left_out.items())
    elif isinstance(targets, str):
        chosen = _match_pattern(held, targets, "targets")
        if not chosen:
            none = (
                f"{targets!r} matched no layer; a string must match a whole name, a list holds "
                f"suffixes; the nearest names are {_nearest(targets, held)}"
            )
    else:
        return _match_suffixes(held, targets, "targets")
    if not chosen:
        raise ValueError(f"targets must match at least one layer: {none}")
    return chosen


def _match_pattern(held: Inventory, pattern: str, what: str) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{what} must be a valid regular expression: got {pattern!r} ({error})"
        ) from None
    names = [name for name in held.modules if name or name in held.layers]
    names += [name for name, weight in held.parameters.items() if _is_matrix(weight)]
    return held.names(name for name in names if compiled.fullmatch(name))


def _match_suffixes(held: Inventory, suffixes: Any, what: str) -> list[str]:
    if not isinstance(suffixes, Sequence) or not all(isinstance(item, str) for item in suffixes):
        raise TypeError(
            f"{what} must be a list of names, a regular expression, 'all-linear', 'all', a "
            f"predicate or a mapping: got {suffixes!r}"
        )
    if not suffixes:
        raise ValueError(f"{what} must hold at least one name: got an empty list")
    chosen: set[str] = set()
    names = [name for name in [*held.modules, *held.parameters] if name or name in held.layers]
    for index, suffix in enumerate(suffixes):
        matched = [name for name in names if is_named(name, [suffix])]
        if not matched:
            raise ValueError(
                f"{what}[{index}]={suffix!r} matched no layer; the nearest names are "
                f"{_nearest(suffix, held)}"
            )
        chosen.update(matched)
    return held.names(chosen)


def _all(held: Inventory, targets: str, left_out: dict[str, str], tied: str) -> list[str]:
    """Return every linear layer, or every weight, that is fit; say why others are not."""
    heads = heads_of(held.model)
    foreign = _parts_of_adapters(held)
    chosen = []
    for name, weight in held.layers.items():
        if weight.kind == "norm":
            continue
        if targets == ALL_LINEAR and not is_linear(weight.module):
            left_out[name] = f"is no linear layer: it is of type {type(weight.module).__name__}"
        elif weight.kind == "embedding":
            left_out[name] = "is an embedding"
        elif id(weight.module) in heads:
            left_out[name] = f"is {heads[id(weight.module)]}"
        elif name in foreign:
            left_out[name] = "is a part of another library's adapter"
        else:
            wrong = _unfit(held, name, weight, tied)
            if wrong:
                left_out[name] = wrong
            else:
                chosen.append(name)
    for name, weight in held.parameters.items():
        if _is_matrix(weight):
            if targets == ALL_LINEAR:
                left_out[name] = "is no linear layer, but a parameter"
                continue
            if _NO_MATRIX.search(weight.key.lower()):
                left_out[name] = "is added to activations or looked up, by its name"
                continue
            wrong = _unfit(held, name, weight, tied)
            if wrong:
                left_out[name] = wrong
            else:
                chosen.append(name)
    return chosen


def _is_matrix(weight: Weight) -> bool:
    parameter = weight.parameter
    if parameter is None or is_lazy(parameter) or parameter.dim() < 2:
        return False
    return min(parameter.shape[-2:]) > 1 and parameter.shape[0] > 1


def _parts_of_adapters(held: Inventory) -> set[str]:
    """Return the layers that other libraries, such as PEFT, have put beside a base layer."""
    around = [name for name, module in held.modules.items() if "base_layer" in module._modules]
    found = set()
    for name in held.modules:
        for outer in around:
            rest = name.removeprefix(f"{outer}." if outer else "")
            if rest != name and rest.split(".")[0] != "base_layer":
                found.add(name)
    return found


def _of_mapping(
    held: Inventory,
    targets: Mapping[Any, Any],
    left_out: dict[str, str],
    rows: dict[str, tuple[int, int]],
    designs: dict[str, Any],
    tied: str,
) -> list[str]:
    """Return what the keys of a mapping match, each by the first key that does."""
    if not targets:
        raise ValueError("targets must hold at least one name: got an empty mapping")
    chosen: set[str] = set()
    seen: set[str] = set()
    for key, value in targets.items():
        if not isinstance(key, str):
            raise TypeError(f"targets must have strings as keys: got {key!r}")
        below = _below(held, key, left_out, tied)
        if not below:
            raise ValueError(
                f"targets[{key!r}] matched no layer; the nearest names are {_nearest(key, held)}"
            )
        for name in below:
            if name in seen:
                continue
            seen.add(name)
            if value is None:
                left_out[name] = f"is left out by targets[{key!r}]"
            elif isinstance(value, Mapping) and not hasattr(value, "designs"):
                parts = _rows_of(held, name, key, value)
                rows |= parts
                chosen |= set(parts)
            else:
                designs[name] = value
                chosen.add(name)
    order = {name: index for index, name in enumerate([*held.modules, *held.parameters])}
    return sorted(chosen, key=lambda n: (order[n.rpartition(".")[0] if n in rows else n], n))


def _below(held: Inventory, key: str, left_out: dict[str, str], tied: str) -> list[str]:
    if key in (ALL_LINEAR, ALL):
        return _all(held, key, left_out, tied)
    exact = [name for name in [*held.layers, *held.parameters] if is_named(name, [key])]
    if exact:
        return exact
    inside = re.compile(rf"(^|\.){re.escape(key)}\.")
    reasons: dict[str, str] = {}
    return [name for name in _all(held, ALL_LINEAR, reasons, tied) if inside.search(name)]


def _rows_of(held: Inventory, layer: str, key: str, parts: Mapping[Any, Any]) -> dict[str, Any]:
    weight = held.layers.get(layer)
    if weight is None or not (weight.linear or weight.kind == "embedding"):
        raise ValueError(
            f"targets[{key!r}] must be a linear layer or an embedding to be cut: {layer!r}"
        )
    if not parts:
        raise ValueError(f"targets[{key!r}] must hold at least one range of rows: got none")
    height = weight.shape[0]
    found: dict[str, tuple[int, int]] = {}
    for part, bounds in parts.items():
        what = f"targets[{key!r}][{part!r}]"
        if not isinstance(part, str) or not part or "." in part:
            raise ValueError(f"{what} must have a name without dots: got {part!r}")
        if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
            raise TypeError(f"{what} must be (first row, row after the last): got {bounds!r}")
        start, stop = bounds
        if type(start) is not int or type(stop) is not int or not 0 <= start < stop <= height:
            raise ValueError(
                f"{what} must be rows of {layer!r}, 0 <= start < stop <= {height}: got {bounds!r}"
            )
        for other, (first, last) in found.items():
            if start < last and first < stop:
                raise ValueError(
                    f"{what} must not overlap with the rows of {other.rpartition('.')[2]!r}, "
                    f"{(first, last)}: got {bounds!r}"
                )
        found[f"{layer}.{part}".lstrip(".")] = (start, stop)
    return found


def _without(
    held: Inventory,
    chosen: list[str],
    exclude: Any,
    left_out: dict[str, str],
    rows: Container[str],
) -> list[str]:
    if exclude is None:
        return chosen
    if callable(exclude) and not isinstance(exclude, nn.Module):
        out = {name for name, module in held.modules.items() if exclude(name, module)}
    elif isinstance(exclude, str):
        out = set(_match_pattern(held, exclude, "exclude"))
        if not out:
            raise ValueError(
                f"exclude must match a layer: {exclude!r} matched none; a string must match a "
                "whole name, a list holds suffixes"
            )
    else:
        out = set(_match_suffixes(held, exclude, "exclude"))
    kept = []
    for name in chosen:
        layer = name.rpartition(".")[0] if name in rows else name
        # With a module all that is below it.
        if any(layer == each or layer.startswith(f"{each}.") for each in out):
            left_out[name] = "is excluded"
        else:
            kept.append(name)
    return kept


def _of_numbers(chosen: list[str], layers: Any, left_out: dict[str, str]) -> list[str]:
    """Return the names of some layers of a list of layers."""
    if layers is None:
        return chosen
    pattern, wanted = ("", layers)
    if isinstance(layers, Mapping):
        if len(layers) != 1:
            raise ValueError(f"layers must map one list of layers to numbers: got {layers!r}")
        ((pattern, wanted),) = layers.items()
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        wanted = [wanted]
    if isinstance(wanted, str) or not isinstance(wanted, Iterable):
        raise TypeError(f"layers must be numbers, such as range(8, 24): got {layers!r}")
    wanted = list(wanted)
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in wanted):
        raise TypeError(f"layers must be numbers, such as range(8, 24): got {layers!r}")
    before = rf"(?:^|.*\.){re.escape(pattern)}\." if pattern else r"(?:^|.*?\.)"
    number = re.compile(rf"{before}(\d+)(?:\.|$)")
    found = {name: number.match(name) for name in chosen}
    numbers = {name: int(match[1]) for name, match in found.items() if match}
    beyond = sorted(set(wanted) - set(numbers.values()))
    if beyond:
        there = sorted(set(numbers.values()))
        raise ValueError(
            f"layers must be numbers of adapted layers{f' of {pattern!r}' * bool(pattern)}, "
            f"{there or 'none'}: got {some(map(str, beyond))}"
        )
    for name in chosen:
        if numbers.get(name) not in wanted:
            left_out[name] = "is in none of the layers"
    return [name for name in chosen if numbers.get(name) in wanted]


def _nearest(wanted: str, held: Inventory) -> str:
    names = [name for name in held.layers if held.layers[name].kind != "norm"]
    # A suffix is compared with the ends of the names, so that depth does not count.
    ends: dict[str, str] = {}
    for name in names:
        for depth in range(1, name.count(".") + 2):
            ends.setdefault(".".join(name.split(".")[-depth:]), name)
    close = difflib.get_close_matches(wanted, ends, n=5, cutoff=0.5)
    return some(map(repr, dict.fromkeys(ends[end] for end in close) or names)) or "none: no layers"


def _not_adaptable(held: Inventory, names: Iterable[str]) -> str:
    unfit = [name for name in names if held.get(name) is None]
    kinds = sorted({type(held.modules[name]).__name__ for name in unfit})
    inside = [n for n in [*held.layers, *held.parameters] if n.startswith(f"{unfit[0]}.")]
    hint = f"; name what is inside, such as {some(map(repr, inside), 3)}" if inside else ""
    return (
        f"targets must match {ADAPTABLE}: got {some(map(repr, unfit))} of type "
        f"{', '.join(kinds)}{hint}"
    )


def _check_fit(held: Inventory, name: str, weight: Weight, tied: str) -> None:
    wrong = _unfit(held, name, weight, tied)
    if wrong:
        integer = "floating-point" in wrong
        raise (TypeError if integer else ValueError)(
            f"targets must match weights that can be adapted: {name!r} {wrong}"
        )


def _unfit(held: Inventory, name: str, weight: Weight, tied: str) -> str:
    """Return why a weight cannot be adapted, if so."""
    module = weight.module
    if weight.kind == "quantised":
        if type(module).forward is nn.Linear.forward and weight.plain:
            return f"has no weight of a floating-point type: it is {weight.parameter.dtype}"
        return ""
    parameter = module._parameters.get(weight.key)
    if parameter is None:
        return f"has no {weight.key} of its own, or computes it (pruned, parametrized)"
    if is_lazy(parameter):
        return "is lazy, so that its shape is not known; call the model once first"
    if parameter.is_inference():
        return "has a weight made inside torch.inference_mode()"
    if not (parameter.is_floating_point() or parameter.is_complex()):
        return f"has no weight of a floating-point type: it is {parameter.dtype}"
    if not weight.plain or not weight.addable:
        kind = type(parameter).__name__
        return f"has a weight that cannot be added to: a {kind} of {parameter.dtype}"
    if parameter.dim() == 0:
        return "is one number"
    if getattr(module, "max_norm", None) is not None:
        return "changes its weight in its forward: max_norm"
    if KINDS[weight.kind].linear and returns_several(module):
        return f"returns several values: it is a {type(module).__name__}"
    path, _, leaf = name.rpartition(".")
    fused = fused_into(held.modules.get(path), leaf)
    if fused:
        return f"is not called any more, since it was fused into {fused!r}"
    others = held.owners.others(module, weight.key)
    if others and tied == "refuse":
        own = f"{name}.{weight.key}" if weight.kind != "parameter" else name
        names = sorted([own.lstrip("."), *others])
        return f"shares its weight: {' and '.join(map(repr, names))} are one; tied='once' adapts it"
    return ""
