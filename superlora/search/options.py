"""What a layer may have: operations, their options and costs, and checks of what is given."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from superlora.checks import check_count, hashable
from superlora.errors import some

Option = int | str
"""A rank, or ``"vector"``, ``"constant"``, ``"none"``."""

Configuration = Mapping[str, Mapping[str, Option]]
"""An option for every layer and operation: ``configuration[layer][operation]``."""

# GLoRA's operations A, B, C, D and E, and the kinds of options that each may have.
KINDS: Mapping[str, tuple[str, ...]] = {
    "scale_weight": ("rank", "vector", "constant", "none"),
    "add_weight": ("rank", "vector", "constant", "none"),
    "weight_to_bias": ("rank", "vector", "none"),
    "scale_bias": ("vector", "constant", "none"),
    "add_bias": ("vector", "constant", "none"),
}


def cost_of(operation: str, option: Option, outputs: int, inputs: int) -> int:
    """Count the parameters of one support tensor."""
    if isinstance(option, int):
        return option * (inputs + (1 if operation == "weight_to_bias" else outputs))
    vector = inputs if operation == "weight_to_bias" else outputs
    return {"vector": vector, "constant": 1, "none": 0}[option]


def checked_layers(value: Any) -> dict[str, tuple[int, int]]:
    """Return the widths of layers, or say what they must be."""
    if not isinstance(value, Mapping) or not value:
        raise TypeError(f"layers must be a mapping of names to widths, not empty: got {value!r}")
    checked = {}
    for name, widths in value.items():
        if not isinstance(name, str):
            raise TypeError(f"layers must have names of type str: got {name!r}")
        pair = hashable(list(widths) if isinstance(widths, Iterable) else widths)
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TypeError(f"layers[{name!r}] must be (output width, input width): got {widths!r}")
        outputs, inputs = (check_count(f"layers[{name!r}]", width) for width in pair)
        checked[name] = (outputs, inputs)
    return checked


def checked_subset(value: Any, layers: Iterable[str]) -> tuple[str, ...]:
    """Return names of layers in the layers' order, or say what they must be."""
    names = hashable(value)
    if not isinstance(names, tuple):
        raise TypeError(f"without_bias must be a sequence of names: got {value!r}")
    every = list(layers)
    for name in names:
        check_known("without_bias", name, every)
    return tuple(name for name in every if name in names)


def checked_ranks(value: Any) -> tuple[int, ...]:
    """Return ranks in descending order, or say what they must be."""
    ranks = _several("ranks", "integers", value, functools.partial(check_count, "ranks"))
    return tuple(sorted(ranks, reverse=True))


def _several(place: str, what: str, value: Any, check: Callable[[Any], object]) -> tuple[Any, ...]:
    """Return a sequence of distinct values that pass a check, or say what it must be."""
    values = hashable(value)
    if not isinstance(values, tuple) or not values:
        raise TypeError(f"{place} must be a sequence of {what}, not empty: got {value!r}")
    for own in values:
        check(own)
    if len(set(values)) < len(values):
        raise ValueError(f"{place} must be distinct: got {list(values)}")
    return values


def refuse_rank_above(largest: int, place: str, option: object) -> None:
    """Refuse a rank that a supernet does not store."""
    if isinstance(option, int) and option > largest:
        raise ValueError(
            f"rank must be at most {largest}, the largest of the space: got {option} in {place}"
        )


def checked_operations(
    value: Any, ranks: tuple[int, ...], *, biases: bool = True
) -> dict[str, tuple[Option, ...]]:
    """Return the options of operations in their usual order, or say what they must be."""
    every: dict[str, tuple[Option, ...]] = {
        name: (*(ranks if "rank" in kinds else ()), *(kind for kind in kinds if kind != "rank"))
        for name, kinds in KINDS.items()
        if biases or name != "scale_bias"
    }
    if value is None:
        return every
    if not isinstance(value, Mapping) or not value:
        raise TypeError(f"operations must be a mapping of some operations: got {value!r}")
    unknown = [name for name in value if name not in KINDS]
    if unknown:
        raise ValueError(f"operations must be some of {list(KINDS)}: got also {unknown}")
    if "scale_bias" in value and not biases:
        raise ValueError("operations must not have 'scale_bias' where no layer has a bias")
    return {
        name: _checked_options(f"operations[{name!r}]", value[name], allowed, ranks[0])
        for name, allowed in every.items()
        if name in value
    }


def _checked_options(
    place: str, value: Any, allowed: tuple[Option, ...], largest: int
) -> tuple[Option, ...]:
    def check(option: Any) -> None:
        refuse_rank_above(largest, place, option)
        if isinstance(option, bool) or option not in allowed:
            raise ValueError(f"{place} must be of {list(allowed)}: got {option!r}")

    options = _several(place, "options", value, check)
    return tuple(option for option in allowed if option in options)


def check_known(kind: str, name: object, names: Iterable[str]) -> None:
    """Refuse a name that is none of those given."""
    listed = list(names)
    if name not in listed:
        raise ValueError(f"{kind} must be one of {some(map(repr, listed))}: got {name!r}")


def check_names(place: str, value: object, names: Iterable[str]) -> None:
    """Refuse what is no mapping with exactly these keys."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{place} must be a mapping: got {value!r}")
    expected = dict.fromkeys(names)
    missing = [name for name in expected if name not in value]
    unknown = [name for name in value if name not in expected]
    if missing or unknown:
        parts = [
            f"{word} {some(map(repr, found))}"
            for word, found in (("without", missing), ("also", unknown))
            if found
        ]
        raise ValueError(
            f"{place} must have exactly the keys {some(map(repr, expected))}: "
            f"got one {' and '.join(parts)}"
        )


def digest(value: Any) -> str:
    """Return 20 hexadecimal digits, the same for equal JSON values."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:20]
