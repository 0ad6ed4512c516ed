"""Fold and split: the mode sizes and ranks of one group's tensor. Integers only."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from superlora.maps import Map, Place, Separable
from superlora.shapes import (
    Shape,
    aligned_splits,
    balanced,
    balanced_splits,
    bounded_splits,
    ceil_divide,
)
from superlora.spec import Spec

# A fold before a map may have this many entries, and 16 times as many as the group.
_MOST_BEFORE = 1 << 24


@dataclass(frozen=True)
class Split:
    """One Tucker or tensor-train factorisation of the product.

    Attributes
    ----------
    shape : tuple of int
        Its mode sizes as the product takes them, one for each mode of the fold.
    sizes : tuple of M int
        Mode sizes ``d_km`` that are factored: `shape`, fewer modes where its own order is
        lower, or those before a map of single modes.
    ranks : tuple of M int
        Core sizes ``r_km``; equal to the mode's size where it is un-factored. Of a train
        the M - 1 ranks between neighbouring modes.
    factored : tuple of M bool
        Whether mode m has a factor ``A_km``; else it is the identity. A train has none.
    core : str
        ``"full"``; ``"diagonal"``, stored as a vector; ``"identity"``, not stored; or
        ``"train"``, stored as one core a mode.
    capped : bool
        Whether an integer rank exceeded a mode's size here.
    """

    shape: Shape
    sizes: Shape
    ranks: Shape
    factored: tuple[bool, ...]
    core: str
    capped: bool = False

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


@dataclass(frozen=True)
class Group:
    """One tensor of the equation.

    Attributes
    ----------
    size : int
        Entries after the map: what the weights of the group hold.
    fold : tuple of M int
        Mode sizes ``D_m`` before the map; after it where it is one of single modes.
    before : int
        Entries before the map.
    splits : tuple of Split
        The K factors of each of the products that are summed, one after the other.
    """

    size: int
    fold: Shape
    before: int
    splits: tuple[Split, ...]


@dataclass(frozen=True)
class Members:
    """What a group's fold may depend on besides its size."""

    shapes: tuple[tuple[int, int], ...]
    whole: bool  # no weight is cut by the group's boundary
    divisor: int  # of all input widths and cut positions
    padded: int
    index: int = field(default=0, compare=False)

    @property
    def place(self) -> Place:
        """What a map may depend on."""
        return Place(self.index, self.shapes, self.whole)


def make_group(spec: Spec, size: int, members: Members) -> Group:
    """Choose the fold and the splits of one group.

    Parameters
    ----------
    spec : Spec
        The design.
    size : int
        Entries that the group's weights hold.
    members : Members
        What the fold may depend on besides.

    Returns
    -------
    Group
        The fold covers the group, or `ratio` of it before a map.

    Raises
    ------
    ValueError
        If fold, splits or rank cannot serve the group.
    """
    before = _entries(spec, members.padded or size, members)
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
    fixed = spec.map.bind(members.place)
    name = f"map={type(fixed).__name__}()"
    if isinstance(fixed, Separable):
        count = len(fixed.mapped(spec.modes))
        share = spec.ratio ** (1 / (count * (len(sizes) if spec.combine == "kronecker" else 1)))
        own = tuple(fixed.sizes_before(split, share) for split in sizes)
        before = math.prod(map(math.prod, own if spec.combine == "kronecker" else own[:1]))
        for index, (after, smaller) in enumerate(zip(sizes, own, strict=True)):
            for mode in fixed.mapped(spec.modes):
                of_mode = fixed.mode(index * spec.modes + mode)
                check_serves(of_mode, smaller[mode], after[mode], f"mode {mode} of {name}")
    elif not fixed.in_place:
        check_serves(fixed, before, size, name)
    splits = tuple(
        _make_split(spec, index, split_sizes, before_sizes, rank)
        for index, (split_sizes, before_sizes, rank) in enumerate(
            zip(sizes, own, spec.split_ranks, strict=True)
        )
    )
    return Group(size, fold, before, splits * spec.terms)


def check_serves(fixed: Map, before: int, size: int, name: str) -> None:
    """Refuse sizes that a map cannot serve, or that would take far more memory than the weights.

    Parameters
    ----------
    fixed : Map
        The map.
    before, size : int
        Entries before and after it.
    name : str
        What the error message calls it.

    Raises
    ------
    ValueError
        If it is so.
    """
    # A fold costs nothing to write down, and a file may hold a few numbers for it.
    most = _MOST_BEFORE + 16 * size
    if before > most:
        raise ValueError(
            f"{name} must take at most {most:,} entries to {size:,}: got {before:,}; take a "
            "smaller size or fold"
        )
    try:
        fixed.check(before, size)
    except ValueError as error:
        raise ValueError(f"{name} must serve {before:,} entries to {size:,}: {error}") from None


