"""Fold and split: the mode sizes and ranks of one group's tensor. Integers only."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, TypeVar

from superlora.design.fold_shape import (
    Shape,
    aligned_splits,
    balanced,
    balanced_splits,
    bounded_splits,
    ceil_divide,
)
from superlora.design.spec import Spec
from superlora.design.spec_checks import sides
from superlora.maps import Map, Place

_Item = TypeVar("_Item")

# What costs nothing to write down may have this many entries, and 16 times as many as weights.
_MOST = 1 << 24


@dataclass(frozen=True)
class Split:
    """One Tucker or tensor-train factorisation of the product, of M modes."""

    shape: Shape  # as the product takes it, one size for each mode of the fold
    # As it is factored: fewer modes where its own order is lower, or those before a map of modes.
    sizes: Shape
    ranks: Shape  # of each mode, its size where it is un-factored; of a train between neighbours
    factored: tuple[bool, ...]  # whether a mode has a factor; else it is the identity
    core: str  # "full", "diagonal", stored as a vector, "identity", not stored, or "train"
    capped: bool = False  # whether an integer rank exceeded a mode's size here

    @functools.cached_property
    def block_shapes(self) -> dict[str, Shape]:
        """Shapes of ``core`` (r_1, …), ``factorM`` (d_m, r_m), a train's ``coreM`` (r, d_m, s)."""
        if self.core == "train":
            ranks = (1, *self.ranks, 1)
            return {
                f"core{mode}": (ranks[mode], size, ranks[mode + 1])
                for mode, size in enumerate(self.sizes)
            }
        blocks: dict[str, Shape] = {}
        if self.core != "identity":
            blocks["core"] = self.ranks if self.core == "full" else self.ranks[:1]
        for mode, (size, rank) in enumerate(zip(self.sizes, self.ranks, strict=True)):
            if self.factored[mode]:
                blocks[f"factor{mode}"] = (size, rank)
        return blocks

    @property
    def joined(self) -> bool:
        """Whether its own order is lower, so that the product takes it as a dense tensor."""
        return len(self.sizes) < len(self.shape)


def is_last(split: Split, leaf: str) -> bool:
    """Return whether a block is of a split's last mode, a train's core or a factor."""
    return leaf in (f"core{len(split.sizes) - 1}", f"factor{len(split.sizes) - 1}")


def neighbours(items: Sequence[_Item], order: int) -> list[list[_Item]]:
    """Cut a sequence into `order` runs of neighbours, the first ones of the most."""
    least, extra = divmod(len(items), order)
    bounds = [mode * least + min(mode, extra) for mode in range(order + 1)]
    return [list(items[start:stop]) for start, stop in itertools.pairwise(bounds)]


@dataclass(frozen=True)
class Group:
    """One tensor of the equation."""

    size: int  # entries after the map: what the weights of the group hold
    fold: Shape  # before the map; after it where it is one of single modes
    before: int  # entries before the map
    splits: tuple[Split, ...]  # of each of the products that are summed, one after the other


@dataclass(frozen=True)
class Members(Place):
    """What a group's fold may depend on besides its size."""

    divisor: int  # of all input widths and cut positions
    room: int  # entries, those of padding too


def make_group(spec: Spec, size: int, members: Members) -> Group:
    """Choose the fold and the splits of one group."""
    before = _entries(spec, members)
    if spec.combine == "kronecker":
        sizes = _split_sizes(spec, spec.splits, before, members)
        fold = tuple(map(math.prod, zip(*sizes, strict=True)))
    else:
        (fold,) = _split_sizes(spec, 1, before, members)
        sizes = (fold,) * spec.splits
    chosen = spec.combine == "kronecker" and not spec.has_sizes
    # LoKr's peers make one number times a matrix of two prime widths; a bound of 1 asks for it.
    chosen &= spec.dense_from != "half" or spec.first_split == 1
    for index, split in enumerate(sizes):
        if chosen and len(sizes) > 1 and math.prod(split) == 1:
            raise ValueError(
                f"splits must leave every split more than one entry: got split {index} of size 1 "
                f"in every mode for a fold of {before} entries; use fewer splits"
            )
    own, before = sizes, math.prod(fold)
    fixed = spec.map.bind(members)
    name = f"map={type(fixed).__name__}()"
    mapped = fixed.mapped(spec.modes)
    if mapped:
        share = spec.ratio ** (1 / (len(mapped) * len(sizes)))
        own = tuple(fixed.sizes_before(split, share) for split in sizes)
        before = math.prod(map(math.prod, own))
        for index, (after, smaller) in enumerate(zip(sizes, own, strict=True)):
            for mode in mapped:
                of_mode = fixed.mode(index * spec.modes + mode)
                check_serves(of_mode, smaller[mode], after[mode], f"mode {mode} of {name}")
    elif not fixed.in_place:
        check_serves(fixed, before, size, name)
    splits = tuple(
        _make_split(spec, index, sizes[index], own[index], rank)
        for index, rank in enumerate(spec.split_ranks)
    )
    return Group(size, fold, before, splits * spec.terms)


