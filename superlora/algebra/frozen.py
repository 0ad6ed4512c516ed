"""Frozen blocks: drawn from a seed, ones, or singular vectors of the weight they adapt."""

from __future__ import annotations

import functools
import math
from collections.abc import Container, Iterator, Mapping
from typing import Any

import numpy

from superlora._backend import Array, backend_of, from_numpy, widened
from superlora.algebra.init import frozen_variance
from superlora.design.layout import Layout
from superlora.design.splits import is_last
from superlora.random import normal

# Apart from the streams of the initial factors, which count from 0.
_FIRST_STREAM = 1 << 63
_CHUNK = 1 << 13  # entries; from 10,000 on BLAS wakes threads for each dot product
# The exponent of the singular values that each source multiplies to its vectors.
_POWERS = {"singular": 0.0, "singular_root": 0.5, "singular_scaled": 1.0}


def frozen_blocks(
    layout: Layout,
    weights: Mapping[str, Array] | None = None,
    like: Any = numpy.float32,
) -> dict[str, Array]:
    """Make the blocks that are not trained."""
    return {name: from_numpy(values, like) for name, values in each_frozen(layout, weights)}


def each_frozen(
    layout: Layout,
    weights: Mapping[str, Array] | None = None,
    *,
    singular: bool = True,
    skipped: Container[str] = (),
) -> Iterator[tuple[str, numpy.ndarray]]:
    """Make what `frozen_blocks` returns, one block at a time."""
    decompose = functools.cache(lambda group: _decompose(layout, group, weights or {}))
    # What is stored has no stream, so that a design with fixed terms draws what it does without.
    made = [(name, source) for name, source in layout.frozen.items() if source != "stored"]
    for stream, (name, source) in enumerate(made):
        shape = layout.block_shapes[name]
        group, index, leaf = name.split(".")
        split = layout.groups[int(group)].splits[int(index)]
        last = is_last(split, leaf)
        if name in skipped or (source in _POWERS and not singular):
            continue
        if source == "ones":
            values = numpy.ones(shape)
        elif source == "random":
            seed = layout.specs[int(group)].seed
            deviation = frozen_variance(source, shape, last) ** 0.5
            values = normal(seed, _FIRST_STREAM + stream, shape) * deviation
        else:
            left, numbers, right = decompose(int(group))
            vectors = (right if last else left)[:, : shape[1]]
            values = vectors * numbers[: shape[1]] ** _POWERS[source]
        yield name, values


def fingerprint(block: numpy.ndarray) -> float:
    """Return a number that tells whether a frozen block was made anew as it was."""
    entries = block.reshape(-1)
    total = squares = 0.0
    for start in range(0, entries.size, _CHUNK):
        part = entries[start : start + _CHUNK].astype(numpy.float64)
        total += float(part @ numpy.cos(1.0 + start + numpy.arange(part.size)))
        squares += float(part @ part)
    return round(total / (math.sqrt(squares) or 1.0), 6)


def _decompose(
    layout: Layout, group: int, weights: Mapping[str, Array]
) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    ((held, start, piece),) = layout.grouping.contents[group]
    name, shape, (_, width) = layout.layer_of[held], layout.axes[held].shape, layout.shapes[held]
    if name not in weights:
        raise ValueError(
            f"weights must hold {name!r}, whose singular vectors the spec asks for: it is missing"
        )
    weight = weights[name]
    if tuple(weight.shape) != shape:
        raise ValueError(f"weights[{name!r}] must have shape {shape}: got {tuple(weight.shape)}")
    weight = widened(weight)
    library = backend_of(weight)
    if not layout.axes[held].plain:  # of a stack only the group's own rows
        rows = slice(start // width, (start + piece.stop - piece.start) // width)
        weight = library.reshape(weight, layout.shapes[held])[rows]
    if not numpy.isfinite(library.to_numpy(weight)).all():
        raise ValueError(f"weights[{name!r}] must be finite to have singular vectors")
    left, numbers, right = map(
        numpy.asarray, map(library.to_numpy, library.svd(weight, full_matrices=False))
    )
    columns = numpy.arange(left.shape[1])
    signs = numpy.sign(left[numpy.abs(left).argmax(axis=0), columns])
    return left * signs, numbers, right.T * signs
