"""How a weight's update is applied, and from how many tokens on. Integers only."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from superlora.design.contraction import TOKENS, Cost, Labels
from superlora.design.fold_shape import Shape, ceil_divide
from superlora.design.layout import Layout, kept
from superlora.design.network import (
    Factorisation,
    Opened,
    Source,
    Sources,
    Term,
    network_of,
    opened_rows,
    row_slice,
)
from superlora.design.slices import slice_of
from superlora.design.spec_checks import check_choice
from superlora.errors import some

FORMED = "formed"
APPLY = ("auto", "factored", "formed")
# Labels of opened rows and of their blocks, beyond those of any product.
_ROWS, _BLOCKS = 1_000, 1_001
# Rows are opened for a whole group if they are this many times fewer than its entries.
_LEAST = 8
# No way is looked for beyond so many tokens.
_MOST_TOKENS = 1 << 40
# A path whose largest intermediate result has so many times the entries of inputs, outputs and
# weight together is not taken: the update is formed instead.
_MOST_LARGER = 16


@dataclass(frozen=True)
class Factored:
    """A weight's update as networks with inputs."""

    inputs: Shape  # what an input is read as
    before: Cost  # of what is no term: the opened rows, or the map's own product
    # The terms in the order that is best for few tokens, and for many; none where a map multiplies
    # inputs itself.
    few: tuple[Term, ...] = ()
    many: tuple[Term, ...] = ()
    sources: tuple[Source, ...] = ()  # the blocks that are operands themselves
    # The rows after the inputs in every term, where the leading modes are contracted on their own,
    # and what they are read as before their ranks, (outputs, blocks).
    opened: Opened | None = None
    lead: Shape = ()
    base: Shape | None = None  # what the layer's weight is read as, where it is an operand

    @functools.cached_property
    def costs(self) -> tuple[Cost, ...]:
        """The cost of the one order, and of the other."""
        orders = self.few, self.many
        return tuple(sum((t.contraction.cost for t in own), self.before) for own in orders)

    @functools.cached_property
    def switch(self) -> int:
        """From how many tokens on the order for many is taken."""
        few, many = self.costs
        found = _crossing(many, few)
        return _MOST_TOKENS if found is None else found

    def terms(self, tokens: int) -> tuple[Term, ...]:
        """Return the terms in the better order for so many tokens."""
        return self.many if tokens >= self.switch else self.few


@dataclass(frozen=True)
class Application:
    """How one weight's update is applied."""

    factored: Factored | None  # None where the update can only be formed
    forming: Cost  # of forming the update once
    # From how many tokens on it is formed, if any: by whether a backward pass follows, and whether
    # one product with ``W₀ + ΔW`` takes the place of two.
    bounds: dict[tuple[bool, bool], int | None]

    def formed(
        self, tokens: int, apply: str = "auto", *, trained: bool = False, fused: bool = False
    ) -> bool:
        """Return whether the update is best formed."""
        if self.factored is None or apply == FORMED:
            return True
        bound = self.bounds[trained, fused]
        return apply == "auto" and bound is not None and tokens >= bound

    def __str__(self) -> str:
        if self.factored is None:
            return FORMED
        bound = self.bounds[True, True]
        return "factored" if bound is None else f"factored, formed from {bound:,} tokens"


@kept
def opens_rows(layout: Layout, group: int) -> bool:
    """Return whether the weights of a group are cut from rows that are opened once for all."""
    names = layout.grouping.members[group]
    fold, own = layout.groups[group].fold, layout.specs[group]
    if len(names) < 2 or len(fold) < 2 or not layout.in_place(group) or own.tied:
        return False
    if any(len(layout.grouping.pieces[name]) > 1 for name in names):
        return False
    few = _LEAST * opened_rows(layout, group, 0, 1).width <= fold[-1]
    return few or (len(fold) == 2 and len(layout.groups[group].splits) == 1)


