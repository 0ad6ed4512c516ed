"""A weight's update as one tensor network: which slices of which blocks, under which labels.

Integers only. A product of Tucker factorisations, whatever its order, splits, cores, sum of terms
and fold, is a sum of contractions of slices of blocks; a weight that straddles the fold is several
boxes of them, read one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from superlora.design.contraction import TOKENS, Contraction, Cost, Labels, contract
from superlora.design.fold_shape import Shape
from superlora.design.grouping import Piece, cut_pieces
from superlora.design.layout import Layout, kept
from superlora.design.slices import Box, slice_of
from superlora.design.splits import Split, mode_of

# The numbers of tokens that paths are planned for.
FEW, MANY = 1, 4096
# Labels of a second network, beyond those of any first one.
ROWS, BLOCKS = 1_000, 1_001


@dataclass(frozen=True)
class Source:
    """An array that operands are slices of.

    Attributes
    ----------
    block : str
        The block, a key of ``layout.block_shapes``.
    shape : tuple of int
        What is read of it: the leading slices, where groups of other sizes share the block.
    group : int
        The group, whose map `modes` are mapped by.
    modes : tuple of (int, int, int)
        Axes that a map of single modes is applied to: axis, number of the map, size afterwards.
    """

    block: str
    shape: Shape
    group: int
    modes: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True)
class Operand:
    """A slice of a source, and its labels.

    Attributes
    ----------
    source : int
        Index among the network's sources.
    digits : tuple of int, or None
        The shape that the source is read as; None for its own.
    cut : tuple of slice, or None
        What is taken of that.
    shape : tuple of int, or None
        What the slice is reshaped to, without the axes of size 1.
    labels : tuple of int
        One an axis.
    frozen : bool
        Whether it has no gradient.
    """

    source: int
    digits: Shape | None
    cut: tuple[slice, ...] | None
    shape: Shape | None
    labels: Labels
    frozen: bool
    whole: bool = field(init=False)  # whether it is the source as it is

    def __post_init__(self) -> None:
        whole = self.digits is None and self.cut is None and self.shape is None
        object.__setattr__(self, "whole", whole)


@dataclass(frozen=True)
class Term:
    """One product of a sum: its operands and their contraction."""

    operands: tuple[Operand, ...]
    contraction: Contraction


# The terms of one sum, in the order that is best for few tokens, and for many.
Orders = tuple[tuple[Term, ...], tuple[Term, ...]]


@dataclass(frozen=True)
class Run:
    """A run of a weight's entries.

    Attributes
    ----------
    boxes : tuple of tuples of Term
        The entries are those of the boxes, one after the other; each is a sum of terms.
    skip, size : int
        Where the run begins in them, and how many entries it has.
    vector : int
        The first of the groups whose map makes the vector that the run is cut from, where it is
        no part of a product itself; the boxes are none then. -1 otherwise.
    """

    boxes: tuple[tuple[Term, ...], ...]
    skip: int
    size: int
    vector: int = -1


@dataclass(frozen=True)
class Network:
    """What a weight's update, or some rows of it, is made of.

    Attributes
    ----------
    sources : tuple of Source
        The blocks.
    runs : tuple of Run
        They follow each other, in row-major order.
    shape : tuple of int
        Of the result.
    """

    sources: tuple[Source, ...]
    runs: tuple[Run, ...]
    shape: Shape

    @property
    def cost(self) -> Cost:
        """Of forming it once."""
        return sum((t.contraction.cost for t in self.terms()), Cost(moved=math.prod(self.shape)))

    def terms(self) -> Iterable[Term]:
        """Yield the terms of all boxes."""
        return (term for run in self.runs for box in run.boxes for term in box)

    def __str__(self) -> str:
        lines = []
        for run in self.runs:
            if run.vector >= 0:
                lines.append(f"[{run.skip}:{run.skip + run.size}] of F(group {run.vector})")
            for box in run.boxes:
                products = [f"{term.contraction}  {self._named(term)}" for term in box]
                lines.append(" + ".join(products))
        return "\n".join(lines)

    def _named(self, term: Term) -> str:
        return ", ".join(self.sources[own.source].block + _cut_text(own) for own in term.operands)


def _cut_text(operand: Operand) -> str:
    if operand.cut is None:
        return ""
    parts = (":" if cut.start is None else f"{cut.start}:{cut.stop}" for cut in operand.cut)
    return f"[{', '.join(parts)}]"


class End(NamedTuple):
    """How a split ends: its last mode's factor, and the labels that join it to the others.

    Without a factor the labels are those of the mode itself.
    """

    factor: Operand | None
    labels: Labels


class Sources:
    """Collects the sources of a network."""

    def __init__(self) -> None:
        self._places: dict[Source, int] = {}

    def add(self, source: Source) -> int:
        """Return the index of a source."""
        return self._places.setdefault(source, len(self._places))

    @property
    def all(self) -> tuple[Source, ...]:
        """Every source, in order."""
        return tuple(self._places)


class Factorisation:
    """The products of a group on one box of its digits, under labels.

    `sources` takes the blocks, `ends` those of the last mode apart. The digit of `parted` is read
    as two, the second of the size that follows it.
    """

    def __init__(
        self,
        layout: Layout,
        group: int,
        box: Box,
        sources: Sources,
        ends: Sources | None = None,
        parted: tuple[int, int] | None = None,
    ) -> None:
        self.layout, self.group, self.box = layout, group, box
        self.sources, self.ends = sources, ends or sources
        self.sizes: dict[int, int] = {}
        self.digits: list[Labels] = []
        for index, (first, last) in enumerate(box):
            size = last - first
            parts = [size]
            if parted is not None and parted[0] == index:
                parts = [size // parted[1], parted[1]]
            self.digits.append(tuple(self._label(part) for part in parts if part > 1))
        self._first = len(self.sizes)  # the ranks come after the digits

    def _label(self, size: int) -> int:
        label = len(self.sizes)
        self.sizes[label] = size
        return label

    def _digit(self, split: int, mode: int) -> int:
        spec = self.layout.specs[self.group]
        return mode * spec.splits + split if spec.combine == "kronecker" else mode

    def term(self, index: int) -> tuple[list[Operand], list[End]]:
        """Return one product's operands but those of the last mode, and how each split ends."""
        for label in [label for label in self.sizes if label >= self._first]:
            del self.sizes[label]
        found: list[Operand] = []
        last: list[End] = []
        for place, split in enumerate(self.layout.terms(self.group)[index]):
            own, end = self._split(place, index, split)
            found += own
            last.append(end)
        return found, last

    def _split(self, place: int, term: int, split: Split) -> tuple[list[Operand], End]:
        order, modes = len(split.sizes), len(split.shape)
        least, extra = divmod(modes, order)
        bounds = [mode * least + min(mode, extra) for mode in range(order + 1)]
        digits = [
            [self._digit(place, mode) for mode in range(bounds[own], bounds[own + 1])]
            for own in range(order)
        ]
        sizes = [split.shape[bounds[own] : bounds[own + 1]] for own in range(order)]
        ranks = self._ranks(split)
        index = term * self.layout.specs[self.group].splits + place
        last = f"core{order - 1}" if split.core == "train" else f"factor{order - 1}"
        own_labels = self.digits[self._digit(place, modes - 1)]
        found: list[Operand] = []
        end = End(None, own_labels)
        for leaf in split.block_shapes:
            apart = leaf == last and not split.joined and order > 1
            to = self.ends if apart else self.sources
            operand = self._operand(split, place, index, leaf, digits, sizes, ranks, to)
            if apart:
                joining = tuple(label for label in operand.labels if label not in own_labels)
                end = End(operand, joining)
            else:
                found.append(operand)
        return found, end

    def _ranks(self, split: Split) -> list[Labels]:
        """Return the labels of every rank: of the modes, or between them for a train core."""
        if split.core in ("identity", "diagonal"):
            shared = self._rank(split.ranks[0])
            return [shared] * len(split.sizes)
        factored = split.factored if split.core == "full" else (True,) * len(split.ranks)
        return [
            self._rank(rank) if own else () for rank, own in zip(split.ranks, factored, strict=True)
        ]

    def _rank(self, rank: int) -> Labels:
        return (self._label(rank),) if rank > 1 else ()

    def _operand(
        self,
        split: Split,
        place: int,
        index: int,
        leaf: str,
        digits: list[list[int]],
        sizes: list[Shape],
        ranks: list[Labels],
        sources: Sources,
    ) -> Operand:
        shape = split.block_shapes[leaf]
        # For every axis its digits, or the labels of its rank.
        axes: list[tuple[list[int] | None, Shape, Labels]] = []
        mode = mode_of(leaf) or 0
        if leaf == "core":
            for own, size in enumerate(shape):
                bare = split.core == "full" and not split.factored[own]
                if bare:
                    axes.append((digits[own], sizes[own], ()))
                else:
                    axes.append((None, (size,), ranks[own]))
        elif leaf.startswith("core"):
            before = ranks[mode - 1] if mode else ()
            after = ranks[mode] if mode < len(ranks) else ()
            axes = [(None, shape[:1], before), (digits[mode], sizes[mode], ())]
            axes.append((None, shape[2:], after))
        else:
            axes = [(digits[mode], sizes[mode], ()), (None, shape[1:], ranks[mode])]
        read: list[int] = []
        cuts: list[tuple[int, int]] = []
        labels: list[int] = []
        for places, wide, joining in axes:
            read += wide
            if places is None:
                cuts += [(0, wide[0])]
                labels += joining
            else:
                cuts += [self.box[digit] for digit in places]
                labels += [label for digit in places for label in self.digits[digit]]
        final = tuple(self.sizes[label] for label in labels)
        mapped = self._mapped(split, place, leaf, mode)
        after_map = list(shape)
        for axis, _, size in mapped:
            after_map[axis] = size
        taken = tuple(stop - start for start, stop in cuts)
        whole = taken == tuple(read)
        block = self.layout.block(self.group, index, leaf)
        group = self.group if mapped else -1
        source = sources.add(Source(block, shape, group, mapped))
        frozen = block in self.layout.frozen
        # A slice of a source is a view, so it is cut before axes are dropped.
        same = tuple(read) == tuple(after_map)
        if whole:
            to = None if final == tuple(after_map) else final
            return Operand(source, None, None, to, tuple(labels), frozen)
        cut = tuple(
            slice(None) if (start, stop) == (0, size) else slice(start, stop)
            for (start, stop), size in zip(cuts, read, strict=True)
        )
        to = None if final == taken else final
        return Operand(source, None if same else tuple(read), cut, to, tuple(labels), frozen)

    def _mapped(
        self, split: Split, place: int, leaf: str, mode: int
    ) -> tuple[tuple[int, int, int], ...]:
        """Return the axes of a block that the group's map of single modes is applied to."""
        modes = len(split.shape)
        found = []
        for own in self.layout.maps[self.group].mapped(modes):
            axis = (f"factor{own}", 0) if split.factored[own] else ("core", own)
            if axis[0] == leaf:
                found.append((axis[1], place * modes + own, split.shape[own]))
        return tuple(found)

    def closed(self) -> tuple[Term, ...]:
        """Return the terms that make the box's entries, its digits in order."""
        output = tuple(label for digit in self.digits for label in digit)
        return tuple(
            self._join(index, output) for index in range(len(self.layout.terms(self.group)))
        )

    def _join(self, index: int, output: Labels) -> Term:
        operands, last = self.term(index)
        operands += [end.factor for end in last if end.factor is not None]
        return self.contracted([], operands, output)

    def contracted(
        self, first: Sequence[Labels], operands: Sequence[Operand], output: Labels, tokens: int = 0
    ) -> Term:
        """Return the contraction of some operands after arrays of which only labels are known."""
        labels = [*first, *(own.labels for own in operands)]
        frozen = (len(first) + place for place, own in enumerate(operands) if own.frozen)
        path = contract(labels, output, self.sizes, tokens, frozenset(frozen))
        return Term(tuple(operands), path)

    def applied(self, outputs: Labels, inputs: Labels, scales: bool) -> Orders:
        """Return the terms that multiply inputs, the first operand of each contraction."""
        first = [(TOKENS, *inputs), *([(*outputs, *inputs)] if scales else [])]
        found = []
        for index in range(len(self.layout.terms(self.group))):
            operands, last = self.term(index)
            operands += [end.factor for end in last if end.factor is not None]
            found.append(self.ordered(first, operands, (TOKENS, *outputs)))
        few, many = zip(*found, strict=True)
        return few, many

    def ordered(
        self, first: Sequence[Labels], operands: Sequence[Operand], output: Labels
    ) -> tuple[Term, Term]:
        """Return the same contraction in the orders that are best for few tokens, and for many."""
        few, many = (self.contracted(first, operands, output, tokens) for tokens in (FEW, MANY))
        return few, many


