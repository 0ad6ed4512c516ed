"""Initial factors: exactly one zero block a group, the others random."""

from __future__ import annotations

from typing import Any

import numpy

from superlora._backend import Array, from_numpy
from superlora.layout import Layout
from superlora.random import normal


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
    The random blocks' standard deviations multiply to ``d ** -0.5``, with d the
    mean input width of the group's weights: a step of the zero block then moves
    an entry of ΔW as much as in LoRA, at any order and any number of splits, so
    that one learning rate serves all of them.
    """
    from_numpy(numpy.zeros(()), like)  # refuses a wrong dtype before anything is drawn
    deviations = {}
    zeros = set()
    for group, item in enumerate(layout.groups):
        names = [
            f"{group}.{index}.{block}"
            for index, split in enumerate(item.splits)
            for block in split.block_shapes
        ]
        zeros.add(zero_block(layout, group))
        members = layout.grouping.members[group]
        width = sum(layout.shapes[name][1] for name in members) / len(members)
        deviation = width ** (-0.5 / (len(names) - 1)) if len(names) > 1 else 0.0
        deviations.update(dict.fromkeys(names, deviation))
    factors = {}
    for stream, (name, shape) in enumerate(layout.factor_shapes.items()):
        if name in zeros:
            factors[name] = from_numpy(numpy.zeros(shape), like)
        else:
            factors[name] = from_numpy(normal(seed, stream, shape) * deviations[name], like)
    return factors