def rows_of(layout: Layout, name: str) -> tuple[int, int]:
    """Return the opened rows of its group that a weight meets."""
    (piece,) = layout.grouping.pieces[name]
    width = layout.groups[piece.group].fold[-1]
    return piece.start // width, ceil_divide(piece.stop, width)


@kept
def whole_rows(layout: Layout, group: int) -> Opened:
    """Return all opened rows of a group that its weights are cut from."""
    stop = max(rows_of(layout, name)[1] for name in layout.grouping.members[group])
    return opened_rows(layout, group, 0, stop)


def row_pair(layout: Layout, name: str) -> tuple[Opened, int] | None:
    """Return the opened rows of a weight, and how many of them make an output."""
    span = row_slice(layout, name)
    if span is None:
        return None
    group = layout.grouping.pieces[name][0].group
    opened = opened_rows(layout, group, *span)
    blocks = layout.shapes[name][1] // layout.groups[group].fold[-1]
    return None if blocks * opened.width >= min(layout.shapes[name]) else (opened, blocks)


@kept
def application(layout: Layout, name: str) -> Application:
    """Return how a weight's update is applied."""
    found = _factored(layout, name)
    forming = _forming(layout, name)
    ways = [(trained, fused) for trained in (False, True) for fused in (False, True)]
    bounds = {way: _bound(layout, name, found, forming, *way) for way in ways if found is not None}
    return Application(found, forming, bounds)


def _factored(layout: Layout, name: str) -> Factored | None:
    scales = name.startswith("scale_weight.")  # W₀ is an operand too
    products = None if scales else layout.multiplies(name)
    if products is not None:
        return Factored((layout.shapes[name][1],), Cost(0, 0, *products))
    span = None if scales else row_slice(layout, name)
    if span is None or not opens_rows(layout, layout.grouping.pieces[name][0].group):
        found = _direct(layout, name, scales)
        if _fits(layout, name, found):
            return found
    found = None if span is None else _with_opened_rows(layout, name, span)
    return found if _fits(layout, name, found) else None


def _fits(layout: Layout, name: str, found: Factored | None) -> bool:
    if found is None:
        return False
    rows, columns = layout.shapes[name]
    most = _MOST_LARGER * (rows + columns + rows * columns)
    return all(term.contraction.largest <= most for term in (*found.few, *found.many))


def _direct(layout: Layout, name: str, scales: bool) -> Factored | None:
    """Return one network with the inputs, where the fold tells inputs from outputs."""
    pieces = layout.grouping.pieces[name]
    rows, columns = layout.shapes[name]
    piece = pieces[0]
    if len(pieces) > 1 or not layout.in_place(piece.group):
        return None
    box, *others = slice_of(layout.radices(piece.group), piece.start, piece.stop).boxes
    sizes = [last - first for first, last in box]
    if others or math.prod(sizes) != rows * columns:
        return None
    place = len(sizes)
    trailing = 1
    while place and trailing * sizes[place - 1] <= columns:
        place -= 1
        trailing *= sizes[place]
    parted = None
    if trailing != columns:
        rest, over = divmod(columns, trailing)
        if over or sizes[place - 1] % rest:
            return None
        parted = (place - 1, rest)
    sources = Sources()
    made = Factorisation(layout, piece.group, box, sources, parted=parted)
    labels = [label for digit in made.digits for label in digit]
    inputs: list[int] = []
    while math.prod(made.sizes[label] for label in inputs) < columns:
        inputs.insert(0, labels.pop())
    first: list[Labels] = [(TOKENS, *inputs), *([(*labels, *inputs)] if scales else [])]
    output = (TOKENS, *labels)
    terms = [made.ordered(first, [*own, *last], output) for own, last, _ in made.products()]
    few, many = zip(*terms, strict=True)
    outputs, read = (tuple(made.sizes[label] for label in own) for own in (labels, inputs))
    if scales:  # one product with each rank would cost more, but for few tokens
        return Factored(read, Cost(), few, few, tuple(sources), base=(*outputs, *read))
    return Factored(read, Cost(), few, many, tuple(sources))