@kept
def network_of(layout: Layout, name: str) -> Network:
    """Return what a weight's update is made of."""
    return weight_network(layout, name)


def weight_network(layout: Layout, name: str, rows: tuple[int, int] | None = None) -> Network:
    """Return what a weight's update, or a range of its rows, is made of."""
    height, width = layout.shapes[name]
    first, last = rows or (0, height)
    sources = Sources()
    runs = []
    for piece in cut_pieces(layout.grouping.pieces[name], first * width, last * width):
        if layout.in_place(piece.group):
            runs.append(_run(layout, piece, sources))
        else:
            start, stop = layout.position(piece)
            runs.append(Run((), start, stop - start, layout.joint(piece.group)[0]))
    return Network(sources.all, tuple(runs), (last - first, width))


def _run(layout: Layout, piece: Piece, sources: Sources) -> Run:
    part = slice_of(layout.radices(piece.group), piece.start, piece.stop)
    boxes = tuple(Factorisation(layout, piece.group, box, sources).closed() for box in part.boxes)
    return Run(boxes, part.skip, part.size)


@kept
def group_network(layout: Layout, group: int) -> Network:
    """Return what a group's folded tensor is made of, before its map."""
    radices = layout.radices(group)
    sources = Sources()
    terms = Factorisation(layout, group, tuple((0, size) for size in radices), sources).closed()
    fold = layout.groups[group].fold
    return Network(sources.all, (Run((terms,), 0, math.prod(fold)),), fold)


