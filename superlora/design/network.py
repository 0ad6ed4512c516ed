"""A weight's update as one tensor network: which slices of which blocks, under which labels.

Integers only. A product of Tucker factorisations, whatever its order, splits, cores, sum of terms
and fold, is a sum of contractions of slices of blocks; a weight that straddles the fold is several
boxes of them, read one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from superlora.design.contraction import TOKENS, Contraction, Cost, Labels, contract
from superlora.design.fold_shape import Shape
from superlora.design.grouping import cut_pieces
from superlora.design.layout import Layout, kept
from superlora.design.slices import Box, slice_of
from superlora.design.splits import Split, is_last, neighbours

# The numbers of tokens that paths are planned for.
FEW, MANY = 1, 4096


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
    whole : bool
        Whether it is the source as it is.
    """

    source: int
    digits: Shape | None
    cut: tuple[slice, ...] | None
    shape: Shape | None
    labels: Labels
    frozen: bool
    whole: bool


@dataclass(frozen=True)
class Term:
    """One product of a sum.

    Attributes
    ----------
    operands : tuple of Operand
        The slices of the blocks that are multiplied.
    contraction : Contraction
        The order in which they are.
    """

    operands: tuple[Operand, ...]
    contraction: Contraction


# What is taken of a digit or of a rank, its size, and its labels.
Part = tuple[tuple[int, int], int, Labels]


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


# The sources of a network, and their indices.
Sources = dict[Source, int]


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
        self.sources, self.ends = sources, sources if ends is None else ends
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

    def products(self) -> Iterator[tuple[list[Operand], list[Operand], Labels]]:
        """Yield every product's operands, those of the last mode apart, and what joins the two."""
        splits = self.layout.specs[self.group].splits
        for term, product in enumerate(self.layout.terms(self.group)):
            # The ranks of every product take the same labels.
            for label in [label for label in self.sizes if label >= self._first]:
                del self.sizes[label]
            found: list[Operand] = []
            last: list[Operand] = []
            joining: list[int] = []
            for place, split in enumerate(product):
                ends = self.digits[self._digit(place, len(split.shape) - 1)]
                for leaf, parts in self._parts(split, place).items():
                    apart = is_last(split, leaf) and len(split.sizes) > 1 and not split.joined
                    to = self.ends if apart else self.sources
                    name = self.layout.block(self.group, term * splits + place, leaf)
                    operand = self._operand(split, place, leaf, parts, name, to)
                    (last if apart else found).append(operand)
                    if apart:
                        ends = tuple(label for label in operand.labels if label not in ends)
                joining += ends
            present = {label for own in found for label in own.labels}
            yield found, last, tuple(dict.fromkeys(own for own in joining if own in present))

    def _parts(self, split: Split, place: int) -> dict[str, list[Part]]:
        """Return what every block of a split is read as, one entry a digit or a rank."""
        digits = [self._digit(place, mode) for mode in range(len(split.shape))]
        read = [
            (self.box[digit], size, self.digits[digit])
            for digit, size in zip(digits, split.shape, strict=True)
        ]
        modes = neighbours(read, len(split.sizes))
        if split.core == "train":
            ranks = [self._rank(rank) for rank in (1, *split.ranks, 1)]
            cores = zip(ranks, modes, ranks[1:], strict=False)
            return {f"core{mode}": [*one, *own, *two] for mode, (one, own, two) in enumerate(cores)}
        if split.core == "full":
            ranks = [
                self._rank(rank) if factored else mode
                for rank, factored, mode in zip(split.ranks, split.factored, modes, strict=True)
            ]
            core = [part for rank in ranks for part in rank]
        else:  # one rank of all modes
            core = self._rank(split.ranks[0])
            ranks = [core] * len(modes)
        both = enumerate(zip(modes, ranks, strict=True))
        found = {"core": core, **{f"factor{mode}": [*own, *rank] for mode, (own, rank) in both}}
        return {leaf: found[leaf] for leaf in split.block_shapes}

    def _rank(self, rank: int) -> list[Part]:
        return [((0, rank), rank, (self._label(rank),) if rank > 1 else ())]

    def _operand(
        self, split: Split, place: int, leaf: str, parts: list[Part], block: str, sources: Sources
    ) -> Operand:
        shape, order = split.block_shapes[leaf], len(split.shape)
        mapped = []
        made = list(shape)  # by the group's map of single modes
        for mode in self.layout.maps[self.group].mapped(order):
            of, axis = (f"factor{mode}", 0) if split.factored[mode] else ("core", mode)
            if of == leaf:
                made[axis] = split.shape[mode]
                mapped.append((axis, place * order + mode, made[axis]))
        source = Source(block, shape, self.group if mapped else -1, tuple(mapped))
        read = [size for _, size, _ in parts]
        taken = [stop - start for (start, stop), _, _ in parts]
        labels = tuple(label for _, _, own in parts for label in own)
        final = [self.sizes[label] for label in labels]
        # A slice of a source is a view, so it is cut before axes are dropped.
        cut = None
        if taken != read:
            cut = tuple(
                slice(None) if stop - start == size else slice(start, stop)
                for (start, stop), size, _ in parts
            )
        digits = None if cut is None or read == made else tuple(read)
        to = None if final == (made if cut is None else taken) else tuple(final)
        return Operand(
            sources.setdefault(source, len(sources)),
            digits,
            cut,
            to,
            labels,
            block in self.layout.frozen,
            whole=cut is None and to is None,
        )

    def closed(self) -> tuple[Term, ...]:
        """Return the terms that make the box's entries, its digits in order."""
        output = tuple(label for digit in self.digits for label in digit)
        return tuple(self.contracted([], [*own, *last], output) for own, last, _ in self.products())

    def contracted(
        self, first: Sequence[Labels], operands: Sequence[Operand], output: Labels, tokens: int = 0
    ) -> Term:
        """Return the contraction of some operands after arrays of which only labels are known."""
        labels = [*first, *(own.labels for own in operands)]
        frozen = (len(first) + place for place, own in enumerate(operands) if own.frozen)
        path = contract(labels, output, self.sizes, tokens, frozenset(frozen))
        return Term(tuple(operands), path)

    def ordered(
        self, first: Sequence[Labels], operands: Sequence[Operand], output: Labels
    ) -> tuple[Term, Term]:
        """Return the same contraction in the orders that are best for few tokens, and for many."""
        few, many = (self.contracted(first, operands, output, tokens) for tokens in (FEW, MANY))
        return few, many


