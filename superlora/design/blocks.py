"""What blocks groups have: frozen, tied, and cut from vectors that F_in maps. Integers only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from superlora.design.splits import check_memory, check_serves
from superlora.maps import Map, Place

if TYPE_CHECKING:
    from superlora.design.layout import Layout


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


def check_frozen(layout: Layout) -> None:
    """Refuse frozen and tied blocks that the groups have not, or that leave nothing to train.

    Parameters
    ----------
    layout : Layout
        What lies where.

    Raises
    ------
    ValueError
        If it is so, or the frozen blocks would take far more memory than the weights.
    """
    for group, own in enumerate(layout.specs):
        if not own.frozen and not own.tied:
            continue
        for kind, blocks in (("frozen", [key for key, _ in own.frozen]), ("tied", own.tied)):
            for block in blocks:
                _check_present(layout, group, kind, block)
        for block, source in own.frozen:
            if source.startswith("singular"):
                _check_singular(layout, group, block)
        for term in layout.term_blocks(group):
            if not any(block in layout.trainable for block in term):
                raise ValueError(
                    f"frozen must leave every product a trainable block: group {group} has none"
                )
    entries = sum(math.prod(layout.block_shapes[block]) for block in layout.frozen)
    check_memory("frozen blocks must hold", entries, layout.num_dense)


def unit_modes_of(layout: Layout) -> str:
    """Return what to say of splits that have size 1 in a mode of size above 1, if any.

    Parameters
    ----------
    layout : Layout
        What lies where.

    Returns
    -------
    str
        Empty where there is nothing to say.
    """
    bare = sorted(
        {
            (index, mode)
            for group, own in zip(layout.groups, layout.specs, strict=True)
            if not own.has_sizes  # else as asked for
            for index, split in enumerate(group.splits)
            for mode, size in enumerate(split.shape)
            if size == 1 < group.fold[mode]
        }
    )
    if not bare:
        return ""
    places = ", ".join(f"split {index} in mode {mode}" for index, mode in bare)
    return f"no Kronecker structure where a split has size 1: {places}"


def _check_present(layout: Layout, group: int, kind: str, block: str) -> None:
    index, _, leaf = block.partition(".")
    shapes = layout.groups[group].splits[int(index)].block_shapes
    first = layout.groups[layout.first_group(group)].splits[int(index)].block_shapes
    if len(shapes.get(leaf, ())) != len(first.get(leaf, (0,))):
        raise ValueError(
            f"{kind} must name blocks that every group has: group {group} has no {block!r}, its "
            f"split {index} has {list(shapes)}"
        )


def _check_singular(layout: Layout, group: int, block: str) -> None:
    index, _, leaf = block.partition(".")
    rank = layout.groups[group].splits[int(index)].block_shapes[leaf][1]
    (name,) = layout.grouping.members[group]
    matrices, _ = layout.grouping.matrices(group, layout.axes)
    if len(matrices) > 1:
        raise ValueError(
            f"frozen[{block!r}] must have one matrix a group to hold its singular vectors: "
            f"{name!r} has {len(matrices)}; use fold='natural'"
        )
    if rank > min(matrices[0]):
        raise ValueError(
            f"rank must be at most {min(matrices[0])}, the singular vectors of {name!r}: "
            f"got {rank} for the frozen block {block!r}"
        )
