"""What values the fields of a spec may take, alone and together."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from superlora.maps import Identity, Map, Separable
from superlora.values import check_count

if TYPE_CHECKING:
    from superlora.spec import Spec

Rank = int | str | tuple[Any, ...]

SOURCES = ("random", "ones", "stored", "singular", "singular_scaled", "singular_root")

_CHOICES: dict[str, tuple[Any, ...]] = {
    "combine": ("kronecker", "hadamard"),
    "dense_from": ("rank", "half", "never"),
    "cut": ("even", "pad"),
}
_CORES = ("identity", "diagonal", "full", "train", None)
_GROUPS = ("weight", "layer")
_FOLDS = ("natural", "stack", "balanced", "aligned")
# Array libraries bound the number of axes; a Kronecker product takes two a mode.
_MOST = 16
_BLOCK = re.compile(r"(0|[1-9][0-9]*)\.(?:core|(core|factor)(0|[1-9][0-9]*))")


def pairs(name: str, value: object) -> tuple[Any, ...]:
    """Return a mapping of strings, which may hold mappings, as hashable pairs.

    Parameters
    ----------
    name : str
        What the error message calls it.
    value : mapping or tuple of pairs
        As given by a user, or as made here before.

    Returns
    -------
    tuple of (str, Any)
        In the order given.

    Raises
    ------
    TypeError
        If it is neither.
    ValueError
        If a key stands there twice.
    """
    items: Any = tuple(value.items()) if isinstance(value, Mapping) else value
    listed = isinstance(items, tuple) and all(isinstance(p, tuple) and len(p) == 2 for p in items)
    if not listed or not all(isinstance(key, str) for key, _ in items):
        raise TypeError(f"{name} must be a mapping with strings as keys: got {value!r}")
    if len(dict(items)) < len(items):
        raise ValueError(f"{name} must have every key once: got {[key for key, _ in items]}")
    if name != "overrides":
        return tuple(items)
    found: list[tuple[str, Any]] = []
    for key, item in items:
        if item is None:
            found.append((key, None))
            continue
        fields = pairs(f"overrides[{key!r}]", item)
        found.append((key, tuple((k, pairs(k, v) if k == "frozen" else v) for k, v in fields)))
    return tuple(found)


def check_choice(name: str, value: object, choices: tuple[Any, ...], other: str = "") -> None:
    """Refuse a value that is none of `choices`.

    Parameters
    ----------
    name : str
        What the error message calls it.
    value : object
        The value.
    choices : tuple
        What it may be.
    other : str
        What else it may be, in words.

    Raises
    ------
    ValueError
        If it is none of them.
    """
    if not any(value is choice or value == choice for choice in choices):
        listed = " ".join([", ".join(map(repr, choices)), other]).strip()
        raise ValueError(f"{name} must be one of {listed}: got {value!r}")


def check_counts(spec: Spec) -> None:
    """Refuse orders, splits, terms, seeds and bounds that are no fitting integers."""
    for name in ("splits", "terms"):
        _check_at_most(name, getattr(spec, name))
    if not isinstance(spec.order, tuple):
        _check_at_most("order", spec.order)
    elif len(spec.order) != spec.splits:
        raise ValueError(
            f"order must have one entry for each of {spec.splits} splits: got {spec.order}"
        )
    for split, order in enumerate(spec.orders):
        _check_at_most(f"order[{split}]", order)
    if check_count("seed", spec.seed, least=0) >= 1 << 64:
        raise ValueError(f"seed must be below 2**64: got {spec.seed}")
    if spec.first_split is not None:
        check_count("first_split", spec.first_split)
        if spec.splits < 2 or spec.combine != "kronecker":
            raise ValueError(
                "first_split must come with a Kronecker product of at least two splits: got "
                f"splits={spec.splits}, combine={spec.combine!r}"
            )


def _check_at_most(name: str, value: object) -> None:
    if check_count(name, value) > _MOST:
        raise ValueError(f"{name} must be at most {_MOST}: got {value}")


def check_choices(spec: Spec) -> None:
    """Refuse names that are not known."""
    for name, choices in _CHOICES.items():
        check_choice(name, getattr(spec, name), choices)
    if isinstance(spec.core, tuple):
        if len(spec.core) != spec.splits:
            raise ValueError(
                f"core must have one entry for each of {spec.splits} splits: got {spec.core}"
            )
        for split, core in enumerate(spec.core):
            check_choice(f"core[{split}]", core, _CORES)
    else:
        check_choice("core", spec.core, _CORES)


def check_groups(groups: object) -> None:
    """Refuse groups that are neither a known name nor a count."""
    if isinstance(groups, str):
        check_choice("groups", groups, _GROUPS, "or an integer")
    elif isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"groups must be 'weight', 'layer' or an integer: got {groups!r}")
    else:
        check_count("groups", groups)


def check_fold(spec: Spec) -> None:
    """Refuse folds that are neither a known name nor mode sizes."""
    fold = spec.fold
    if isinstance(fold, str):
        check_choice("fold", fold, _FOLDS)
        return
    if not isinstance(fold, tuple):
        raise TypeError(f"fold must be one of {_FOLDS} or a tuple of mode sizes: got {fold!r}")
    if not any(isinstance(item, tuple) for item in fold):
        _check_sizes("fold", fold, spec.modes)
        _check_open(spec, (fold,))
        return
    if spec.combine != "kronecker" or len(fold) != spec.splits:
        raise ValueError(
            f"fold must have one tuple for each of {spec.splits} splits of a Kronecker product: "
            f"got {fold} with combine={spec.combine!r}"
        )
    for split, sizes in enumerate(fold):
        if not isinstance(sizes, tuple):
            raise TypeError(f"fold[{split}] must be a tuple of mode sizes: got {sizes!r}")
        _check_sizes(f"fold[{split}]", sizes, spec.modes)
    _check_open(spec, fold)


def _check_sizes(name: str, sizes: tuple[Any, ...], modes: int) -> None:
    if len(sizes) != modes:
        raise ValueError(f"{name} must have {modes} modes, the order: got {sizes}")
    for mode, size in enumerate(sizes):
        if size is not None:
            check_count(f"{name}[{mode}]", size)


def _check_open(spec: Spec, splits: tuple[tuple[int | None, ...], ...]) -> None:
    """Refuse sizes None, what is left of a weight's outputs or inputs, where they say nothing."""
    outputs = -(-spec.modes // 2)
    for side, modes in (("outputs", slice(outputs)), ("inputs", slice(outputs, None))):
        left = sum(sizes[modes].count(None) for sizes in splits)
        if left > 1:
            raise ValueError(
                f"fold must have None once at most for the {side}: got {left} in {spec.fold}"
            )
        if left and not (isinstance(spec.map, Map) and spec.map.keeps_fold):
            raise ValueError(
                f"fold must have no None with map={type(spec.map).__name__}, whose fold is not the "
                f"weights' own: got {spec.fold}"
            )


def _check_one_rank(name: str, rank: object) -> None:
    if isinstance(rank, str):
        check_choice(name, rank, ("full",), "or an integer")
    else:
        check_count(name, rank)


def split_ranks(
    rank: Rank, orders: tuple[int, ...], cores: tuple[str | None, ...]
) -> tuple[Any, ...]:
    """Return one entry a split of a rank that may be nested.

    Parameters
    ----------
    rank : int, "full" or nested tuple
        As in `Spec`.
    orders : tuple of K int
        The order of every split.
    cores : tuple of K str or None
        The core of every split.

    Returns
    -------
    tuple of K
        Each an int, ``"full"``, or a tuple with one entry a mode; of a train with one entry
        between two modes.

    Raises
    ------
    ValueError
        If it is nested wrongly, or an entry is no rank.
    """
    splits = len(orders)
    if not isinstance(rank, tuple):
        _check_one_rank("rank", rank)
        return (rank,) * splits
    # One split's modes, without the outer tuple; (r,) is that split's rank.
    bare = splits == 1 and not any(isinstance(item, tuple) for item in rank)
    if bare and (len(rank) != 1 or orders == (1,)):
        rank = (rank,)
    if len(rank) != splits:
        raise ValueError(f"rank must have one entry for each of {splits} splits: got {rank}")
    for split, item in enumerate(rank):
        if not isinstance(item, tuple):
            _check_one_rank(f"rank[{split}]", item)
            continue
        order = orders[split]
        if cores[split] == "train" and order > 1:
            if len(item) != order - 1:
                raise ValueError(
                    f"rank{'' if bare else f'[{split}]'} must have {order - 1} entries, the ranks "
                    f"between {order} neighbouring modes: got {item}"
                )
        elif len(item) != order:
            raise ValueError(
                f"rank[{split}] must have one entry for each of {order} modes: got {item}"
            )
        for mode, value in enumerate(item):
            _check_one_rank(f"rank[{split}][{mode}]", value)
    return rank


def check_map(spec: Spec) -> None:
    """Refuse what is no map, and a ratio or a size that it cannot have."""
    fixed, ratio = spec.map, spec.ratio
    if not isinstance(fixed, Map):
        raise TypeError(f"map must be a superlora.maps.Map: got {fixed!r}")
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1]: got {ratio!r}")
    kind = type(fixed).__name__
    if fixed.keeps_size and ratio != 1:
        raise ValueError(
            f"ratio must be 1 with map={kind}(), which has as many entries after as before: "
            f"got {ratio}"
        )
    if isinstance(fixed, Separable):
        fixed.check_fold(spec.modes)
        if "train" in spec.cores:
            raise ValueError(
                f"core must not be 'train' with map={kind}(), which maps single factors: got "
                f"{spec.core!r}"
            )
        if spec.combine != "kronecker":
            raise ValueError(
                f"combine must be 'kronecker' with map={kind}(), whose modes are mapped before "
                f"the product: got {spec.combine!r}"
            )
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
    check_choice("factor_scope", spec.factor_scope, ("all", "block"))
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
    if isinstance(fixed, Separable) or fixed.joint:
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
        if isinstance(value, bool) or not isinstance(value, (int, float)):
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
    for name, blocks in (("frozen", [key for key, _ in spec.frozen]), ("tied", spec.tied)):
        for block in blocks:
            found = _BLOCK.fullmatch(str(block))
            split = int(found[1]) if found else spec.splits
            if (
                found is None
                or split >= spec.splits
                or int(found[3] or 0) >= spec.orders[split]
                or (found[3] and found[2] == "core" and spec.cores[split] != "train")
            ):
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
    natural &= isinstance(spec.map, Identity)
    if leaf not in sides or not whole or not natural or block in spec.tied:
        raise ValueError(
            f"frozen[{block!r}] must be the factor of one weight's outputs or inputs to hold its "
            "singular vectors: groups='weight', fold='natural' of order 2 or 'stack' of order 3, "
            "no Kronecker product, not tied"
        )
