"""The equation itself: factors to the update of a group and of a weight."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence

from superlora._backend import Array, backend_of
from superlora.folding import ravel
from superlora.grouping import cut_pieces
from superlora.kronecker import hadamard, kronecker
from superlora.layout import Layout
from superlora.maps import Map
from superlora.slicing import Box
from superlora.terms import Blocks, cut_blocks, joined, scaled, terms_of, with_blocks
from superlora.tucker import tucker
from superlora.uses import joint_sizes


def group_tensor(layout: Layout, factors: Mapping[str, Array], group: int) -> Array:
    """Reconstruct a group's folded tensor: the products of its splits, summed.

    Parameters
    ----------
    layout : Layout
        What lies where.
    factors : mapping of str to array
        The blocks by name, frozen ones too; those of other groups are not read.
    group : int
        Index of the group.

    Returns
    -------
    array, (D_1, …, D_M)
        Before map and scale.
    """
    product = _product_of(layout, group)
    return _total(
        product([tucker(core, planes) for core, planes in term])
        for term in terms_of(layout, factors, group)
    )


def weight_delta(
    layout: Layout,
    factors: Mapping[str, Array],
    name: str,
    scale: float,
    rows: tuple[int, int] | None = None,
) -> Array:
    """Form one weight's update, from the rows of the factors that it needs.

    Parameters
    ----------
    layout : Layout
        What lies where.
    factors : mapping of str to array
        The blocks by name, frozen ones too; only those of the weight's groups are read.
    name : str
        The weight.
    scale : float
        The number s in front of the equation.
    rows : tuple of (int, int), optional
        The first row that is formed, and the one after the last; all by default.

    Returns
    -------
    array, (output width or fewer, input width)
        Only a map that mixes all entries makes the whole group be formed.
    """
    factors = with_blocks(layout, factors, layout.blocks_of(name))
    height, width = layout.shapes[name]
    first, last = rows or (0, height)
    runs = []
    blocks: dict[int, list[list[Blocks]]] = {}
    for piece in cut_pieces(layout.grouping.pieces[name], first * width, last * width):
        group = piece.group
        if layout.identity(group):
            if group not in blocks:
                blocks[group] = terms_of(layout, factors, group)
            part = layout.piece_slice(piece)
            parts = [ravel(_box_tensor(layout, blocks[group], group, box)) for box in part.boxes]
            run = joined(parts)
            whole = run.shape[0] == part.size  # a slice of all is a pass more on the way back
            runs.append(run if whole else run[part.skip : part.skip + part.size])
        else:
            x, size = joint_entries(layout, factors, group)
            runs.append(map_slice(layout.maps[group], x, size, *layout.position(piece)))
    return scaled(backend_of(runs[0]).reshape(joined(runs), (last - first, width)), scale)


def weight_deltas(
    layout: Layout, factors: Mapping[str, Array], scales: Mapping[str, float]
) -> dict[str, Array]:
    """Form the updates of all weights.

    Parameters
    ----------
    layout : Layout
        What lies where.
    factors : mapping of str to array
        All blocks by name, frozen ones too.
    scales : mapping of str to float
        The number s in front of each.

    Returns
    -------
    dict of str to array
        (output width, input width) each. A map that mixes a group's entries is applied once.
    """
    factors = with_blocks(layout, factors, layout.block_shapes)
    vectors: dict[int, Array] = {}  # by the first of the groups that a map takes together
    for group in range(len(layout.groups)):
        if not layout.identity(group) and group == layout.joint(group)[0]:
            x, size = joint_entries(layout, factors, group)
            vectors[group] = layout.maps[group].apply(x, size)
    deltas = {}
    for name, pieces in layout.grouping.pieces.items():
        if layout.identity(pieces[0].group):
            deltas[name] = weight_delta(layout, factors, name, scales[name])
            continue
        runs = [
            vectors[layout.joint(piece.group)[0]][slice(*layout.position(piece))]
            for piece in pieces
        ]
        delta = backend_of(*runs).reshape(joined(runs), layout.shapes[name])
        deltas[name] = scaled(delta, scales[name])
    return deltas


def map_slice(fixed: Map, x: Array, size: int, start: int, stop: int) -> Array:
    """Return some entries of a mapped vector, if the map keeps to what it has to be.

    Parameters
    ----------
    fixed : Map
        Maybe of the user's own.
    x : array, (before,)
        The entries before it.
    size : int
        Entries after it.
    start, stop : int
        Which of them.

    Returns
    -------
    array, (stop - start,)
        Library and dtype of `x`.

    Raises
    ------
    TypeError
        If the map returns an array of another library.
    ValueError
        If it returns another shape or dtype.
    """
    y = fixed.apply_slice(x, size, start, stop)
    backend_of(x, y)
    if tuple(y.shape) != (stop - start,) or y.dtype != x.dtype:
        raise ValueError(
            f"map={type(fixed).__name__}() must return {stop - start} entries of {x.dtype}: got "
            f"shape {tuple(y.shape)} of {y.dtype}"
        )
    return y


def joint_entries(layout: Layout, factors: Mapping[str, Array], group: int) -> tuple[Array, int]:
    """Return what a group's map takes, and how many entries it makes of it.

    Parameters
    ----------
    layout : Layout
        What lies where.
    factors : mapping of str to array
        The blocks by name, frozen ones too.
    group : int
        Index of the group.

    Returns
    -------
    array, (before,)
        The entries of the group, or of all groups that its map takes together.
    int
        The entries after the map.
    """
    joint = layout.joint(group)
    _, size = joint_sizes(layout, group)
    if len(joint) == 1:
        return ravel(group_tensor(layout, factors, group)), size
    tensors = (group_tensor(layout, factors, index) for index in joint)
    cropped = [
        ravel(tensor)[: layout.groups[index].size]
        for index, tensor in zip(joint, tensors, strict=True)
    ]
    return joined(cropped), size


def _product_of(layout: Layout, group: int) -> Callable[[Sequence[Array]], Array]:
    return kronecker if layout.specs[group].combine == "kronecker" else hadamard


def _total(terms: Iterable[Array]) -> Array:
    return functools.reduce(operator.add, terms)


def _box_tensor(layout: Layout, blocks: Sequence[Sequence[Blocks]], group: int, box: Box) -> Array:
    product = _product_of(layout, group)
    return _total(
        product([tucker(*cut) for cut in cut_blocks(layout, term, group, box)]) for term in blocks
    )