def check_serves(fixed: Map, before: int, size: int, name: str) -> None:
    """Refuse sizes that a map cannot serve, or that would take far more memory than the weights."""
    check_memory(f"{name} must take", before, size)
    try:
        fixed.check(before, size)
    except ValueError as error:
        raise ValueError(f"{name} must serve {before:,} entries to {size:,}: {error}") from None


def check_memory(rule: str, entries: int, size: int) -> None:
    """Refuse tensors that would take far more memory than the weights, and nothing in a file."""
    most = _MOST + 16 * size
    if entries > most:
        raise ValueError(
            f"{rule} at most {most:,} entries, for weights of {size:,}: got {entries:,}; take a "
            "smaller rank, size or fold"
        )


def _entries(spec: Spec, members: Members) -> int:
    """Return how many entries the fold has to have."""
    fixed = spec.map.fixed_entries(members)
    if fixed is not None:
        if spec.ratio != 1 or spec.size is not None:
            raise ValueError(
                f"ratio and size must be left to map={type(spec.map).__name__}(), which takes "
                f"{fixed} entries: got {spec.ratio} and {spec.size}"
            )
        return fixed
    if spec.map.keeps_fold:
        return members.room
    # 0.07 of 100 is 7, and not the 8 that binary fractions round up to.
    return spec.size or math.ceil(Fraction(repr(float(spec.ratio))) * members.room)


def _split_sizes(spec: Spec, splits: int, before: int, members: Members) -> tuple[Shape, ...]:
    if isinstance(spec.fold, tuple):
        return _explicit(spec, splits, before, members)
    parts = splits if spec.first_split is None else 1
    if spec.fold == "balanced":
        sizes = balanced_splits(before, spec.modes, parts)
    elif spec.modes == 1:
        sizes = ((before,),)
    elif not spec.map.keeps_fold:
        raise ValueError(
            f"fold must be 'balanced' or a tuple with map={type(spec.map).__name__}, whose fold is "
            f"not the weights' own: got {spec.fold!r}"
        )
    elif spec.fold == "aligned":
        sizes = aligned_splits(before, spec.modes, parts, members.divisor)
    elif spec.fold == "stack":
        sizes = (_stack(spec, before, members),)
    else:
        rows, columns = _one_weight(spec, members)
        outputs = ceil_divide(spec.modes, 2)
        sizes = (balanced(rows, outputs) + balanced(columns, spec.modes - outputs),)
    return sizes if len(sizes) == splits else bounded_splits(sizes[0], splits, spec.first_split)


def _explicit(spec: Spec, splits: int, before: int, members: Members) -> tuple[Shape, ...]:
    """Return the sizes that the fold says, of every split where it says one for all."""
    given: Any = spec.fold if spec.has_sizes else (spec.fold,)
    opened = any(None in own for own in given)
    sizes: tuple[Shape, ...] = _filled(spec, given, members) if opened else given
    fold = tuple(map(math.prod, zip(*sizes, strict=True)))
    if not spec.has_sizes:
        sizes = bounded_splits(fold, splits, spec.first_split)
    says_it = not spec.map.keeps_fold and spec.ratio == 1
    if says_it and spec.size is None and spec.map.fixed_entries(members) is None:
        return sizes
    if math.prod(fold) < before:
        raise ValueError(
            f"fold must cover the group: expected at least {before} entries, got {fold} with "
            f"{math.prod(fold)}"
        )
    # Modes of size 1 in front leave the most significant place to the next one.
    first = next((mode for mode, size in enumerate(fold) if size > 1), 0)
    needed = ceil_divide(before, math.prod(fold[first + 1 :]))
    if fold[first] > needed:
        raise ValueError(
            f"fold[{first}] must be at most {needed}, beyond which no slice of mode {first} holds "
            f"any of the {before} entries: got {fold[first]}"
        )
    return sizes


