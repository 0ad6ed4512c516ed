"""Every fixed map as an explicit matrix, from the drawn numbers and textbook definitions."""

from __future__ import annotations

import functools
import itertools

import numpy
import scipy.linalg

from superlora.random import bits, coarse_normals, signs

# The format of a seed: which of its streams hold what, for the map numbered `part`.
SIGNS, NORMALS, ORDERS, ROWS, LENGTHS = 1, 2, 3, 4, 9


def stream(kind: int, part: int) -> int:
    return (kind << 56) + (part << 32)


def order_of(seed: int, where: int, start: int, stop: int) -> numpy.ndarray:
    """Return the order in which random words stand by size."""
    return numpy.argsort(bits(seed, where, start, stop))


def taking(positions: numpy.ndarray, before: int) -> numpy.ndarray:
    """Return the matrix of ``y_i = x[positions[i]]``."""
    matrix = numpy.zeros((len(positions), before))
    matrix[numpy.arange(len(positions)), positions] = 1
    return matrix


def width_of(before: int, size: int, blocks: str) -> int:
    wanted = before if blocks == "stacked" else max(before, size)
    return next(2**power for power in itertools.count() if 2**power >= wanted)


@functools.lru_cache(maxsize=512)
def fastfood(
    before: int,
    size: int,
    seed: int,
    part: int = 0,
    order: str = "paper",
    blocks: str = "single",
    values: str = "normal",
    normalize: str | None = "isometric",
) -> numpy.ndarray:
    """Return ``B H Π G H`` or ``H G Πᵀ H B``, one below the other, cropped."""
    width = width_of(before, size, blocks)
    transform = scipy.linalg.hadamard(width).astype(float)
    draw = coarse_normals if values == "normal" else signs
    found = []
    for start in range(0, size, width):
        stop = start + width
        numbers = numpy.diag(draw(seed, stream(NORMALS, part), start, stop).astype(float))
        outer = numpy.diag(signs(seed, stream(SIGNS, part), start, stop).astype(float))
        shuffled = taking(order_of(seed, stream(ROWS, part), start, stop), width)
        if order == "paper":
            found.append(outer @ transform @ shuffled @ numbers @ transform)
        else:
            found.append(transform @ numbers @ shuffled.T @ transform @ outer)
    matrix = numpy.concatenate(found)[:size, :before]
    if normalize is None:
        return matrix
    return matrix / numpy.sqrt(width * (size if normalize == "isometric" else before))


@functools.lru_cache(maxsize=512)
def one_hot(
    before: int,
    size: int,
    seed: int,
    part: int = 0,
    tiled: bool = True,
    signed: bool = True,
    normalize: str | None = "isometric",
) -> numpy.ndarray:
    if tiled:
        tiles = [
            order_of(seed, stream(ROWS, part), start, start + before)
            for start in range(0, size, before)
        ]
        positions = numpy.concatenate(tiles)[:size]
    else:
        positions = order_of(seed, stream(ORDERS, part), 0, size) % before
    matrix = taking(positions, before)
    if normalize == "isometric":
        matrix /= numpy.sqrt(matrix.sum(axis=0))
    if signed:
        matrix *= signs(seed, stream(SIGNS, part), 0, size)[:, None]
    return matrix


@functools.lru_cache(maxsize=512)
def shuffle(before: int, size: int, seed: int, part: int = 0) -> numpy.ndarray:
    return taking(order_of(seed, stream(ORDERS, part), 0, size), before)


@functools.lru_cache(maxsize=512)
def gaussian(
    before: int,
    size: int,
    seed: int,
    part: int = 0,
    structured: bool = False,
    normalize: str | None = "isometric",
) -> numpy.ndarray:
    scale = {"isometric": size, "variance": before, None: 1}[normalize] ** -0.5
    if not structured:
        drawn = coarse_normals(seed, stream(NORMALS, part), 0, before * size)
        return scale * drawn.reshape(size, before).astype(float)
    width = width_of(before, size, "stacked")
    whole = fastfood(width, size, seed, part, "le", "stacked", "normal", None)
    drawn = coarse_normals(seed, stream(LENGTHS, part), 0, size).astype(float)
    lengths = numpy.abs(numpy.sqrt(width - 0.5) + drawn / numpy.sqrt(2))
    rows = whole / numpy.linalg.norm(whole, axis=1, keepdims=True)
    return scale * (lengths[:, None] * rows)[:, :before]


@functools.lru_cache(maxsize=512)
def fourier(
    before: int, shape: tuple[int, int], seed: int, part: int = 0, normalize: str | None = None
) -> numpy.ndarray:
    rows, columns = shape
    size = rows * columns
    a, b = numpy.divmod(numpy.arange(size), columns)
    chosen = order_of(seed, stream(ORDERS, part), 0, size)[:before]
    u, v = numpy.divmod(chosen, columns)
    angles = 2 * numpy.pi * (numpy.outer(a, u) / rows + numpy.outer(b, v) / columns)
    return numpy.cos(angles) / size * (numpy.sqrt(2 * size) if normalize else 1.0)


def broadcast(rows: int, columns: int, along: str) -> numpy.ndarray:
    return {
        "all": numpy.ones((rows * columns, 1)),
        "inputs": numpy.kron(numpy.eye(rows), numpy.ones((columns, 1))),
        "outputs": numpy.kron(numpy.ones((rows, 1)), numpy.eye(columns)),
    }[along]