@dataclass(frozen=True)
class Opened:
    """Rows of a fold's leading modes, the ranks of its last mode left open.

    Of ``factor0 @ factor1.T`` the rows are those of `factor0` itself, and `factor1` is the end.

    Attributes
    ----------
    sources, ends : tuple of Source
        Of the rows, and of the last factors.
    boxes : tuple of tuples of Term
        The rows are those of the boxes, one after the other. Every term makes an array of its
        own, (rows, *ranks).
    skip, rows : int
        Which rows of the boxes.
    ranks : tuple of tuples of int
        For every term the sizes of its open labels.
    completed : tuple of Term
        For every term the contraction of rows, the first operand, with the last factors.
    """

    sources: tuple[Source, ...]
    ends: tuple[Source, ...]
    boxes: tuple[tuple[Term, ...], ...]
    skip: int
    rows: int
    ranks: tuple[Shape, ...]
    completed: tuple[Term, ...]

    @property
    def width(self) -> int:
        """Open columns of all terms."""
        return sum(map(math.prod, self.ranks))

    @property
    def cost(self) -> Cost:
        """Of making the rows."""
        return sum((term.contraction.cost for box in self.boxes for term in box), Cost())


def opened_rows(layout: Layout, group: int, start: int, stop: int) -> Opened:
    """Return what a range of rows of all modes but the last is made of."""
    order = len(layout.groups[group].fold)
    leading = layout.radices(group, order - 1)
    trailing = tuple((0, size) for size in layout.radices(group)[len(leading) :])
    part = slice_of(leading, start, stop)
    sources, ends = Sources(), Sources()
    boxes, ranks = [], []
    for place, box in enumerate(part.boxes):
        made = Factorisation(layout, group, (*box, *trailing), sources, ends)
        output = tuple(label for digit in made.digits[: len(leading)] for label in digit)
        terms = []
        for index in range(len(layout.terms(group))):
            operands, last = made.term(index)
            open_labels = _open_labels(last)
            present = {label for operand in operands for label in operand.labels}
            kept = tuple(label for label in open_labels if label in present)
            terms.append(made.contracted([], operands, (*output, *kept)))
            if not place:
                ranks.append(tuple(made.sizes[label] for label in kept))
        boxes.append(tuple(terms))
    made = Factorisation(layout, group, (*part.boxes[0], *trailing), sources, ends)
    forms = _completed(made, len(leading))
    return Opened(sources.all, ends.all, tuple(boxes), part.skip, part.size, tuple(ranks), forms)