def _entries(spec: Spec, held: int, members: Members) -> int:
    """Return how many entries the fold has to have."""
    fixed = spec.map.fixed_entries(members.place)
    if fixed is not None:
        if spec.ratio != 1 or spec.size is not None:
            raise ValueError(
                f"ratio and size must be left to map={type(spec.map).__name__}(), which takes "
                f"{fixed} entries: got {spec.ratio} and {spec.size}"
            )
        return fixed
    if spec.map.keeps_fold:
        return held
    return spec.size or _scaled(spec.ratio, held)


def _split_sizes(spec: Spec, splits: int, before: int, members: Members) -> tuple[Shape, ...]:
    fold: Shape
    if isinstance(spec.fold, tuple):
        return _check_explicit(spec, _filled(spec, members), splits, before, members)
    if spec.fold == "balanced" and spec.first_split is None:
        return balanced_splits(before, spec.modes, splits)
    if spec.fold == "balanced":
        fold = balanced_splits(before, spec.modes, 1)[0]
    elif spec.modes == 1:
        fold = (before,)
    elif not spec.map.keeps_fold:
        raise ValueError(
            f"fold must be 'balanced' or a tuple with map={type(spec.map).__name__}, whose fold is "
            f"not the weights' own: got {spec.fold!r}"
        )
    elif spec.fold == "aligned":
        if spec.first_split is None:
            return aligned_splits(before, spec.modes, splits, members.divisor)
        fold = aligned_splits(before, spec.modes, 1, members.divisor)[0]
    else:
        fold = _natural(spec, members) if spec.fold == "natural" else _stack(spec, before, members)
    return bounded_splits(fold, splits, spec.first_split)


def _filled(spec: Spec, members: Members) -> tuple[Any, ...]:
    """Return a fold of sizes with what is left of one weight's sides in the place of None."""
    given: Any = spec.fold if spec.has_sizes else (spec.fold,)
    if not any(None in sizes for sizes in given):
        return tuple(spec.fold)
    outputs = ceil_divide(spec.modes, 2)
    filled = [list(sizes) for sizes in given]
    sides = zip(_one_weight(spec, members), ("outputs", "inputs"), strict=True)
    for (width, side), modes in zip(
        sides, (range(outputs), range(outputs, spec.modes)), strict=True
    ):
        places = [(sizes, mode) for sizes in filled for mode in modes]
        known = math.prod(sizes[mode] or 1 for sizes, mode in places)
        opened = [(sizes, mode) for sizes, mode in places if sizes[mode] is None]
        if width % known or (known != width and not opened):
            raise ValueError(f"fold must divide the {width} {side} of a weight: got {spec.fold}")
        for sizes, mode in opened:
            sizes[mode] = width // known
    return tuple(map(tuple, filled)) if spec.has_sizes else tuple(filled[0])


def _check_explicit(
    spec: Spec, given: tuple[Any, ...], splits: int, before: int, members: Members
) -> tuple[Shape, ...]:
    if spec.has_sizes:
        sizes: tuple[Shape, ...] = given
        fold = tuple(map(math.prod, zip(*sizes, strict=True)))
    else:
        fold = given
        sizes = bounded_splits(fold, splits, spec.first_split)
    says_it = not spec.map.keeps_fold and spec.ratio == 1
    if says_it and spec.size is None and spec.map.fixed_entries(members.place) is None:
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


def _scaled(ratio: float, entries: int) -> int:
    # 0.07 of 100 is 7, and not the 8 that binary fractions round up to.
    return math.ceil(Fraction(repr(float(ratio))) * entries)


def _one_weight(spec: Spec, members: Members) -> tuple[int, int]:
    """Return the shape of the one whole weight of a group."""
    if len(members.shapes) != 1 or not members.whole:
        raise ValueError(
            f"fold={spec.fold!r} must have one whole weight a group: got "
            f"groups={spec.groups!r}; use fold='balanced', 'aligned' or 'stack'"
        )
    return members.shapes[0]


def _natural(spec: Spec, members: Members) -> Shape:
    rows, columns = _one_weight(spec, members)
    output_modes = ceil_divide(spec.modes, 2)
    return balanced(rows, output_modes) + balanced(columns, spec.modes - output_modes)


def _stack(spec: Spec, before: int, members: Members) -> Shape:
    distinct = sorted(set(members.shapes))
    if spec.modes == 3:
        if len(distinct) != 1 or not members.whole or members.padded:
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


