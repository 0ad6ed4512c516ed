"""The vectors that F_in maps to blocks. Integers only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from superlora.maps import Map, Place

if TYPE_CHECKING:
    from superlora.layout import Layout


@dataclass(frozen=True)
class Inner:
    """What a block is cut from.

    Attributes
    ----------
    name : str
        The trained vector, a key of ``factor_shapes``.
    map : Map
        F_in.
    before, size : int
        Entries of the vector, and of what it is mapped to.
    start, stop : int
        Which of them are the block's.
    """

    name: str
    map: Map
    before: int
    size: int
    start: int
    stop: int


def inner_vectors(layout: Layout) -> dict[str, Inner]:
    """Return the vector that every block that has one is mapped from.

    Parameters
    ----------
    layout : Layout
        What lies where.

    Returns
    -------
    dict of str to Inner
        By name of the block; blocks that are trained themselves, or frozen, are not there.

    Raises
    ------
    ValueError
        If a map cannot serve the sizes.

    Notes
    -----
    A vector for all blocks of a part is ``"group.0.theta"``, of the part's first group; a
    block's own has ``"_theta"`` after the block's name.
    """
    parts: dict[int, dict[str, int]] = {}
    for block, shape in layout.trainable.items():
        group = int(block.partition(".")[0])
        if layout.specs[group].factor_map is not None:
            parts.setdefault(layout.first_group(group), {})[block] = math.prod(shape)
    found: dict[str, Inner] = {}
    for first, sizes in parts.items():
        own = layout.specs[first]
        assert own.factor_map is not None and own.factor_size is not None
        if own.factor_scope == "all":
            name, start, total = f"{first}.0.theta", 0, sum(sizes.values())
            fixed = own.factor_map.bind(Place(first, (), False))
            _check(fixed, own.factor_size, total, name)
            for block, size in sizes.items():
                found[block] = Inner(name, fixed, own.factor_size, total, start, start + size)
                start += size
            continue
        for index, (block, size) in enumerate(sizes.items()):
            fixed = own.factor_map.bind(Place(index, (), False))
            _check(fixed, own.factor_size, size, block)
            found[block] = Inner(f"{block}_theta", fixed, own.factor_size, size, 0, size)
    return found


def _check(fixed: Map, before: int, size: int, name: str) -> None:
    try:
        fixed.check(before, size)
    except ValueError as error:
        raise ValueError(f"factor_map must serve {name!r}, {before} to {size}: {error}") from None