def _open_labels(last: Sequence[End]) -> Labels:
    return tuple(dict.fromkeys(label for end in last for label in end.labels))


def _completed(made: Factorisation, leading: int) -> tuple[Term, ...]:
    """Return the contractions of opened rows with the last factors: entries, or products."""
    digits = tuple(label for digit in made.digits[leading:] for label in digit)
    found = []
    for index in range(len(made.layout.terms(made.group))):
        _, kept, factors = _ends(made, index)
        # As many rows as are given, which are formed some at a time.
        found.append(made.contracted([(TOKENS, *kept)], factors, (TOKENS, *digits), MANY))
    return tuple(found)


def _ends(made: Factorisation, index: int) -> tuple[list[Operand], Labels, list[Operand]]:
    """Return the leading operands of a term, the open labels that they have, the last factors."""
    operands, last = made.term(index)
    present = {label for own in operands for label in own.labels}
    kept = tuple(label for label in _open_labels(last) if label in present)
    factors = [end.factor for end in last if end.factor is not None]
    return operands, kept, factors


def opened_products(layout: Layout, group: int, shape: tuple[int, int]) -> Orders:
    """Return for every term the contraction of inputs, opened rows and last factors."""
    order = len(layout.groups[group].fold)
    count = len(layout.radices(group, order - 1))
    box = tuple((0, size) for size in layout.radices(group))
    made = Factorisation(layout, group, box, Sources(), Sources())
    digits = tuple(label for digit in made.digits[count:] for label in digit)
    blocks = shape[1] // layout.groups[group].fold[-1]
    found = []
    for index in range(len(layout.terms(group))):
        _, kept, factors = _ends(made, index)
        made.sizes |= {ROWS: shape[0], BLOCKS: blocks}
        cut = (BLOCKS,) if blocks > 1 else ()
        first = [(TOKENS, *cut, *digits), (ROWS, *cut, *kept)]
        found.append(made.ordered(first, factors, (TOKENS, ROWS)))
    few, many = zip(*found, strict=True)
    return few, many


