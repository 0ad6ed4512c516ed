"""How a weight's update is applied, and from how many tokens on. Integers only."""

from __future__ import annotations

from dataclasses import dataclass

from superlora.design.contraction import Cost
from superlora.design.fold_shape import Shape, ceil_divide
from superlora.design.layout import Layout, kept
from superlora.design.network import (
    Opened,
    Source,
    Term,
    direct_network,
    network_of,
    opened_products,
    opened_rows,
    row_slice,
)
from superlora.errors import some

FORMED = "formed"
APPLY = ("auto", "factored", "formed")
_NO_PRODUCT = (
    "apply must be 'auto' or 'formed' for {}, whose fold has no digits or last mode of the input "
    "width alone, as that of fold='aligned' has, and whose map offers no product, or "
    "whose contraction with inputs makes results many times larger than they are: got 'factored'"
)
# Rows are opened for a whole group if they are this many times fewer than its entries.
_LEAST = 8
# No way is looked for beyond so many tokens.
_MOST_TOKENS = 1 << 40
# A path whose largest intermediate result has so many times the entries of inputs, outputs and
# weight together is not taken: the update is formed instead.
_MOST_LARGER = 16


@dataclass(frozen=True)
class Factored:
    """A weight's update as networks with inputs.

    Attributes
    ----------
    sources : tuple of Source
        The blocks that are operands themselves.
    opened : Opened or None
        The rows that are the first operand of every term, where the leading modes are contracted
        on their own.
    inputs : tuple of int
        What an input is read as.
    few, many : tuple of Term
        The terms in the order that is best for few tokens, and for many; none where a map
        multiplies inputs itself.
    lead : tuple of int
        What the rows are read as before their ranks, (outputs, blocks), where they are opened.
    base : tuple of int, or None
        What the layer's weight is read as, the operand after the inputs, where it is one.
    switch : int
        From how many tokens on the order for many is taken.
    costs : (Cost, Cost)
        Of the two.
    """

    sources: tuple[Source, ...]
    opened: Opened | None
    inputs: Shape
    few: tuple[Term, ...]
    many: tuple[Term, ...]
    switch: int
    costs: tuple[Cost, Cost]
    lead: Shape = ()
    base: Shape | None = None

    def terms(self, tokens: int) -> tuple[Term, ...]:
        """Return the terms in the better order for so many tokens."""
        return self.many if tokens >= self.switch else self.few

    def cost(self, tokens: int) -> int:
        """Return the cost of a product with so many inputs."""
        return self.costs[tokens >= self.switch].of(tokens)


@dataclass(frozen=True)
class Application:
    """How one weight's update is applied.

    Attributes
    ----------
    factored : Factored or None
        None where the update can only be formed.
    forming : Cost
        Of forming the update once.
    bounds : dict of (bool, bool) to int or None
        From how many tokens on it is formed: by whether a backward pass follows, and whether one
        product with ``W₀ + ΔW`` takes the place of two; None for no number.
    """

    factored: Factored | None
    forming: Cost
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
    few = _LEAST * open_width(layout, group) <= fold[-1]
    return few or (len(fold) == 2 and len(layout.groups[group].splits) == 1)


def open_width(layout: Layout, group: int) -> int:
    """Return the columns of a group's opened rows."""
    return opened_rows(layout, group, 0, 1).width


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
    bounds = {}
    for trained in (False, True):
        for fused in (False, True):
            bounds[trained, fused] = (
                None if found is None else _bound(layout, name, found, forming, trained, fused)
            )
    return Application(found, forming, bounds)


def _factored(layout: Layout, name: str) -> Factored | None:
    group = layout.grouping.pieces[name][0].group
    rows, columns = layout.shapes[name]
    if name.startswith("scale_weight."):  # W₀ is an operand too
        direct = direct_network(layout, name, scales=True)
        if direct is None or not _fits(layout, name, direct.few):
            return None
        terms = (direct.few, direct.few)
        shape = (*direct.outputs, *direct.inputs)
        return _with_switch(direct.sources, None, direct.inputs, *terms, Cost(), base=shape)
    products = layout.multiplies(name)
    if products is not None:
        cost = Cost(0, 0, *products)
        return Factored((), None, (columns,), (), (), 0, (cost, cost))
    span = row_slice(layout, name)
    shared = opens_rows(layout, group)
    direct = None if shared and span is not None else direct_network(layout, name)
    if direct is not None and _fits(layout, name, direct.few, direct.many):
        return _with_switch(direct.sources, None, direct.inputs, direct.few, direct.many, Cost())
    if span is None:
        return None
    width = layout.groups[group].fold[-1]
    digits = layout.radices(group)[len(layout.radices(group, len(layout.groups[group].fold) - 1)) :]
    blocks = columns // width
    opened = opened_rows(layout, group, *span)
    if opened.width * blocks >= 4 * columns:
        return None
    inputs = tuple(size for size in (blocks, *digits) if size > 1)
    few, many = opened_products(layout, group, (rows, columns))
    if not _fits(layout, name, few, many):
        return None
    lead = (rows, blocks) if blocks > 1 else (rows,)
    return _with_switch(opened.ends, opened, inputs, few, many, opened.cost, lead)


def _fits(layout: Layout, name: str, *orders: tuple[Term, ...]) -> bool:
    rows, columns = layout.shapes[name]
    most = _MOST_LARGER * (rows + columns + rows * columns)
    return all(term.contraction.largest <= most for terms in orders for term in terms)


def _with_switch(
    sources: tuple[Source, ...],
    opened: Opened | None,
    inputs: Shape,
    few: tuple[Term, ...],
    many: tuple[Term, ...],
    before: Cost,
    lead: Shape = (),
    base: Shape | None = None,
) -> Factored:
    costs = tuple(sum((t.contraction.cost for t in terms), before) for terms in (few, many))
    switch = _crossing(costs[1], costs[0])
    switch = _MOST_TOKENS if switch is None else switch
    return Factored(sources, opened, inputs, few, many, switch, (costs[0], costs[1]), lead, base)


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
    if not isinstance(apply, str) or apply not in APPLY:
        raise ValueError(f"apply must be one of {', '.join(map(repr, APPLY))}: got {apply!r}")
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
    return _NO_PRODUCT.format(names)
