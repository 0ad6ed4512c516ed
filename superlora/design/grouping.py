"""Collect and group: which entries of which weight lie in which group.

Stage one and two of the equation (SuperLoRA, Section 2): the updates of all
weights, raveled in row-major order and concatenated in the order given, are cut
into groups. Integers only.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from superlora.checks import check_count
from superlora.design.axes import Axes
from superlora.design.fold_shape import Shape, ceil_divide

# Each group is a tensor with names, shapes and an optimiser's state of its own.
_MOST_GROUPS = 1 << 20


@dataclass(frozen=True)
class Piece:
    """A run of a weight's raveled entries: ``start <= position < stop`` in a group's vector."""

    group: int
    start: int
    stop: int


def cut_pieces(pieces: Sequence[Piece], start: int, stop: int) -> list[Piece]:
    """Return the pieces of a range of a weight's raveled entries."""
    found, before = [], 0
    for piece in pieces:
        shift = piece.start - before
        first, last = max(start + shift, piece.start), min(stop + shift, piece.stop)
        if first < last:
            found.append(Piece(piece.group, first, last))
        before += piece.stop - piece.start
    return found


@dataclass(frozen=True)
class Grouping:
    """Where every weight lies."""

    sizes: Shape  # entries of each group that some weight uses
    pieces: dict[str, tuple[Piece, ...]]  # the runs that make up each weight, in order
    room: Shape  # entries that each group is made to hold: its own, or those of a padded one

    @functools.cached_property
    def contents(self) -> list[list[tuple[str, int, Piece]]]:
        """What each group holds: a weight, the first of its entries there, and the piece."""
        found: list[list[tuple[str, int, Piece]]] = [[] for _ in self.sizes]
        for name, pieces in self.pieces.items():
            start = 0
            for piece in pieces:
                found[piece.group].append((name, start, piece))
                start += piece.stop - piece.start
        return found

    @functools.cached_property
    def members(self) -> tuple[tuple[str, ...], ...]:
        """For each group the weights that have a piece in it, in order."""
        return tuple([tuple([name for name, *_ in held]) for held in self.contents])

    def matrices(
        self, group: int, axes: Mapping[str, Axes]
    ) -> tuple[tuple[tuple[int, int], ...], bool]:
        """Return the matrices in a group, of a stack each by itself, and whether all are whole."""
        found: list[tuple[int, int]] = []
        whole = True
        for name, start, piece in self.contents[group]:
            rows, columns = axes[name].out, axes[name].matrix[1]
            size, stop = rows * columns, start + piece.stop - piece.start
            found += [(rows, columns)] * (ceil_divide(stop, size) - start // size)
            whole &= start % size == stop % size == 0
        return tuple(found), whole


def check_shapes(shapes: Mapping[Any, Any]) -> dict[str, Axes]:
    """Return the axes of every weight, or say which entry is wrong."""
    if not isinstance(shapes, Mapping):
        raise TypeError(f"shapes must map names to (output, input): got {type(shapes).__name__}")
    if not shapes:
        raise ValueError("shapes must name at least one weight: got none")
    for name in shapes:
        if not isinstance(name, str):
            raise TypeError(f"shapes must have strings as names: got {name!r}")
    return {name: Axes.of(shape, f"shapes[{name!r}]") for name, shape in shapes.items()}


def layers_of(names: Iterable[str]) -> dict[str, str]:
    """Return the layer that each weight belongs to."""
    split = {name: name.split(".") for name in names}
    numbers = {
        name: [i for i, p in enumerate(parts) if p.isdecimal()] for name, parts in split.items()
    }
    found = Counter(
        (tuple(parts[:i]), tuple(parts[i + 1 :]))
        for name, parts in split.items()
        for i in numbers[name]
        if len(parts) > i + 2
    )
    # What is a list of layers in one stage is one in all, also where a stage has a single layer.
    lists = {_kind(path) for (path, _), items in found.items() if items > 1}
    layers = {}
    for name, parts in split.items():
        among = [i for i in numbers[name] if _kind(parts[:i]) in lists]
        if not numbers[name]:
            raise ValueError(
                "groups='layer' needs a layer number in every weight's name, as in "
                f"'blocks.3.query': got {name!r}"
            )
        last = among[-1] if among else numbers[name][0]
        layers[name] = ".".join(parts[: last + 1])
    return layers


def _kind(path: Sequence[str]) -> tuple[str, ...]:
    """Return the path of a list of modules, whichever the items that it lies in."""
    return tuple("*" if part.isdecimal() else part for part in path)


def group_weights(
    shapes: Mapping[str, tuple[int, int]],
    groups: str | int,
    cut: str = "even",
    stacks: Mapping[str, int] | None = None,
) -> Grouping:
    """Cut the concatenated updates into groups."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if groups == "weight":
        counts = [(stacks or {}).get(name, 1) for name in sizes]
        pairs = zip(sizes.values(), counts, strict=True)
        held = [size // count for size, count in pairs for _ in range(count)]
    elif groups == "layer":
        layers: dict[str, list[str]] = {}
        for name, layer in layers_of(sizes).items():
            layers.setdefault(layer, []).append(name)
        sizes = {name: sizes[name] for names in layers.values() for name in names}
        held = [sum([sizes[name] for name in names]) for names in layers.values()]
    else:
        held = _equal(sum(sizes.values()), check_count("groups", groups), cut)
    padded = cut == "pad" and isinstance(groups, int)
    room = held[:1] * len(held) if padded else held
    pieces: dict[str, tuple[Piece, ...]] = dict.fromkeys(shapes, ())
    group = start = 0
    for name, size in sizes.items():
        parts = []
        while size:
            if start == held[group]:
                group, start = group + 1, 0
            stop = min(start + size, held[group])
            parts.append(Piece(group, start, stop))
            size -= stop - start
            start = stop
        pieces[name] = tuple(parts)
    return Grouping(tuple(held), pieces, tuple(room))


def _equal(total: int, count: int, cut: str) -> list[int]:
    """Return the entries of so many groups of about equal size."""
    if count > min(total, _MOST_GROUPS):
        limit = f"{total}, the number of entries" if total < _MOST_GROUPS else str(_MOST_GROUPS)
        raise ValueError(f"groups must be at most {limit}: got {count}")
    if cut == "pad":
        width = ceil_divide(total, count)
        last = total - width * (count - 1)
        if last <= 0:
            raise ValueError(
                f"groups must leave every padded group at least one of {total} entries: got "
                f"{count} groups of {width}; use cut='even'"
            )
        return [width] * (count - 1) + [last]
    small, extra = divmod(total, count)
    return [small + 1] * extra + [small] * (count - extra)


def join(parts: list[Grouping], names: Iterable[str]) -> Grouping:
    """Join groupings of different weights, whose groups are numbered one after the other."""
    if len(parts) == 1:
        return parts[0]
    pieces: dict[str, tuple[Piece, ...]] = dict.fromkeys(names, ())
    offset = 0
    for part in parts:
        for name, found in part.pieces.items():
            pieces[name] = tuple([Piece(p.group + offset, p.start, p.stop) for p in found])
        offset += len(part.sizes)
    return Grouping(
        tuple([size for part in parts for size in part.sizes]),
        pieces,
        tuple([room for part in parts for room in part.room]),
    )
