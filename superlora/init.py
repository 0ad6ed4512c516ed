"""Initial factors: exactly one zero block a group, the others random."""

from __future__ import annotations

import math
from typing import Any

import numpy

from superlora._backend import Array, from_numpy
from superlora.layout import Layout
from superlora.random import normal
from superlora.splitting import Group


def zero_block(layout: Layout, group: int) -> str:
    """Return the name of the block that starts at zero.

    Parameters
    ----------
    layout : Layout
        What lies where.
    group : int
        Index of the group.

    Returns
    -------
    str
        The last split's core where that is trainable, else its first factor,
        which is LoRA's B.

    Notes
    -----
    The update is multilinear in the blocks. With one zero block it is zero and
    that block has a gradient; with two every gradient is zero for ever.
    """
    last = len(layout.groups[group].splits) - 1
    core = layout.groups[group].splits[last].trainable_core
    return f"{group}.{last}.{'core' if core else 'factor0'}"


def init_factors(layout: Layout, seed: int = 0, like: Any = numpy.float32) -> dict[str, Array]:
    """Draw initial factors for which every update is exactly zero.

    Parameters
    ----------
    layout : Layout
        What lies where.
    seed : int
        In [0, 2**64); block i of ``layout.factor_shapes`` takes the seed's stream i.
    like : array or dtype
        Library, dtype and device of the result.

    Returns
    -------
    dict of str to array
        One array for each of ``layout.factor_shapes``.

    Raises
    ------
    TypeError, ValueError
        If `seed` is no integer of that range, or `like` is not of a
        floating-point type.

    Notes
    -----
    The standard deviations of a group's random blocks are equal and multiply to
    ``(d t / r) ** -0.5``: d is the mean input width of the group's weights, t the
    number of products that sum to one entry of the Kronecker product, r the
    largest rank of a factored mode. A step of the zero block then moves an entry
    of ΔW as it does in LoRA of that rank, at any order and any number of splits,
    so that learning rates carry over.
    """
    from_numpy(numpy.zeros(()), like)  # refuses a wrong dtype before anything is drawn
    deviations = {}
    for group, item in enumerate(layout.groups):
        names = [
            f"{group}.{index}.{block}"
            for index, split in enumerate(item.splits)
            for block in split.block_shapes
        ]
        members = layout.grouping.members[group]
        width = sum(layout.shapes[name][1] for name in members) / len(members)
        variance = 1 / (width * _excess_terms(item))
        deviations.update(dict.fromkeys(names, variance ** (0.5 / max(1, len(names) - 1))))
        deviations[zero_block(layout, group)] = 0.0
    factors = {}
    for stream, (name, shape) in enumerate(layout.factor_shapes.items()):
        deviation = deviations[name]
        values = normal(seed, stream, shape) * deviation if deviation else numpy.zeros(shape)
        factors[name] = from_numpy(values, like)
    return factors


def _excess_terms(group: Group) -> float:
    """Return t / r: the products summed in an entry, over those that LoRA would sum."""
    terms = largest = 1
    for split in group.splits:
        ranks = [
            rank for rank, factored in zip(split.ranks, split.factored, strict=True) if factored
        ]
        if ranks:
            terms *= math.prod(ranks) if split.trainable_core else ranks[0]
            largest = max(largest, *ranks)
    return terms / largest