@dataclass(frozen=True)
class Direct:
    """A weight's update as one network with its inputs, under the digits of both widths."""

    sources: tuple[Source, ...]
    outputs: Shape
    inputs: Shape
    few: tuple[Term, ...]
    many: tuple[Term, ...]


def direct_network(layout: Layout, name: str, *, scales: bool = False) -> Direct | None:
    """Return a weight's network with its inputs, where the fold tells inputs from outputs."""
    pieces = layout.grouping.pieces[name]
    rows, columns = layout.shapes[name]
    piece = pieces[0]
    if len(pieces) > 1 or not layout.in_place(piece.group):
        return None
    part = slice_of(layout.radices(piece.group), piece.start, piece.stop)
    if len(part.boxes) > 1 or part.skip:
        return None
    (box,) = part.boxes
    sizes = [last - first for first, last in box]
    if math.prod(sizes) != rows * columns:
        return None
    place = len(sizes)
    trailing = 1
    while place and trailing * sizes[place - 1] <= columns:
        place -= 1
        trailing *= sizes[place]
    parted = None
    if trailing != columns:
        rest, over = divmod(columns, trailing)
        if over or not place or sizes[place - 1] % rest:
            return None
        place -= 1
        parted = (place, rest)
    sources = Sources()
    made = Factorisation(layout, piece.group, box, sources, parted=parted)
    labels = [label for digit in made.digits for label in digit]
    inputs: list[int] = []
    width = 1
    while width < columns:
        label = labels.pop()
        width *= made.sizes[label]
        inputs.insert(0, label)
    few, many = made.applied(tuple(labels), tuple(inputs), scales)
    shapes = [tuple(made.sizes[label] for label in own) for own in (labels, inputs)]
    return Direct(sources.all, shapes[0], shapes[1], few, many)


def row_slice(layout: Layout, name: str) -> tuple[int, int] | None:
    """Return a weight's range of rows of the leading modes, where its fold is aligned."""
    pieces = layout.grouping.pieces[name]
    fold = layout.groups[pieces[0].group].fold
    width = fold[-1]
    if len(fold) < 2 or len(pieces) > 1 or not layout.in_place(pieces[0].group):
        return None
    piece = pieces[0]
    if layout.shapes[name][1] % width or piece.start % width:
        return None
    return piece.start // width, piece.stop // width
