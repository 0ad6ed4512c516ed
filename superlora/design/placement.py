"""`Placement`: where a weight lies among the groups."""

from __future__ import annotations

from dataclasses import dataclass

from superlora.design.fold_shape import Shape
from superlora.design.layout import Layout
from superlora.design.slices import Box, boxes


@dataclass(frozen=True)
class Placement:
    """Where a run of a weight's entries lies, in row-major order.

    Attributes
    ----------
    group : int
        The group, as in the names of its blocks.
    start, stop : int
        The entries of the group's vector.
    fold : tuple of int
        The shape that the group is folded to, before its map.
    boxes : tuple of tuples of (int, int)
        The parts of the fold that hold them, one after the other: a first index and one after the
        last for every mode. Empty where a map moves or mixes entries.
    """

    group: int
    start: int
    stop: int
    fold: Shape
    boxes: tuple[Box, ...]


def placements(layout: Layout, name: str) -> list[Placement]:
    """Return where a weight lies."""
    found = []
    for piece in layout.grouping.pieces[name]:
        fold, in_place = layout.groups[piece.group].fold, layout.in_place(piece.group)
        parts = tuple(boxes(fold, piece.start, piece.stop)) if in_place else ()
        found.append(Placement(piece.group, piece.start, piece.stop, fold, parts))
    return found
