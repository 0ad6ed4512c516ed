"""Choose the layers to adapt: suffixes, a regular expression, all, or a predicate."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence

from torch import nn
from torch.nn.parameter import is_lazy

from superlora.errors import some
from superlora.torch.layers import is_adaptable, parameter_of
from superlora.torch.walk import outside_adapters

Predicate = Callable[[str, nn.Module], bool]
Targets = str | Sequence[str] | Predicate

ALL_LINEAR = "all-linear"


def find_targets(model: nn.Module, targets: Targets) -> dict[str, nn.Module]:
    """Return the layers of `model` that `targets` chooses, in the model's order."""
    modules = {
        name: module for name, module in outside_adapters(model) if name or is_adaptable(module)
    }
    chosen = _choose(model, modules, targets)
    unfit = [name for name in chosen if not is_adaptable(modules[name])]
    if unfit:
        kinds = sorted({type(modules[name]).__name__ for name in unfit})
        raise ValueError(
            f"targets must match Linear or Conv1D layers: got {some(map(repr, unfit))} of type "
            f"{', '.join(kinds)}"
        )
    found = {name: modules[name] for name in chosen}
    parents = {"": model, **modules}
    for name, module in found.items():
        wrong = _unfit(name, module, parents.get(name.rpartition(".")[0]))
        if wrong:
            raise ValueError(f"targets must {wrong}")
        dtype = parameter_of(module).dtype
        if not dtype.is_floating_point:
            raise TypeError(
                f"targets must match weights of a floating-point type: {name!r} is {dtype}"
            )
    _check_untied(model, found)
    return found


def is_named(name: str, ends: Iterable[str]) -> bool:
    """Return whether a dotted name is one of `ends`, or ends with one after a dot."""
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _choose(model: nn.Module, modules: dict[str, nn.Module], targets: Targets) -> list[str]:
    none = "the model has none"
    if callable(targets) and not isinstance(targets, nn.Module):
        chosen = [name for name, module in modules.items() if targets(name, module)]
        none = "the predicate chose none"
    elif targets == ALL_LINEAR:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        chosen = [n for n, module in modules.items() if is_adaptable(module) and module is not head]
    elif isinstance(targets, str):
        try:
            compiled = re.compile(targets)
        except re.error as error:
            raise ValueError(
                f"targets must be a valid regular expression: got {targets!r} ({error})"
            ) from None
        chosen = [name for name in modules if compiled.fullmatch(name)]
        if not chosen:
            none = (
                f"{targets!r} matched no layer; a string must match a whole name, a list holds "
                f"suffixes; the nearest names are {_nearest(targets, modules)}"
            )
    else:
        return _match_suffixes(modules, targets)
    if not chosen:
        raise ValueError(f"targets must match at least one layer: {none}")
    return chosen


def _match_suffixes(modules: dict[str, nn.Module], suffixes: object) -> list[str]:
    if not isinstance(suffixes, Sequence) or not all(isinstance(item, str) for item in suffixes):
        raise TypeError(
            "targets must be a list of names, a regular expression, 'all-linear' or a predicate: "
            f"got {suffixes!r}"
        )
    if not suffixes:
        raise ValueError("targets must hold at least one name: got an empty list")
    chosen: set[str] = set()
    for index, suffix in enumerate(suffixes):
        matched = [name for name in modules if is_named(name, [suffix])]
        if not matched:
            raise ValueError(
                f"targets[{index}]={suffix!r} matched no layer; the nearest names are "
                f"{_nearest(suffix, modules)}"
            )
        chosen.update(matched)
    return [name for name in modules if name in chosen]


def _nearest(wanted: str, modules: dict[str, nn.Module]) -> str:
    names = [name for name, module in modules.items() if is_adaptable(module)]
    # A suffix is compared with the ends of the names, so that depth does not count.
    ends: dict[str, str] = {}
    for name in names:
        for depth in range(1, name.count(".") + 2):
            ends.setdefault(".".join(name.split(".")[-depth:]), name)
    close = difflib.get_close_matches(wanted, ends, n=5, cutoff=0.5)
    return some(map(repr, dict.fromkeys(ends[end] for end in close) or names)) or "none: no layers"


def _unfit(name: str, module: nn.Module, parent: nn.Module | None) -> str:
    """Return the rule that a layer breaks, if any."""
    weight = module._parameters.get("weight")
    if weight is None:
        return (
            f"match layers with a weight of their own: {name!r} has none, or computes it "
            "(pruned, parametrized)"
        )
    if is_lazy(weight):
        return f"match layers whose shape is known: {name!r} is lazy; call the model once first"
    if weight.is_inference():
        return f"match weights made outside torch.inference_mode(): {name!r} was not"
    # These read a layer's weight themselves, so the layer's forward, and with it
    # the adapter, would be passed over in silence.
    if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        return (
            f"match layers whose own forward is called: {name!r} is read directly by its parent, "
            f"a {type(parent).__name__}"
        )
    return ""


def _check_untied(model: nn.Module, found: dict[str, nn.Module]) -> None:
    owners: dict[int, dict[int, str]] = {}
    for name, module in outside_adapters(model):
        for key, parameter in module._parameters.items():
            owners.setdefault(id(parameter), {}).setdefault(id(module), f"{name}.{key}".lstrip("."))
    for name, module in found.items():
        names = sorted(owners[id(module.weight)].values())
        if len(names) > 1:
            raise ValueError(
                f"targets must not match a weight that two modules share: {name!r} shares "
                f"{' and '.join(map(repr, names))}"
            )
