"""The equation on arrays: blocks to the update of a group, of a weight, and to products with it."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from superlora._backend import Array, backend_of, eye
from superlora.algebra.contract import run
from superlora.algebra.folding import ravel
from superlora.algebra.kronecker import kronecker
from superlora.design.cost_rule import application, row_pair
from superlora.design.layout import Layout
from superlora.design.network import (
    Network,
    Opened,
    Operand,
    Source,
    Term,
    group_network,
    network_of,
)
from superlora.maps import Map

# Gives the vector that a group's map makes, or some of its entries.
Vector = Callable[[int, int, int], Array]


def with_blocks(
    layout: Layout, factors: Mapping[str, Array], blocks: Iterable[str]
) -> Mapping[str, Array]:
    """Add the blocks that F_in makes from the vectors among the factors."""
    inner = layout.inner
    missing = [block for block in blocks if block in inner and block not in factors]
    if not missing:
        return factors
    found = dict(factors)
    whole: dict[str, Array] = {}
    for block in missing:
        item = inner[block]
        theta = factors[item.name]
        if item.map.sliced:
            part = item.map.apply_slice(theta, item.size, item.start, item.stop)
        else:
            if item.name not in whole:
                whole[item.name] = item.map.apply(theta, item.size)
            part = whole[item.name][item.start : item.stop]
        found[block] = backend_of(part).reshape(part, layout.block_shapes[block])
    return found


def source_arrays(
    layout: Layout, factors: Mapping[str, Array], sources: Sequence[Source]
) -> list[Array]:
    """Return what the operands of a network are slices of."""
    blocks = with_blocks(layout, factors, [source.block for source in sources])
    return [source_array(layout, source, blocks[source.block]) for source in sources]


def source_array(layout: Layout, source: Source, block: Array) -> Array:
    """Return the leading slices of a block, its modes mapped."""
    if tuple(block.shape) != source.shape:
        block = block[tuple(map(slice, source.shape))]
    for axis, index, size in source.modes:
        block = layout.maps[source.group].map_mode(block, axis, index, size)
    return block


def take(library: Any, array: Array, operand: Operand) -> Array:
    """Return the slice of a source that an operand is."""
    if operand.digits is not None:
        array = library.reshape(array, operand.digits)
    if operand.cut is not None:
        array = array[operand.cut]
    return array if operand.shape is None else library.reshape(array, operand.shape)


def run_term(
    term: Term, arrays: Sequence[Array] | Mapping[int, Array], first: Sequence[Array] = ()
) -> Array:
    """Contract a term's operands, after those that are given."""
    library = backend_of(first[0] if first else arrays[term.operands[0].source])
    values = list(first)
    for own in term.operands:
        values.append(take(library, arrays[own.source], own))
    return run(term.contraction, values, library)


def form(network: Network, arrays: Sequence[Array], vector: Vector | None = None) -> Array:
    """Form what a network makes; `vector` is asked for what is cut from mapped vectors."""
    runs = []
    for part in network.runs:
        if part.vector >= 0:
            assert vector is not None
            runs.append(vector(part.vector, part.skip, part.skip + part.size))
            continue
        boxes = (total(run_term(term, arrays) for term in box) for box in part.boxes)
        runs.append(cut(joined([ravel(box) for box in boxes]), part.skip, part.size))
    found = joined(runs)
    return backend_of(found).reshape(found, network.shape)


def open_rows(opened: Opened, arrays: Sequence[Array] | Mapping[int, Array], index: int) -> Array:
    """Return the opened rows of one term, (rows, *ranks)."""
    parts = []
    for box in opened.boxes:
        part = run_term(box[index], arrays)
        parts.append(backend_of(part).reshape(part, (-1, *opened.ranks[index])))
    return cut(joined(parts), opened.skip, opened.rows)


def cut(array: Array, skip: int, size: int) -> Array:
    """Return a range of the first axis; all of it is no slice, which costs a backward pass."""
    return array if array.shape[0] == size else array[skip : skip + size]


def joined(parts: Sequence[Array], axis: int = 0) -> Array:
    """Concatenate arrays; one alone is returned as it is."""
    return parts[0] if len(parts) == 1 else backend_of(*parts).concatenate(list(parts), axis=axis)


def total(terms: Iterable[Array]) -> Array:
    """Return the sum of arrays."""
    return functools.reduce(operator.add, terms)


def scaled(x: Array, scale: Any) -> Array:
    """Return ``scale * x``, and `x` itself where the scale is 1."""
    return x if isinstance(scale, (int, float)) and scale == 1 else x * scale


def group_tensor(layout: Layout, factors: Mapping[str, Array], group: int) -> Array:
    """Return a group's folded tensor before its map: the products of its splits, summed."""
    network = group_network(layout, group)
    return form(network, source_arrays(layout, factors, network.sources))


