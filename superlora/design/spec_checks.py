"""What values the fields of a spec may take, alone and together."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from superlora.checks import check_count
from superlora.maps import Map
from superlora.random import check_seed

# `Spec` checks itself by this file, which cannot import it.
Spec = Any
Rank = int | str | tuple[Any, ...]

SOURCES = ("random", "ones", "stored", "singular", "singular_scaled", "singular_root")

_CHOICES: dict[str, tuple[Any, ...]] = {
    "combine": ("kronecker", "hadamard"),
    "dense_from": ("rank", "half", "never"),
    "cut": ("even", "pad"),
    "factor_scope": ("all", "block"),
}
_CORES = ("identity", "diagonal", "full", "train", None)
_FOLDS = ("natural", "stack", "balanced", "aligned")
# Array libraries bound the number of axes; a Kronecker product takes two a mode.
_MOST = 16


def pairs(name: str, value: object) -> tuple[Any, ...]:
    """Return a mapping of strings, which may hold mappings, as hashable pairs."""
    items: Any = tuple(value.items()) if isinstance(value, Mapping) else value
    listed = isinstance(items, tuple) and all(isinstance(p, tuple) and len(p) == 2 for p in items)
    if not listed or not all(isinstance(key, str) for key, _ in items):
        raise TypeError(f"{name} must be a mapping with strings as keys: got {value!r}")
    if len(dict(items)) < len(items):
        raise ValueError(f"{name} must have every key once: got {[key for key, _ in items]}")
    found = []
    for key, item in items:
        nested = isinstance(item, Mapping) and (name == "overrides" or key == "frozen")
        found.append((key, pairs(f"{name}[{key!r}]", item) if nested else item))
    return tuple(found)


def check_choice(name: str, value: object, choices: tuple[Any, ...], other: str = "") -> None:
    """Refuse a value that is none of `choices`."""
    if not any(value is choice or value == choice for choice in choices):
        listed = " ".join([", ".join(map(repr, choices)), other]).strip()
        raise ValueError(f"{name} must be one of {listed}: got {value!r}")


def _entries(name: str, value: object, splits: int) -> dict[str, Any]:
    """Return what a field has for all splits, or for each, by what messages call it."""
    if not isinstance(value, tuple):
        return {name: value}
    if len(value) != splits:
        raise ValueError(f"{name} must have one entry for each of {splits} splits: got {value}")
    return {f"{name}[{split}]": item for split, item in enumerate(value)}


def check_values(spec: Spec) -> None:
    """Refuse counts that are no fitting integers, and names that are not known."""
    for name in ("splits", "terms"):
        _check_at_most(name, getattr(spec, name))
    if check_count("frozen_terms", spec.frozen_terms, least=0) >= spec.terms:
        raise ValueError(
            f"frozen_terms must be below terms={spec.terms}, or nothing is trained: got "
            f"{spec.frozen_terms}"
        )
    for name, order in _entries("order", spec.order, spec.splits).items():
        _check_at_most(name, order)
    check_seed(spec.seed)
    if spec.first_split is not None:
        check_count("first_split", spec.first_split)
        if spec.splits < 2 or spec.combine != "kronecker":
            raise ValueError(
                "first_split must come with a Kronecker product of at least two splits: got "
                f"splits={spec.splits}, combine={spec.combine!r}"
            )
    for name, choices in _CHOICES.items():
        check_choice(name, getattr(spec, name), choices)
    for name, core in _entries("core", spec.core, spec.splits).items():
        check_choice(name, core, _CORES)
    _check_name_or_count("groups", spec.groups, "weight", "layer")
    split_ranks(spec.rank, spec.orders, spec.cores)


def _check_at_most(name: str, value: object) -> None:
    if check_count(name, value) > _MOST:
        raise ValueError(f"{name} must be at most {_MOST}: got {value}")


def _check_name_or_count(name: str, value: object, *names: str) -> None:
    if isinstance(value, str):
        check_choice(name, value, names, "or an integer")
    else:
        check_count(name, value)


def check_fold(spec: Spec) -> None:
    """Refuse folds that are neither a known name nor mode sizes."""
    fold = spec.fold
    if isinstance(fold, str):
        check_choice("fold", fold, _FOLDS)
        return
    if not isinstance(fold, tuple):
        raise TypeError(f"fold must be one of {_FOLDS} or a tuple of mode sizes: got {fold!r}")
    splits: dict[str, Any] = {"fold": fold}
    if any(isinstance(item, tuple) for item in fold):
        if spec.combine != "kronecker" or len(fold) != spec.splits:
            raise ValueError(
                f"fold must have one tuple for each of {spec.splits} splits of a Kronecker "
                f"product: got {fold} with combine={spec.combine!r}"
            )
        splits = _entries("fold", fold, spec.splits)
    for name, sizes in splits.items():
        if not isinstance(sizes, tuple):
            raise TypeError(f"{name} must be a tuple of mode sizes: got {sizes!r}")
        if len(sizes) != spec.modes:
            raise ValueError(f"{name} must have {spec.modes} modes, the order: got {sizes}")
        for mode, size in enumerate(sizes):
            if size is not None:
                check_count(f"{name}[{mode}]", size)
    # None, what is left of a weight's outputs or inputs, must say something.
    for side, modes in sides(spec.modes).items():
        left = sum(sizes[modes].count(None) for sizes in splits.values())
        if left > 1:
            raise ValueError(
                f"fold must have None once at most for the {side}: got {left} in {fold}"
            )
        if left and not (isinstance(spec.map, Map) and spec.map.keeps_fold):
            raise ValueError(
                f"fold must have no None with map={type(spec.map).__name__}, whose fold is not the "
                f"weights' own: got {fold}"
            )


def sides(modes: int) -> dict[str, slice]:
    """Return which modes of a fold are those of a weight's outputs, and of its inputs."""
    outputs = -(-modes // 2)
    return {"outputs": slice(outputs), "inputs": slice(outputs, None)}


def split_ranks(
    rank: Rank, orders: tuple[int, ...], cores: tuple[str | None, ...]
) -> tuple[Any, ...]:
    """Return one entry a split of a rank that may be nested."""
    splits = len(orders)
    # One split's modes, without the outer tuple; (r,) is that split's rank.
    bare = False
    if splits == 1 and isinstance(rank, tuple) and (len(rank) != 1 or orders == (1,)):
        bare = not any(isinstance(item, tuple) for item in rank)
    ranks: Any = (rank,) if bare else rank
    for split, (name, item) in enumerate(_entries("rank", ranks, splits).items()):
        if not isinstance(item, tuple):
            _check_name_or_count(name, item, "full")
            continue
        order = orders[split]
        if cores[split] == "train" and order > 1:
            if len(item) != order - 1:
                raise ValueError(
                    f"{'rank' if bare else name} must have {order - 1} entries, the ranks between "
                    f"{order} neighbouring modes: got {item}"
                )
        elif len(item) != order:
            raise ValueError(f"{name} must have one entry for each of {order} modes: got {item}")
        for mode, value in enumerate(item):
            _check_name_or_count(f"{name}[{mode}]", value, "full")
    return ranks if isinstance(ranks, tuple) else (ranks,) * splits


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_map(spec: Spec) -> None:
    """Refuse what is no map, and a ratio or a size that it cannot have."""
    fixed, ratio = spec.map, spec.ratio
    if not isinstance(fixed, Map):
        raise TypeError(f"map must be a superlora.maps.Map: got {fixed!r}")
    if not _is_number(ratio) or not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1]: got {ratio!r}")
    kind = type(fixed).__name__
    if fixed.keeps_size and ratio != 1:
        raise ValueError(f"ratio must be 1 with map={kind}(), which keeps the size: got {ratio}")
    fixed.check_fold(spec.modes)
    if fixed.mapped(spec.modes):
        if "train" in spec.cores:
            raise ValueError(
                f"core must not be 'train' with map={kind}(), which maps single factors: got "
                f"{spec.core!r}"
            )
        if spec.combine != "kronecker":
            raise ValueError(f"combine must be 'kronecker' with map={kind}(): got {spec.combine!r}")
        if set(spec.orders) != {spec.modes}:
            raise ValueError(f"order must be one number with map={kind}(): got order={spec.order}")
    if spec.size is None:
        return
    check_count("size", spec.size)
    if fixed.keeps_fold or ratio != 1:
        raise ValueError(
            "size must come with a map of fewer entries than it makes, and without a ratio: "
            f"got size={spec.size} with map={kind}() and ratio={ratio}"
        )


