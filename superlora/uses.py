"""Every different map of a layout, and the sizes that it is used for. Integers only."""

from __future__ import annotations

from superlora.layout import Layout
from superlora.maps import Map, Separable


def joint_sizes(layout: Layout, group: int) -> tuple[int, int]:
    """Return how many entries a group's map takes and makes, of all groups that it takes together.

    Parameters
    ----------
    layout : Layout
        What lies where.
    group : int
        Index of the group.

    Returns
    -------
    int
        Entries before the map.
    int
        Entries after it.
    """
    joint = layout.joint(group)
    size = sum(layout.groups[index].size for index in joint)
    return (layout.groups[group].before if len(joint) == 1 else size), size


def map_uses(layout: Layout) -> dict[tuple[Map, int, int], str]:
    """Return the maps of a layout with their numbers of entries before and after.

    Parameters
    ----------
    layout : Layout
        What lies where.

    Returns
    -------
    dict of (Map, int, int) to str
        The first group of each as a number, or the vector that it maps to blocks.
    """
    uses: dict[tuple[Map, int, int], str] = {}
    for group, fixed in enumerate(layout.maps):
        before, size = joint_sizes(layout, group)
        if isinstance(fixed, Separable):
            splits = layout.groups[group].splits[: layout.specs[group].splits]
            fixed = fixed.joined([(split.sizes, split.shape) for split in splits])
        uses.setdefault((fixed, before, size), str(group))
    for inner in layout.inner.values():
        uses.setdefault((inner.map, inner.before, inner.size), inner.name)
    return uses
