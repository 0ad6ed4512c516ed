"""Which blocks a layout's groups can freeze and share. Integers only."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from superlora.splitting import check_memory

if TYPE_CHECKING:
    from superlora.layout import Layout


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
