"""What each way to apply a weight's update costs. Integers only.

The counts are exact; `Machine` turns them into seconds, and the least wins.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from superlora.errors import some
from superlora.maps import Fourier, Identity
from superlora.splitting import Split

if TYPE_CHECKING:
    from superlora.layout import Layout

FORMED = "formed"
APPLY = ("auto", "factored", "formed")
_NO_PRODUCT = (
    "apply must be 'auto' or 'formed' for {}, whose fold has a last mode that does not divide the "
    "input width, as that of fold='aligned' does, and whose update is neither a Kronecker product "
    "of matrices nor FourierFT's: got 'factored'"
)
# Splits whose orders are all tried.
_MOST_SPLITS = 6
# Multiplications in a matrix product that take as long as one operation outside of it.
_SCALAR = 8
# Passes over what a formed weight is: formed, added to W₀, read by the product.
_FORMED_PASSES = 4


@dataclass(frozen=True)
class Work:
    """The work of one way to apply an update, forward.

    Attributes
    ----------
    multiplied : int
        Multiplications a token.
    moved : int
        Entries read or written a token.
    once : int
        Multiplications however many tokens there are.
    once_moved : int
        Entries read or written however many tokens there are.
    calls : int
        Array operations.
    """

    multiplied: int
    moved: int
    once: int
    once_moved: int
    calls: int


@dataclass(frozen=True)
class Machine:
    """What work takes on a device.

    Attributes
    ----------
    multiply : float
        Seconds a multiplication and addition, in a large matrix product.
    move : float
        Seconds an entry that is read or written in passing.
    call : float
        Seconds an array operation, however small.
    """

    multiply: float = 1e-11
    move: float = 2.5e-10
    call: float = 5e-6

    def seconds(
        self, way: str, work: Work, tokens: int, *, trained: bool = True, fused: bool = True
    ) -> float:
        """Estimate the time of one layer's update.

        Parameters
        ----------
        way : str
            The way.
        work : Work
            Its work.
        tokens : int
            Rows of the inputs.
        trained : bool
            Whether a backward pass follows.
        fused : bool
            Whether one product with ``W₀ + ΔW`` can take the place of two.

        Returns
        -------
        float
            Seconds above those of the frozen layer.
        """
        if way != FORMED:
            # The backward pass is two such products: for the inputs and for the factors.
            passes = 3 if trained else 1
            once, each = passes, passes
        else:
            # Formed twice, and two products with the weight's gradient; that gradient itself.
            once, each = (4, 1) if trained else (1, 0)
            each += 0 if fused else 2 if trained else 1
        multiplied = once * work.once + each * work.multiplied * tokens
        moved = once * work.once_moved + each * work.moved * tokens
        calls = work.calls * (3 if trained else 1)
        return self.multiply * multiplied + self.move * moved + self.call * calls


def ways_of(layout: Layout, name: str) -> dict[str, Work]:
    """Return the ways to apply a weight's update, and the work of each.

    Parameters
    ----------
    layout : Layout
        What lies where.
    name : str
        The weight.

    Returns
    -------
    dict of str to Work
        ``"formed"`` always; ``"low_rank"`` where its fold is aligned, ``"kronecker"`` where its
        group is a Kronecker product of matrices, ``"fourier"`` where its map is Fourier's.
    """
    found = {FORMED: _formed(layout, name)}
    if layout.row_slice(name) is not None:
        found["low_rank"] = _low_rank(layout, name)
    pieces = layout.grouping.pieces[name]
    group = pieces[0].group
    item, own, fixed = layout.groups[group], layout.specs[group], layout.maps[group]
    shape = layout.shapes[name]
    alone = len(pieces) == 1 and len(layout.grouping.members[group]) == 1
    if not alone or own.map.joint:
        return found
    product = item.fold == shape and own.splits > 1 and own.combine == "kronecker"
    if product and layout.identity(group):
        found["kronecker"] = _kronecker(layout, name)
    if isinstance(fixed, Fourier) and fixed.shape == shape:
        found["fourier"] = _fourier(item.before, shape)
    return found


def choose(
    layout: Layout,
    name: str,
    machine: Machine,
    tokens: int,
    apply: str = "auto",
    *,
    trained: bool = False,
    fused: bool = False,
) -> str:
    """Return the way that takes the least time.

    Parameters
    ----------
    layout : Layout
        What lies where.
    name : str
        The weight.
    machine : Machine
        What work takes.
    tokens : int
        Rows of the inputs.
    apply : {"auto", "factored", "formed"}
        Which ways are allowed.
    trained : bool
        Whether a backward pass follows.
    fused : bool
        Whether one product with ``W₀ + ΔW`` can take the place of two.

    Returns
    -------
    str
        A key of ``layout.ways(name)``.

    Raises
    ------
    ValueError
        If there is no factored way and one is asked for.
    """
    found = layout.ways(name)
    if apply == FORMED:
        return FORMED
    best, least = "", math.inf
    for way, work in found.items():
        if apply == "factored" and way == FORMED:
            continue
        seconds = machine.seconds(way, work, tokens, trained=trained, fused=fused)
        if seconds < least:
            best, least = way, seconds
    if not best:
        raise ValueError(_NO_PRODUCT.format(repr(name)))
    return best


def check_apply(apply: object, layout: Layout | None = None) -> None:
    """Refuse what is no way of applying updates, or none that all weights have.

    Parameters
    ----------
    apply : object
        As a user gave it.
    layout : Layout, optional
        Whose weights must all have it.

    Raises
    ------
    ValueError
        If it is so.
    """
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
        without = [name for name in asked if list(layout.ways(name)) == [FORMED]]
        if without:
            raise ValueError(_NO_PRODUCT.format(some(map(repr, without))))


def thin(split: Split) -> bool:
    """Return whether a split's two factors are applied instead of their product."""
    if split.joined or not split.factored[1] or len(split.sizes) != 2:
        return False
    rows, columns = split.shape
    return 2 * split.ranks[1] * (rows + columns) < rows * columns