def _make_split(spec: Spec, index: int, shape: Shape, before: Shape, rank: object) -> Split:
    sizes = _neighbours(before, spec.orders[index])
    order = len(sizes)
    core = spec.cores[index]
    everything = (False,) * order
    if rank == "full":
        return Split(shape, sizes, sizes, everything, "full")
    if order == 1:
        # A vector is its own factor: any rank above 1 is redundant (row sums of A).
        explicit = rank[0] if isinstance(rank, tuple) else None
        if isinstance(explicit, int) and explicit > 1:
            raise ValueError(
                f"rank[{index}][0] must be 1 or 'full' with order=1, a dense vector: got {explicit}"
            )
        return Split(shape, sizes, sizes, everything, "full")
    if core == "train":
        return _make_train(spec, index, shape, sizes, rank)
    if isinstance(rank, int):
        kept = [source for key, source in spec.frozen if key.partition(".")[0] == str(index)]
        if core in ("identity", "diagonal") or (core is None and order <= 2):
            # A matrix has rank min(sizes) at most: above it dense has fewer parameters.
            # A CP rank has no such bound. Frozen factors are not made trainable by it.
            dense_from = {"rank": min(sizes) + 1, "half": max(sizes) / 2, "never": math.inf}
            if order == 2 and rank >= dense_from[spec.dense_from] and not kept:
                return Split(shape, sizes, sizes, everything, "full", capped=True)
            return Split(shape, sizes, (rank,) * order, (True,) * order, core or "identity")
        factored = tuple(rank <= size or bool(kept) for size in sizes)
        # There are as many singular vectors of the outputs as of the inputs.
        least = min(sizes[-2:]) if any(s.startswith("singular") for s in kept) else rank
        sides = (False,) * (order - 2) + (True, True)
        ranks = tuple(
            min(rank, size, least) if side else min(rank, size)
            for size, side in zip(sizes, sides, strict=True)
        )
        return Split(shape, sizes, ranks, factored, "full", capped=any(r < rank for r in ranks))
    assert isinstance(rank, tuple)
    return _make_nested(spec, index, shape, sizes, rank)


def _make_train(spec: Spec, index: int, shape: Shape, sizes: Shape, rank: Any) -> Split:
    """Make a split of one core a mode; beyond the sizes on one side a rank is redundant."""
    bounds = [
        min(math.prod(sizes[:mode]), math.prod(sizes[mode:])) for mode in range(1, len(sizes))
    ]
    if isinstance(rank, int):
        ranks = tuple(min(rank, bound) for bound in bounds)
        capped = min(ranks) < rank
        return Split(shape, sizes, ranks, (False,) * len(sizes), "train", capped=capped)
    for place, (value, bound) in enumerate(zip(rank, bounds, strict=True)):
        if isinstance(value, int) and value > bound:
            raise ValueError(
                f"{_place(spec, index)}[{place}] must be at most {bound}, the largest rank between "
                f"modes {place} and {place + 1} of split {index}: got {value}"
            )
    ranks = tuple(
        value if isinstance(value, int) else bound
        for value, bound in zip(rank, bounds, strict=True)
    )
    return Split(shape, sizes, ranks, (False,) * len(sizes), "train")


def _place(spec: Spec, index: int) -> str:
    """Return what error messages call the rank of a split."""
    nested = isinstance(spec.rank, tuple) and isinstance(spec.rank[index], tuple)
    return f"rank[{index}]" if nested else "rank"


def _neighbours(shape: Shape, order: int) -> Shape:
    """Join neighbouring modes so that `order` are left, the first ones of the most."""
    least, extra = divmod(len(shape), order)
    counts = [least + (mode < extra) for mode in range(order)]
    modes = iter(shape)
    return tuple(math.prod(next(modes) for _ in range(count)) for count in counts)


def _make_nested(
    spec: Spec, index: int, shape: Shape, sizes: Shape, rank: tuple[object, ...]
) -> Split:
    order = len(sizes)
    core = spec.cores[index]
    uniform = len(set(rank)) == 1 and rank[0] != "full"
    if core in ("identity", "diagonal") and not uniform:
        raise ValueError(
            f"core={core!r} must have one rank for all modes of split {index}: got {rank}"
        )
    if core is None:
        core = "identity" if order <= 2 and uniform else "full"
    frozen = {block for block, _ in spec.frozen}
    kept = any(block.partition(".")[0] == str(index) for block in frozen)
    place = _place(spec, index)
    # A core beyond a mode's size is redundant, and so is a matrix of such a rank; where
    # blocks are fixed it is not.
    bounded = core == "full" and f"{index}.core" not in frozen
    bounded |= order == 2 and not kept and spec.dense_from != "never"
    for mode, (value, size) in enumerate(zip(rank, sizes, strict=True)):
        if bounded and isinstance(value, int) and value > size:
            raise ValueError(
                f"{place}[{mode}] must be at most {size}, the size of mode {mode} of split "
                f"{index}: got {value}"
            )
    ranks = tuple(
        value if isinstance(value, int) else size for value, size in zip(rank, sizes, strict=True)
    )
    factored = tuple(isinstance(value, int) for value in rank)
    return Split(shape, sizes, ranks, factored, core)