@kept
def network_of(layout: Layout, name: str) -> Network:
    """Return what a weight's update is made of."""
    return weight_network(layout, name, (0, layout.shapes[name][0]))


def weight_network(layout: Layout, name: str, rows: tuple[int, int]) -> Network:
    """Return what some rows of a weight's update are made of."""
    width = layout.shapes[name][1]
    first, last = rows
    sources = Sources()
    runs = []
    for piece in cut_pieces(layout.grouping.pieces[name], first * width, last * width):
        group = piece.group
        if layout.in_place(group):
            part = slice_of(layout.radices(group), piece.start, piece.stop)
            boxes = [Factorisation(layout, group, box, sources).closed() for box in part.boxes]
            runs.append(Run(tuple(boxes), part.skip, part.size))
        else:
            start, stop = layout.position(piece)
            runs.append(Run((), start, stop - start, layout.joint(group)[0]))
    return Network(tuple(sources), tuple(runs), (last - first, width))


@kept
def group_network(layout: Layout, group: int) -> Network:
    """Return what a group's folded tensor is made of, before its map."""
    radices = layout.radices(group)
    sources = Sources()
    terms = Factorisation(layout, group, tuple((0, size) for size in radices), sources).closed()
    fold = layout.groups[group].fold
    return Network(tuple(sources), (Run((terms,), 0, math.prod(fold)),), fold)


@dataclass(frozen=True)
class Opened:
    """Rows of a fold's leading modes, the ranks of its last mode left open.

    Of ``factor0 @ factor1.T`` the rows are those of `factor0` itself, and `factor1` is the end.
    """

    sources: tuple[Source, ...]  # of the rows
    ends: tuple[Source, ...]  # of the last factors
    # The rows are those of the boxes, one after the other. Every term makes an array of its own,
    # (rows, *ranks).
    boxes: tuple[tuple[Term, ...], ...]
    skip: int  # rows of the boxes before the first
    rows: int
    ranks: tuple[Shape, ...]  # for every term the sizes of its open labels
    completed: tuple[Term, ...]  # of rows, the first operand, with the last factors

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
    boxes = []
    for box in part.boxes:
        made = Factorisation(layout, group, (*box, *trailing), sources, ends)
        output = tuple(label for digit in made.digits[: len(leading)] for label in digit)
        digits = tuple(label for digit in made.digits[len(leading) :] for label in digit)
        terms, ranks, completed = [], [], []
        for own, last, joining in made.products():
            terms.append(made.contracted([], own, (*output, *joining)))
            ranks.append(tuple(made.sizes[label] for label in joining))
            # As many rows as are given, which are formed some at a time.
            completed.append(made.contracted([(TOKENS, *joining)], last, (TOKENS, *digits), MANY))
        boxes.append(tuple(terms))
    found = tuple(ranks), tuple(completed)  # the same of every box
    return Opened(tuple(sources), tuple(ends), tuple(boxes), part.skip, part.size, *found)


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
