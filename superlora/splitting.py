"""Fold and split: the mode sizes and ranks of one group's tensor. Integers only."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from fractions import Fraction

from superlora.maps import Identity
from superlora.shapes import (
    Shape,
    aligned_splits,
    balanced,
    balanced_splits,
    ceil_divide,
    split_modes,
)
from superlora.spec import Spec


@dataclass(frozen=True)
class Split:
    """One Tucker factorisation of the Kronecker product.

    Attributes
    ----------
    sizes : tuple of M int
        Mode sizes ``d_km``.
    ranks : tuple of M int
        Core sizes ``r_km``; equal to the mode's size where it is un-factored.
    factored : tuple of M bool
        Whether mode m has a trainable factor ``A_km``; else it is the identity.
    trainable_core : bool
        False for the superdiagonal core, which is not stored.
    capped : bool
        Whether an integer rank exceeded a mode's size here.
    """

    sizes: Shape
    ranks: Shape
    factored: tuple[bool, ...]
    trainable_core: bool
    capped: bool = False

    @functools.cached_property
    def block_shapes(self) -> dict[str, Shape]:
        """Shapes of the trainable blocks: ``core`` (r_1, …, r_M), ``factorM`` (d_m, r_m)."""
        blocks: dict[str, Shape] = {"core": self.ranks} if self.trainable_core else {}
        for mode, (size, rank) in enumerate(zip(self.sizes, self.ranks, strict=True)):
            if self.factored[mode]:
                blocks[f"factor{mode}"] = (size, rank)
        return blocks

    @property
    def num_parameters(self) -> int:
        """Trainable entries."""
        return sum(map(math.prod, self.block_shapes.values()))


@dataclass(frozen=True)
class Group:
    """One tensor of the equation.

    Attributes
    ----------
    size : int
        Entries after the map: what the weights of the group hold.
    fold : tuple of M int
        Mode sizes ``D_m = prod_k d_km`` before the map.
    splits : tuple of Split
        The K factors of the Kronecker product.
    """

    size: int
    fold: Shape
    splits: tuple[Split, ...]

    @property
    def num_parameters(self) -> int:
        """Trainable entries."""
        return sum(split.num_parameters for split in self.splits)


@dataclass(frozen=True)
class Members:
    """What a group's fold may depend on besides its size."""

    shapes: tuple[tuple[int, int], ...]
    whole: bool  # no weight is cut by the group's boundary
    divisor: int  # of all input widths and cut positions
    padded: int


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
    held = members.padded or size
    before = held if isinstance(spec.map, Identity) else _scaled(spec.ratio, held)
    sizes = _split_sizes(spec, before, members)
    for index, split in enumerate(sizes):
        if len(sizes) > 1 and math.prod(split) == 1:
            raise ValueError(
                f"splits must leave every split more than one entry: got split {index} of size 1 "
                f"in every mode for a fold of {before} entries; use fewer splits"
            )
    splits = tuple(
        _make_split(spec, index, split_sizes, rank)
        for index, (split_sizes, rank) in enumerate(zip(sizes, spec.split_ranks, strict=True))
    )
    fold = tuple(map(math.prod, zip(*sizes, strict=True)))
    return Group(size, fold, splits)


def _split_sizes(spec: Spec, before: int, members: Members) -> tuple[Shape, ...]:
    if isinstance(spec.fold, tuple):
        return split_modes(_check_explicit(spec.fold, before), spec.splits)
    if spec.fold == "balanced":
        return balanced_splits(before, spec.order, spec.splits)
    if spec.order == 1:
        return split_modes((before,), spec.splits)
    if not isinstance(spec.map, Identity):
        raise ValueError(
            f"fold must be 'balanced' or a tuple with map={type(spec.map).__name__}, whose fold is "
            f"not the weights' own: got {spec.fold!r}"
        )
    if spec.fold == "aligned":
        return aligned_splits(before, spec.order, spec.splits, members.divisor)
    fold = _natural(spec, members) if spec.fold == "natural" else _stack(spec, before, members)
    return split_modes(fold, spec.splits)