def check_factor_map(spec: Spec) -> None:
    """Refuse what is no map of the factors, or one without a number of parameters."""
    fixed = spec.factor_map
    if fixed is None:
        if spec.factor_size is not None or spec.factor_scope != "all":
            raise ValueError(
                "factor_size and factor_scope must come with a factor_map: got "
                f"{spec.factor_size} and {spec.factor_scope!r}"
            )
        return
    if not isinstance(fixed, Map):
        raise TypeError(f"factor_map must be a superlora.maps.Map or None: got {fixed!r}")
    if fixed.mapped(1) or fixed.joint:
        raise ValueError(f"factor_map must be a map of one vector: got {fixed!r}")
    if spec.factor_size is None:
        raise ValueError("factor_size must be given with a factor_map: the entries of its vector")
    check_count("factor_size", spec.factor_size)


def check_scale(spec: Spec) -> None:
    """Refuse an alpha and a scale that are no finite numbers, or exclude each other."""
    for name in ("alpha", "scale"):
        value = getattr(spec, name)
        if value is None:
            continue
        if not _is_number(value):
            raise TypeError(f"{name} must be a number: got {value!r}")
        if not abs(value) <= sys.float_info.max:
            raise ValueError(f"{name} must be finite: got {value}")
    if not isinstance(spec.rslora, bool):
        raise TypeError(f"rslora must be a bool: got {spec.rslora!r}")
    if spec.alpha is None:
        if spec.rslora:
            raise ValueError("rslora must come with alpha, which it divides by another number")
        return
    if spec.scale is not None:
        raise ValueError(f"alpha must not be given beside scale={spec.scale}: got {spec.alpha}")
    if len(integers_in(spec.rank)) != 1:
        raise ValueError(f"alpha must come with one integer rank: got rank={spec.rank!r}")


