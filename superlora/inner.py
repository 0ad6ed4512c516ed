"""The vectors that F_in maps to blocks. Integers only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from superlora.maps import Map, Place
from superlora.splitting import check_memory, check_serves

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
    entries = sum(total for sizes in parts.values() for total in sizes.values())
    check_memory("factor_map must make blocks of", entries, layout.num_dense)
    # Of all blocks, so that those of other overrides have other streams too.
    numbers = {block: index for index, block in enumerate(layout.trainable)}
    found: dict[str, Inner] = {}
    for first, sizes in parts.items():
        own = layout.specs[first]
        assert own.factor_map is not None
        assert own.factor_size is not None
        if own.factor_scope == "all":
            name, start, total = f"{first}.0.theta", 0, sum(sizes.values())
            fixed = own.factor_map.bind(Place(first, (), False))
            check_serves(fixed, own.factor_size, total, f"factor_map for {name!r}")
            for block, size in sizes.items():
                found[block] = Inner(name, fixed, own.factor_size, total, start, start + size)
                start += size
            continue
        for block, size in sizes.items():
            fixed = own.factor_map.bind(Place(numbers[block], (), False))
            check_serves(fixed, own.factor_size, size, f"factor_map for {block!r}")
            found[block] = Inner(f"{block}_theta", fixed, own.factor_size, size, 0, size)
    return found