def _check_explicit(fold: Shape, before: int) -> Shape:
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
    return fold


def _scaled(ratio: float, entries: int) -> int:
    # 0.07 of 100 is 7, and not the 8 that binary fractions round up to.
    return math.ceil(Fraction(repr(float(ratio))) * entries)


def _natural(spec: Spec, members: Members) -> Shape:
    if len(members.shapes) != 1 or not members.whole:
        raise ValueError(
            "fold='natural' must have one whole weight a group: got "
            f"groups={spec.groups!r}; use fold='balanced', 'aligned' or 'stack'"
        )
    rows, columns = members.shapes[0]
    output_modes = ceil_divide(spec.order, 2)
    return balanced(rows, output_modes) + balanced(columns, spec.order - output_modes)


def _stack(spec: Spec, before: int, members: Members) -> Shape:
    distinct = sorted(set(members.shapes))
    if spec.order == 3:
        if len(distinct) != 1 or not members.whole or members.padded:
            raise ValueError(
                "fold='stack' of order 3 must have whole weights of one shape in each group: got "
                f"{distinct}{'' if members.whole else ' cut by a group boundary'}"
            )
        return (len(members.shapes), *distinct[0])
    if spec.order != 2:
        raise ValueError(f"fold='stack' must have order 2 or 3: got order {spec.order}")
    widths = sorted({columns for _, columns in distinct})
    if len(widths) != 1 or members.divisor != widths[0]:
        raise ValueError(
            "fold='stack' must have weights of one input width in each group, cut between rows: "
            f"got widths {widths}{'' if len(widths) > 1 else ' cut within a row'}"
        )
    return (before // widths[0], widths[0])


def _make_split(spec: Spec, index: int, sizes: Shape, rank: object) -> Split:
    order = len(sizes)
    everything = (False,) * order
    if rank == "full":
        return Split(sizes, sizes, everything, trainable_core=True)
    if order == 1:
        return _make_vector(index, sizes, rank)
    if isinstance(rank, int):
        identity = spec.core == "identity" or (spec.core is None and order <= 2)
        if identity:
            # A matrix has rank min(sizes) at most: above it dense has fewer parameters.
            # A CP rank has no such bound.
            if order == 2 and rank > min(sizes):
                return Split(sizes, sizes, everything, trainable_core=True, capped=True)
            return Split(sizes, (rank,) * order, (True,) * order, trainable_core=False)
        factored = tuple(rank <= size for size in sizes)
        ranks = tuple(min(rank, size) for size in sizes)
        return Split(sizes, ranks, factored, trainable_core=True, capped=not all(factored))
    assert isinstance(rank, tuple)
    return _make_nested(spec, index, sizes, rank)


def _make_vector(index: int, sizes: Shape, rank: object) -> Split:
    # A vector is its own factor: any rank above 1 is redundant (row sums of A).
    explicit = rank[0] if isinstance(rank, tuple) else None
    if isinstance(explicit, int) and explicit > 1:
        raise ValueError(
            f"rank[{index}][0] must be 1 or 'full' with order=1, a dense vector: got {explicit}"
        )
    return Split(sizes, sizes, (False,), trainable_core=True)


def _make_nested(spec: Spec, index: int, sizes: Shape, rank: tuple[object, ...]) -> Split:
    order = len(sizes)
    uniform = len(set(rank)) == 1 and rank[0] != "full"
    identity = spec.core == "identity" or (spec.core is None and order <= 2 and uniform)
    if identity and not uniform:
        raise ValueError(
            f"core='identity' must have one rank for all modes of split {index}: got {rank}"
        )
    bounded = not identity or order == 2
    nested = isinstance(spec.rank, tuple) and isinstance(spec.rank[index], tuple)
    place = f"rank[{index}]" if nested else "rank"
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
    return Split(sizes, ranks, factored, trainable_core=not identity)