def joint_entries(layout: Layout, factors: Mapping[str, Array], first: int) -> Array:
    """Return the vector that a map makes of several groups, and of which weights are cut."""
    groups = layout.joint(first)
    tensors = [ravel(group_tensor(layout, factors, group)) for group in groups]
    if len(groups) == 1:
        return tensors[0]
    return joined([t[: layout.groups[g].size] for g, t in zip(groups, tensors, strict=True)])


def map_slice(fixed: Map, x: Array, size: int, start: int, stop: int) -> Array:
    """Return some entries of a mapped vector, if the map keeps to what it has to be."""
    y = fixed.apply_slice(x, size, start, stop)
    backend_of(x, y)
    if tuple(y.shape) != (stop - start,) or y.dtype != x.dtype:
        raise ValueError(
            f"map={type(fixed).__name__}() must return {stop - start} entries of {x.dtype}: got "
            f"shape {tuple(y.shape)} of {y.dtype}"
        )
    return y


def vectors(layout: Layout, factors: Mapping[str, Array], *, whole: bool) -> Vector:
    """Return what makes the vectors of maps: of each its input is kept, or the `whole` of it."""
    made: dict[int, Array] = {}

    def vector(first: int, start: int, stop: int) -> Array:
        fixed, size = layout.maps[first], layout.joint_sizes(first)[1]
        if first not in made:
            entries = joint_entries(layout, factors, first)
            made[first] = fixed.apply(entries, size) if whole else entries
        own = made[first]
        return own[start:stop] if whole else map_slice(fixed, own, size, start, stop)

    return vector


def weight_delta(
    layout: Layout,
    factors: Mapping[str, Array],
    name: str,
    scale: float,
    vector: Vector | None = None,
) -> Array:
    """Form one weight's update, from the slices of the blocks that it needs."""
    network = network_of(layout, name)
    arrays = source_arrays(layout, factors, network.sources)
    found = form(network, arrays, vector or vectors(layout, factors, whole=False))
    return found * float(scale)


def weight_deltas(
    layout: Layout, factors: Mapping[str, Array], scales: Mapping[str, float]
) -> dict[str, Array]:
    """Form the updates of all weights; a map that mixes a group's entries is applied once."""
    blocks = with_blocks(layout, factors, layout.block_shapes)
    vector = vectors(layout, blocks, whole=True)
    return {
        name: weight_delta(layout, blocks, name, scales[name], vector) for name in layout.shapes
    }


def apply_factored(
    layout: Layout, factors: Mapping[str, Array], name: str, x: Array, scale: float
) -> Array:
    """Multiply by one weight's update without forming it."""
    factored = application(layout, name).factored
    assert factored is not None
    rows, columns = layout.shapes[name]
    library = backend_of(x)
    flat = library.reshape(x, (-1, columns))
    if layout.multiplies(name):
        group = layout.grouping.pieces[name][0].group
        entries = joint_entries(layout, factors, group)
        y = layout.maps[group].multiply(entries, flat)
    else:
        arrays = source_arrays(layout, factors, factored.sources)
        opened = factored.opened
        leading = [] if opened is None else source_arrays(layout, factors, opened.sources)
        inputs = library.reshape(flat, (-1, *factored.inputs))
        products = []
        for index, term in enumerate(factored.terms(flat.shape[0])):
            first = [inputs]
            if opened is not None:
                own = open_rows(opened, leading, index)
                first.append(library.reshape(own, (*factored.lead, *own.shape[1:])))
            products.append(run_term(term, arrays, first))
        y = total(products)
    return library.reshape(y, (*x.shape[:-1], rows)) * float(scale)


def low_rank_factors(
    layout: Layout, factors: Mapping[str, Array], name: str, scale: float
) -> tuple[Array, Array] | None:
    """Write one weight's update as a product of two matrices, where its fold is aligned."""
    found = row_pair(layout, name)
    if found is None:
        return None
    opened, blocks = found
    height = layout.shapes[name][0]
    ends = source_arrays(layout, factors, opened.ends)
    leading = source_arrays(layout, factors, opened.sources)
    lefts, rights = [], []
    for index, (ranks, completed) in enumerate(zip(opened.ranks, opened.completed, strict=True)):
        rows = open_rows(opened, leading, index)
        library = backend_of(rows)
        count = math.prod(ranks)
        lefts.append(library.reshape(rows, (height, blocks * count)))
        # Where the last factors meet unit rows they make a matrix, (ranks, last mode).
        unit = library.reshape(eye(count, like=rows), (count, *ranks))
        last = library.reshape(run_term(completed, ends, [unit]), (count, -1))
        right = library.transpose(last)
        rights.append(kronecker([eye(blocks, like=right), right]) if blocks > 1 else right)
    return joined(lefts, 1) * float(scale), joined(rights, 1) * 1.0