def _filled(spec: Spec, given: tuple[Any, ...], members: Members) -> tuple[Shape, ...]:
    """Return sizes with what is left of one weight's outputs and inputs in the place of None."""
    filled = [list(sizes) for sizes in given]
    widths = _one_weight(spec, members)
    for (side, modes), width in zip(sides(spec.modes).items(), widths, strict=True):
        found = [size for sizes in given for size in sizes[modes]]
        known = math.prod([size for size in found if size is not None])
        if width % known or (known != width and None not in found):
            raise ValueError(f"fold must divide the {width} {side} of a weight: got {spec.fold}")
        for sizes in filled:
            sizes[modes] = [width // known if size is None else size for size in sizes[modes]]
    return tuple(map(tuple, filled))


def _one_weight(spec: Spec, members: Members) -> tuple[int, int]:
    """Return the shape of the one whole weight of a group."""
    if len(members.shapes) != 1 or not members.whole:
        raise ValueError(
            f"fold={spec.fold!r} must have one whole weight a group: got "
            f"groups={spec.groups!r}; use fold='balanced', 'aligned' or 'stack'"
        )
    return members.shapes[0]


def _stack(spec: Spec, before: int, members: Members) -> Shape:
    distinct = sorted(set(members.shapes))
    if spec.modes == 3:
        padded = sum(map(math.prod, members.shapes)) < members.room
        if len(distinct) != 1 or not members.whole or padded:
            raise ValueError(
                "fold='stack' of order 3 must have whole weights of one shape in each group: got "
                f"{distinct}{'' if members.whole else ' cut by a group boundary'}"
            )
        return (len(members.shapes), *distinct[0])
    if spec.modes != 2:
        raise ValueError(f"fold='stack' must have order 2 or 3: got order {spec.modes}")
    widths = sorted({columns for _, columns in distinct})
    if len(widths) != 1 or members.divisor != widths[0]:
        raise ValueError(
            "fold='stack' must have weights of one input width in each group, cut between rows: "
            f"got widths {widths}{'' if len(widths) > 1 else ' cut within a row'}"
        )
    return (before // widths[0], widths[0])


def _make_split(spec: Spec, index: int, shape: Shape, before: Shape, rank: Any) -> Split:
    sizes = tuple(map(math.prod, neighbours(before, spec.orders[index])))
    order, core = len(sizes), spec.cores[index]
    dense = Split(shape, sizes, sizes, (False,) * order, "full")
    if rank == "full":
        return dense
    if order == 1:
        # A vector is its own factor: any rank above 1 is redundant (row sums of A).
        explicit: Any = rank[0] if isinstance(rank, tuple) else "full"
        if explicit != "full" and explicit > 1:
            raise ValueError(f"rank[{index}][0] must be 1 or 'full' with order=1: got {explicit}")
        return dense
    if core == "train":
        return _make_train(spec, index, dense, rank)
    asked = rank if isinstance(rank, tuple) else (rank,) * order
    uniform = len(set(asked)) == 1 and asked[0] != "full"
    if core in ("identity", "diagonal") and not uniform:
        raise ValueError(
            f"core={core!r} must have one rank for all modes of split {index}: got {rank}"
        )
    core = core or ("identity" if order <= 2 and uniform else "full")
    kept = [source for key, source in spec.frozen if key.partition(".")[0] == str(index)]
    if isinstance(rank, tuple):
        # A core beyond a mode's size is redundant, and so is a matrix of such a rank; where
        # blocks are fixed it is not.
        bounded = core == "full" and f"{index}.core" not in dict(spec.frozen)
        bounded |= order == 2 and not kept and spec.dense_from != "never"
        ranks = _within(spec, index, rank, sizes, "the size of mode {0}", bounded)
        return Split(shape, sizes, ranks, tuple(value != "full" for value in rank), core)
    if core != "full":
        # A matrix has rank min(sizes) at most: above it dense has fewer parameters.
        # A CP rank has no such bound. Frozen factors are not made trainable by it.
        dense_from = {"rank": min(sizes) + 1, "half": max(sizes) / 2, "never": math.inf}
        if order == 2 and rank >= dense_from[spec.dense_from] and not kept:
            return replace(dense, capped=True)
        return Split(shape, sizes, (rank,) * order, (True,) * order, core)
    bounds = sizes
    if any(source.startswith("singular") for source in kept):
        # There are as many singular vectors of the outputs as of the inputs.
        bounds = (*sizes[:-2], *(min(sizes[-2:]),) * 2)
    ranks = tuple(min(rank, bound) for bound in bounds)
    factored = tuple(rank <= size or bool(kept) for size in sizes)
    return Split(shape, sizes, ranks, factored, "full", capped=min(ranks) < rank)


def _make_train(spec: Spec, index: int, dense: Split, rank: Any) -> Split:
    """Make a split of one core a mode; beyond the sizes on one side a rank is redundant."""
    sizes = dense.sizes
    bounds = [
        min(math.prod(sizes[:mode]), math.prod(sizes[mode:])) for mode in range(1, len(sizes))
    ]
    if isinstance(rank, tuple):
        ranks = _within(spec, index, rank, bounds, "the largest rank between modes {0} and {1}")
        return replace(dense, ranks=ranks, core="train")
    ranks = tuple(min(rank, bound) for bound in bounds)
    return replace(dense, ranks=ranks, core="train", capped=min(ranks) < rank)


def _within(
    spec: Spec,
    index: int,
    rank: tuple[Any, ...],
    bounds: Sequence[int],
    what: str,
    bounded: bool = True,
) -> Shape:
    """Return ranks that are given one by one, of which ``"full"`` is the largest."""
    nested = isinstance(spec.rank, tuple) and isinstance(spec.rank[index], tuple)
    for place, (value, bound) in enumerate(zip(rank, bounds, strict=True)):
        if bounded and value != "full" and value > bound:
            raise ValueError(
                f"{f'rank[{index}]' if nested else 'rank'}[{place}] must be at most {bound}, "
                f"{what.format(place, place + 1)} of split {index}: got {value}"
            )
    return tuple(
        bound if value == "full" else value for value, bound in zip(rank, bounds, strict=True)
    )