def _with_opened_rows(layout: Layout, name: str, span: tuple[int, int]) -> Factored | None:
    """Return the networks of inputs, opened rows and last factors."""
    group = layout.grouping.pieces[name][0].group
    rows, columns = layout.shapes[name]
    fold = layout.groups[group].fold
    opened = opened_rows(layout, group, *span)
    blocks = columns // fold[-1]
    if opened.width * blocks >= 4 * columns:
        return None
    box = tuple((0, size) for size in layout.radices(group))
    made = Factorisation(layout, group, box, Sources(), Sources())
    leading = len(layout.radices(group, len(fold) - 1))
    digits = [label for digit in made.digits[leading:] for label in digit]
    cut = (_BLOCKS,) if blocks > 1 else ()
    terms = []
    for _, last, joining in made.products():
        made.sizes.update({_ROWS: rows, _BLOCKS: blocks})
        first = [(TOKENS, *cut, *digits), (_ROWS, *cut, *joining)]
        terms.append(made.ordered(first, last, (TOKENS, _ROWS)))
    few, many = zip(*terms, strict=True)
    wide = (blocks,) if cut else ()
    inputs = (*wide, *(made.sizes[label] for label in digits))
    return Factored(inputs, opened.cost, few, many, opened.ends, opened, (rows, *wide))


def _forming(layout: Layout, name: str) -> Cost:
    group = layout.grouping.pieces[name][0].group
    if opens_rows(layout, group):
        opened = opened_rows(layout, group, *rows_of(layout, name))
        return sum((t.contraction.cost.at(opened.rows) for t in opened.completed), opened.cost)
    total = network_of(layout, name).cost
    for piece in layout.grouping.pieces[name]:
        if not layout.in_place(piece.group):
            item, fixed = layout.groups[piece.group], layout.maps[piece.group]
            share = piece.stop - piece.start
            operations = fixed.operations(item.before, item.size) * share // item.size
            total += Cost(operations, share)
    return total


def _bound(
    layout: Layout, name: str, found: Factored, forming: Cost, trained: bool, fused: bool
) -> int | None:
    """Return from how many tokens on forming costs less."""
    rows, columns = layout.shapes[name]
    entries = rows * columns
    # W₀ + ΔW is written and read. In the backward pass it is formed again, and so are the
    # gradients of what it is formed from; that of the weight itself is a product of its own.
    once = (Cost(moved=3 * entries) + forming) * (4 if trained else 1)
    each = entries if trained else 0
    if not fused:
        each += entries * (2 if trained else 1)
    formed = once + Cost(0, 0, each, 0 if fused else rows + columns)
    passes = 3 if trained else 1
    few, many = (_crossing(formed, cost * passes) for cost in found.costs)
    if few is not None and few < found.switch:
        return few
    return None if many is None else max(many, found.switch)


def _crossing(one: Cost, other: Cost) -> int | None:
    """Return from how many tokens on one way costs less than another."""
    gap = one.once - other.once
    slope = other.each - one.each
    if slope > 0:
        return max(0, gap // slope + 1)
    return 0 if slope == 0 and gap < 0 else None


def check_apply(apply: object, layout: Layout | None = None) -> None:
    """Refuse what is no way of applying updates, or none that all weights have."""
    check_choice("apply", apply, APPLY)
    if apply == "factored" and layout is not None:
        # What changes a bias, or scales a weight, is applied in its own way.
        asked = [
            name
            for own in layout.supports.values()
            for operation, name in own.items()
            if operation in ("add_weight", "right_weight", "left_weight")
        ]
        without = [name for name in asked if application(layout, name).factored is None]
        if without:
            raise ValueError(no_factored_way(some(map(repr, without))))


def no_factored_way(names: str) -> str:
    """Return what is wrong where weights are to be applied factored that cannot be."""
    return (
        f"apply must be 'auto' or 'formed' for {names}, whose fold has no digits or last mode of "
        "the input width alone, as that of fold='aligned' has, and whose map offers no product, or "
        "whose contraction with inputs makes results many times larger than they are: got "
        "'factored'"
    )