def kronecker_order(splits: tuple[Split, ...]) -> tuple[int, ...]:
    """Return the order of the digits in which the inputs meet a Kronecker product's matrices.

    Parameters
    ----------
    splits : tuple of Split
        Of order two.

    Returns
    -------
    tuple of int
        That of the fewest multiplications; from the last digit on where the splits are many.
    """
    indices = range(len(splits))
    if len(splits) > _MOST_SPLITS:
        return tuple(reversed(indices))
    orders = itertools.permutations(reversed(indices))
    return min(orders, key=lambda order: _order_work(splits, order)[0])


def inner_width(layout: Layout, name: str) -> int:
    """Return q of ``ΔW = left @ rightᵀ`` where a weight's fold is aligned, else its widths'."""
    if layout.row_slice(name) is None:
        return max(layout.shapes[name])
    group = layout.grouping.pieces[name][0].group
    blocks = layout.shapes[name][1] // layout.groups[group].fold[-1]
    return blocks * open_width(layout, group)


def open_width(layout: Layout, group: int) -> int:
    """Return the columns of a group's opened rows: the ranks of its last mode."""
    return sum(math.prod(split.last[1] for split in splits) for splits in layout.terms(group))


def _low_rank(layout: Layout, name: str) -> Work:
    rows, columns = layout.shapes[name]
    group = layout.grouping.pieces[name][0].group
    inner = inner_width(layout, name)
    width = open_width(layout, group)
    reduced = any(split.last[2] for split in layout.groups[group].splits)
    multiplied = rows * inner + columns * width * reduced
    made = rows * inner  # of the rows that are opened
    return Work(multiplied, columns + inner + 2 * rows, made, made, 6)


def _kronecker(layout: Layout, name: str) -> Work:
    rows, columns = layout.shapes[name]
    group = layout.grouping.pieces[name][0].group
    total = Work(0, 2 * rows + columns, 0, 0, 0)
    for splits in layout.terms(group):
        multiplied, moved = _order_work(splits, kronecker_order(splits))
        once = sum(split.ranks[1] * math.prod(split.shape) for split in splits if not thin(split))
        total = Work(
            total.multiplied + multiplied,
            total.moved + moved,
            total.once + once,
            total.once_moved,
            total.calls + 4 * len(splits),
        )
    return total


def _order_work(splits: tuple[Split, ...], order: tuple[int, ...]) -> tuple[int, int]:
    """Return multiplications, and entries read and written, a token."""
    sizes = [split.shape[1] for split in splits]
    multiplied = moved = 0
    for index in order:
        split = splits[index]
        rows, columns = split.shape
        rest = math.prod(sizes) // columns
        each = split.ranks[1] * (rows + columns) if thin(split) else rows * columns
        multiplied += rest * each
        moved += rest * (rows + columns)
        sizes[index] = rows
    return multiplied, moved


def _fourier(count: int, shape: tuple[int, int]) -> Work:
    butterflies = sum(size * size.bit_length() for size in shape)
    return Work(_SCALAR * butterflies, 4 * sum(shape) + 10 * count, 0, 0, 12)


def _formed(layout: Layout, name: str) -> Work:
    entries = math.prod(layout.shapes[name])
    once, calls = 0, 8
    for piece in layout.grouping.pieces[name]:
        share = piece.stop - piece.start
        calls += 4 * len(layout.groups[piece.group].splits)
        own = layout.specs[piece.group]
        if layout.identity(piece.group):
            each = sum(_entry_work(split) for split in layout.groups[piece.group].splits)
            once += share * each
        elif not isinstance(own.map, Identity):
            item, fixed = layout.groups[piece.group], layout.maps[piece.group]
            operations = fixed.operations(item.before, item.size)
            once += _SCALAR * (operations * share // item.size + share)
    return Work(entries, 0, once, _FORMED_PASSES * entries, calls)


def _entry_work(split: Split) -> int:
    """Return the multiplications of an entry of a split: those of its last factor."""
    return split.last[1] if split.last[2] else 1