def integers_in(rank: object) -> set[int]:
    """Return the integers of a nested rank."""
    if isinstance(rank, tuple):
        return set().union(*map(integers_in, rank))
    return {rank} if isinstance(rank, int) else set()


def check_blocks(spec: Spec) -> None:
    """Refuse frozen and tied blocks that no split can have."""
    if not isinstance(spec.tied, tuple):
        raise TypeError(f"tied must be a list of blocks, as in ['0.factor1']: got {spec.tied!r}")
    known = set()
    for split, order in enumerate(spec.orders):
        kinds = ("factor", "core") if spec.cores[split] == "train" else ("factor",)
        known |= {f"{split}.{kind}{mode}" for kind in kinds for mode in range(order)}
        known.add(f"{split}.core")
    for name, blocks in (("frozen", [key for key, _ in spec.frozen]), ("tied", spec.tied)):
        for block in blocks:
            if block not in known:
                raise ValueError(
                    f"{name} must name a core or a factor of one of {spec.splits} splits, as in "
                    f"'0.core' or '0.factor1': got {block!r}"
                )
    for block, source in spec.frozen:
        check_choice(f"frozen[{block!r}]", source, SOURCES)
        if source.startswith("singular"):
            _check_singular(spec, block)


def _check_singular(spec: Spec, block: str) -> None:
    split, _, leaf = block.partition(".")
    order = spec.orders[int(split)]
    sides = (f"factor{order - 2}", f"factor{order - 1}")
    whole = spec.groups == "weight" and (spec.splits == 1 or spec.combine == "hadamard")
    natural = (spec.fold, order) in (("natural", 2), ("stack", 3)) and order == spec.modes
    natural &= spec.map.is_identity
    if leaf not in sides or not whole or not natural or block in spec.tied:
        raise ValueError(
            f"frozen[{block!r}] must be the factor of one weight's outputs or inputs to hold its "
            "singular vectors: groups='weight', fold='natural' of order 2 or 'stack' of order 3, "
            "no Kronecker product, not tied"
        )
