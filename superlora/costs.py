"""What applying a weight's update costs. Integers only."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from superlora.splitting import Split

if TYPE_CHECKING:
    from superlora.layout import Layout


def factored_cost(layout: Layout, name: str) -> float:
    """Count the multiplications of one token by a weight's factors, which form no update.

    Parameters
    ----------
    layout : Layout
        What lies where.
    name : str
        The weight.

    Returns
    -------
    float
        Infinity where its fold is not aligned.
    """
    if layout.row_slice(name) is None:
        return math.inf
    rows, columns = layout.shapes[name]
    group = layout.grouping.pieces[name][0].group
    blocks = columns // layout.groups[group].fold[-1]
    cost = rows * layout.inner_width(name)
    for splits in layout.terms(group):
        cost += blocks * _last_mode_cost(layout.specs[group].combine, splits)
    return cost


def _last_mode_cost(combine: str, splits: tuple[Split, ...]) -> int:
    """Count the multiplications of one block of inputs by the last factors."""
    lasts = [split.last for split in splits]
    if combine == "hadamard":
        return lasts[0][0] * math.prod(rank for _, rank, _ in lasts)
    widths = [size for size, _, _ in lasts]
    cost = 0
    for index, (_, rank, factored) in enumerate(lasts):
        if factored:
            cost += math.prod(widths) * rank
        widths[index] = rank
    return cost
