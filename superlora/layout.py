"""`Layout`: what lies where, every block's shape, every count; integers only.

Joins a spec with the shapes of the weights. Every error about sizes is raised
here, before any memory is spent.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from superlora.grouping import Grouping, Piece, check_shapes, group_weights
from superlora.maps import Identity
from superlora.shapes import (
    Shape,
    aligned_splits,
    balanced,
    balanced_splits,
    ceil_divide,
    split_modes,
)
from superlora.slicing import Slice, slice_of
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
class _Members:
    """What a group's fold may depend on besides its size."""

    shapes: tuple[tuple[int, int], ...]
    whole: bool  # no weight is cut by the group's boundary
    divisor: int  # of all input widths and cut positions
    padded: int


class Layout:
    """A spec joined with the shapes of the weights that it adapts.

    Parameters
    ----------
    spec : Spec
        The design.
    shapes : mapping of str to (int, int)
        Output and input width of every weight, in the order of concatenation.

    Attributes
    ----------
    spec : Spec
        As given.
    shapes : dict of str to (int, int)
        As given, checked.
    grouping : Grouping
        Where every weight lies.
    groups : tuple of Group
        Every group's fold and splits.

    Raises
    ------
    TypeError, ValueError
        If the spec cannot serve these shapes; the message names the argument.
    """

    def __init__(self, spec: Spec, shapes: Mapping[str, tuple[int, int]]) -> None:
        if not isinstance(spec, Spec):
            raise TypeError(f"spec must be a superlora.Spec: got {type(spec).__name__}")
        self.spec = spec
        self.shapes = check_shapes(shapes)
        self.grouping: Grouping = group_weights(self.shapes, spec.groups, spec.cut)
        # Most groups of a large model are alike: solve each distinct one once.
        make = functools.lru_cache(maxsize=None)(functools.partial(_make_group, spec))
        self.groups: tuple[Group, ...] = tuple(
            make(size, self._fold_context(index)) for index, size in enumerate(self.grouping.sizes)
        )
        # Asked at every forward pass; plain dicts, which torch.compile traces.
        self._piece_slices: dict[Piece, Slice] = {}
        self._row_slices: dict[str, Slice | None] = {}
        self._factored: dict[str, bool] = {}
        unit_modes = self.unit_modes()
        if unit_modes:
            warnings.warn(unit_modes, stacklevel=3)

    def _fold_context(self, group: int) -> _Members:
        names = self.grouping.members[group]
        divisor = 0
        for name in names:
            divisor = math.gcd(divisor, self.shapes[name][1])
            for piece in self.grouping.pieces[name]:
                if piece.group == group:
                    divisor = math.gcd(divisor, piece.start, piece.stop)
        if self.grouping.padded:
            divisor = math.gcd(divisor, self.grouping.padded)
        shapes = tuple(self.shapes[name] for name in names)
        return _Members(shapes, self.grouping.whole(group), divisor, self.grouping.padded)

    def radices(self, group: int, modes: int | None = None) -> Shape:
        """Return the digits of the first `modes` modes of a group, all modes if None."""
        splits = self.groups[group].splits
        order = len(splits[0].sizes) if modes is None else modes
        return tuple(split.sizes[mode] for mode in range(order) for split in splits)

    def piece_slice(self, piece: Piece) -> Slice:
        """Return the boxes that hold a piece of a weight (identity map only)."""
        if piece not in self._piece_slices:
            radices = self.radices(piece.group)
            self._piece_slices[piece] = slice_of(radices, piece.start, piece.stop)
        return self._piece_slices[piece]

    def row_slice(self, name: str) -> Slice | None:
        """Return the boxes of a weight's block rows, if its fold is aligned.

        Parameters
        ----------
        name : str
            A weight.

        Returns
        -------
        Slice or None
            Ranges of the digits of all modes but the last. None where the last
            mode does not divide the input width and the weight's position, where
            a group boundary cuts the weight, or where a map mixes all entries.
        """
        if name not in self._row_slices:
            self._row_slices[name] = self._find_row_slice(name)
        return self._row_slices[name]

    def _find_row_slice(self, name: str) -> Slice | None:
        pieces = self.grouping.pieces[name]
        fold = self.groups[pieces[0].group].fold
        width = fold[-1]
        if len(fold) < 2 or len(pieces) > 1 or not isinstance(self.spec.map, Identity):
            return None
        piece = pieces[0]
        if self.shapes[name][1] % width or piece.start % width:
            return None
        leading = self.radices(piece.group, len(fold) - 1)
        return slice_of(leading, piece.start // width, piece.stop // width)

    def applies_factored(self, name: str) -> bool:
        """Return whether ``x @ ΔWᵀ`` costs fewer multiplications without forming ΔW.

        Parameters
        ----------
        name : str
            A weight.

        Returns
        -------
        bool
            Counted a token: the factored product against the output width times
            the input width, which the weight's gradient costs when ΔW is formed.
        """
        if name not in self._factored:
            self._factored[name] = self._count_factored(name)
        return self._factored[name]

    def _count_factored(self, name: str) -> bool:
        if self.row_slice(name) is None:
            return False
        rows, columns = self.shapes[name]
        splits = self.groups[self.grouping.pieces[name][0].group].splits
        widths = [split.sizes[-1] for split in splits]
        blocks = columns // math.prod(widths)
        cost = 0
        for index, split in enumerate(splits):
            if split.factored[-1]:
                cost += blocks * math.prod(widths) * split.ranks[-1]
            widths[index] = split.ranks[-1]
        return cost + rows * blocks * math.prod(widths) < rows * columns

    @functools.cached_property
    def factor_shapes(self) -> dict[str, Shape]:
        """Shape of every trainable block by name, ``"group.split.block"``."""
        return {
            f"{group}.{index}.{block}": shape
            for group, item in enumerate(self.groups)
            for index, split in enumerate(item.splits)
            for block, shape in split.block_shapes.items()
        }

    def blocks_of(self, name: str) -> tuple[str, ...]:
        """Return the names of the blocks that a weight's update is made of."""
        if name not in self.shapes:
            raise KeyError(f"no weight is named {name!r}; the plan has {_some(self.shapes)}")
        groups = dict.fromkeys(piece.group for piece in self.grouping.pieces[name])
        return tuple(
            f"{group}.{index}.{block}"
            for group in groups
            for index, split in enumerate(self.groups[group].splits)
            for block in split.block_shapes
        )

    def unit_modes(self) -> str:
        """Return what to say of splits that have size 1 in a mode of size above 1, if any."""
        bare = sorted(
            {
                (index, mode)
                for group in self.groups
                for index, split in enumerate(group.splits)
                for mode, size in enumerate(split.sizes)
                if size == 1 < group.fold[mode]
            }
        )
        if not bare:
            return ""
        places = ", ".join(f"split {index} in mode {mode}" for index, mode in bare)
        return f"no Kronecker structure where a split has size 1: {places}"

    @property
    def num_parameters(self) -> int:
        """Trainable entries of all blocks."""
        return sum(group.num_parameters for group in self.groups)

    @property
    def num_dense(self) -> int:
        """Entries of all adapted weights."""
        return sum(map(math.prod, self.shapes.values()))


def _some(names: Mapping[str, object], most: int = 5) -> str:
    listed = ", ".join(map(repr, list(names)[:most]))
    return listed + (f" and {len(names) - most} more" if len(names) > most else "")


def _make_group(spec: Spec, size: int, members: _Members) -> Group:
    held = members.padded or size
    before = held if isinstance(spec.map, Identity) else math.ceil(spec.ratio * held)
    sizes = _split_sizes(spec, before, members)
    for index, split in enumerate(sizes):
        if len(sizes) > 1 and math.prod(split) == 1:
            raise ValueError(
                f"splits must leave every split more than one entry: got split {index} of size 1 "
                f"in every mode for a fold of {before} entries; use fewer splits or "
                "fold='balanced'"
            )
    splits = tuple(
        _make_split(spec, index, split_sizes, rank)
        for index, (split_sizes, rank) in enumerate(zip(sizes, spec.split_ranks, strict=True))
    )
    fold = tuple(map(math.prod, zip(*sizes, strict=True)))
    return Group(size, fold, splits)


def _split_sizes(spec: Spec, before: int, members: _Members) -> tuple[Shape, ...]:
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
    needed = ceil_divide(before, math.prod(fold[1:]))
    if fold[0] > needed:
        raise ValueError(
            f"fold[0] must be at most {needed}, beyond which no slice of mode 0 holds any of the "
            f"{before} entries: got {fold[0]}"
        )
    return fold


def _natural(spec: Spec, members: _Members) -> Shape:
    if len(members.shapes) != 1 or not members.whole:
        raise ValueError(
            "fold='natural' must have one whole weight a group: got "
            f"groups={spec.groups!r}; use fold='balanced', 'aligned' or 'stack'"
        )
    rows, columns = members.shapes[0]
    output_modes = ceil_divide(spec.order, 2)
    return balanced(rows, output_modes) + balanced(columns, spec.order - output_modes)


def _stack(spec: Spec, before: int, members: _Members) -> Shape:
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
    return Split(
        sizes, sizes, (False,), trainable_core=True, capped=isinstance(rank, int) and rank > 1
    )


def _make_nested(spec: Spec, index: int, sizes: Shape, rank: tuple[object, ...]) -> Split:
    order = len(sizes)
    uniform = len(set(rank)) == 1 and rank[0] != "full"
    identity = spec.core == "identity" or (spec.core is None and order <= 2 and uniform)
    if identity and not uniform:
        raise ValueError(
            f"core='identity' must have one rank for all modes of split {index}: got {rank}"
        )
    bounded = not identity or order == 2
    for mode, (value, size) in enumerate(zip(rank, sizes, strict=True)):
        if bounded and isinstance(value, int) and value > size:
            raise ValueError(
                f"rank[{mode}] must be at most {size}, the size of mode {mode} of split {index}: "
                f"got {value}"
            )
    ranks = tuple(
        value if isinstance(value, int) else size for value, size in zip(rank, sizes, strict=True)
    )
    factored = tuple(isinstance(value, int) for value in rank)
    return Split(sizes, ranks, factored, trainable_core=not identity)
