"""`Layout`: what lies where, every block's shape, every count; integers only.

Joins a spec with the shapes of the weights. Every error about sizes is raised
here, before any memory is spent.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping

from superlora.errors import some
from superlora.grouping import Grouping, Piece, check_shapes, group_weights
from superlora.maps import Identity
from superlora.shapes import Shape
from superlora.slicing import Slice, slice_of
from superlora.spec import Spec
from superlora.splitting import Group, Members, make_group


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
        make = functools.lru_cache(maxsize=None)(functools.partial(make_group, spec))
        self.groups: tuple[Group, ...] = tuple(
            make(size, self._fold_context(index)) for index, size in enumerate(self.grouping.sizes)
        )
        # Asked at every forward pass; plain dicts, which torch.compile traces.
        self._piece_slices: dict[Piece, Slice] = {}
        self._row_slices: dict[str, Slice | None] = {}
        self._factored: dict[str, bool] = {}
        unit_modes = self.unit_modes()
        if unit_modes:
            warnings.warn(f"{unit_modes}; use fewer splits or fold='balanced'", stacklevel=3)

    def _fold_context(self, group: int) -> Members:
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
        return Members(shapes, self.grouping.whole(group), divisor, self.grouping.padded)

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

    def prepare(self, name: str) -> None:
        """Work out a weight's slices now, so that compiled code only reads them."""
        if isinstance(self.spec.map, Identity):
            for piece in self.grouping.pieces[name]:
                self.piece_slice(piece)
        self.applies_factored(name)

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
            raise KeyError(
                f"no weight is named {name!r}; the plan has {some(map(repr, self.shapes))}"
            )
        return tuple(block for blocks in self._blocks_by_group(name) for block in blocks)

    def smallest_blocks(self, name: str) -> tuple[str, ...]:
        """Return the smallest block of each of a weight's groups; the update is linear in it."""
        return tuple(
            min(blocks, key=lambda block: math.prod(self.factor_shapes[block]))
            for blocks in self._blocks_by_group(name)
        )

    def _blocks_by_group(self, name: str) -> list[list[str]]:
        groups = dict.fromkeys(piece.group for piece in self.grouping.pieces[name])
        return [
            [
                f"{group}.{index}.{block}"
                for index, split in enumerate(self.groups[group].splits)
                for block in split.block_shapes
            ]
            for group in groups
        ]

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
