"""Every map at small sizes, and its matrix, built from its own draws without its code."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy
import pytest
import scipy.linalg
from scipy.linalg import block_diag, hadamard

from superlora import maps
from superlora.random import bits, coarse_normals, signs

# What a map draws: streams of its seed.
SIGNS, NORMALS, ORDERS, ROWS, LENGTHS = 1, 2, 3, 4, 9


def stream(fixed, kind):
    return kind << 56 | fixed.substream << 32


def order(fixed, kind, size, row=0):
    """Return a small permutation: the order of random words."""
    words = bits(fixed.seed, stream(fixed, kind), row * size, (row + 1) * size)
    return sorted(range(size), key=lambda position: int(words[position]))


def scale_of(fixed, before, size):
    return {None: 1.0, "isometric": size**-0.5, "variance": before**-0.5}[fixed.normalize]


def fastfood_block(fixed, width, block):
    """Return one unnormalised block, (width, width)."""
    run = (block * width, (block + 1) * width)
    draw = coarse_normals if fixed.values == "normal" else signs
    numbers = numpy.diag(draw(fixed.seed, stream(fixed, NORMALS), *run).astype(float))
    sides = numpy.diag(signs(fixed.seed, stream(fixed, SIGNS), *run).astype(float))
    moves = numpy.eye(width)[order(fixed, ROWS, width, block)]
    h = hadamard(width).astype(float)
    if fixed.order == "paper":
        return sides @ h @ moves @ numbers @ h
    return h @ numbers @ moves.T @ h @ sides


def fastfood(fixed, before, size):
    need = before if fixed.blocks == "stacked" else max(before, size)
    width = 2 ** math.ceil(math.log2(need))
    count = math.ceil(size / width)
    whole = numpy.vstack([fastfood_block(fixed, width, block) for block in range(count)])
    first = 1.0 if fixed.normalize is None else width**-0.5
    return whole[:size, :before] * first * scale_of(fixed, before, size)


def windowed(fixed, before, size):
    """Return the input of every output: all in order, in runs that are permuted in themselves."""
    whole, rest = divmod(size, before)
    placed = [j for j in range(before) for _ in range(whole + (j < rest))]
    run = min(fixed.window, before) * whole
    moves = [order(fixed, ROWS, run, k) for k in range(math.ceil(size / run))]
    return [placed[k * run + i] for k, move in enumerate(moves) for i in move if k * run + i < size]


def one_hot(fixed, before, size):
    matrix = numpy.zeros((size, before))
    for i in range(size):
        if fixed.window is not None:
            source = windowed(fixed, before, size)[i]
        elif fixed.tiled:
            source = order(fixed, ROWS, before, i // before)[i % before]
        else:
            source = order(fixed, ORDERS, size)[i] % before
        matrix[i, source] = 1.0
    if fixed.normalize == "isometric":
        matrix /= numpy.sqrt(matrix.sum(axis=0))
    if fixed.signed:
        matrix *= signs(fixed.seed, stream(fixed, SIGNS), 0, size)[:, None]
    return matrix


def gaussian(fixed, before, size):
    if not fixed.structured:
        drawn = coarse_normals(fixed.seed, stream(fixed, NORMALS), 0, before * size)
        return drawn.reshape(size, before).astype(float) * scale_of(fixed, before, size)
    width = 2 ** math.ceil(math.log2(before))
    blocks = maps.Fastfood(
        seed=fixed.seed, substream=fixed.substream, order="le", blocks="stacked", normalize=None
    )
    rows = fastfood(blocks, width, size)
    rows /= numpy.linalg.norm(rows, axis=1, keepdims=True)
    drawn = coarse_normals(fixed.seed, stream(fixed, LENGTHS), 0, size).astype(float)
    lengths = abs(math.sqrt(width - 0.5) + drawn / math.sqrt(2))
    return (rows * lengths[:, None])[:, :before] * scale_of(fixed, before, size)


def fourier(fixed, before, size):
    shape = fixed.shape or (1, size)
    chosen = fixed.frequencies or order(fixed, ORDERS, size)[:before]
    scale = math.sqrt(2 * size) if fixed.normalize else 1.0
    matrix = numpy.empty((size, before))
    for i, frequency in enumerate(chosen):
        u, v = divmod(frequency, shape[1])
        for a, b in itertools.product(*map(range, shape)):
            angle = 2 * math.pi * (a * u / shape[0] + b * v / shape[1])
            matrix[a * shape[1] + b, i] = scale / size * math.cos(angle)
    return matrix


def wavelet(fixed, before, size):
    """Return products of Haar's averages and differences; a half of rows is of those of columns."""
    rows, columns = fixed.shape
    sides = [haar(width + width % 2) for width in (rows, columns)]
    matrix = numpy.empty((size, before))
    for index, position in enumerate(fixed.positions or order(fixed, ORDERS, size)[:before]):
        row, column = divmod(position, columns)
        (low_row, high_row), (low_column, high_column) = (
            (side[at % half], side[at % half + half])
            for side, at, half in zip(
                sides, (row, column), (len(side) // 2 for side in sides), strict=True
            )
        )
        by_columns, by_rows = column >= len(sides[1]) // 2, row >= len(sides[0]) // 2
        patch = numpy.outer(
            high_row if by_columns else low_row, high_column if by_rows else low_column
        )
        matrix[:, index] = patch[:rows, :columns].ravel()
    return matrix


def haar(size):
    """Return the averages of neighbours and then their differences, orthonormal."""
    pairs = numpy.eye(size // 2)
    return numpy.vstack([numpy.kron(pairs, [1, 1]), numpy.kron(pairs, [1, -1])]) / math.sqrt(2)


def circulant(fixed, before, size):
    (rows, columns), width = fixed.shape, fixed.block
    kernels = numpy.arange(before).reshape(rows // width, columns // width, width)
    blocks = [
        [scipy.linalg.circulant(kernel).T for kernel in line]  # the first row is the kernel
        for line in kernels
    ]
    return numpy.eye(before)[numpy.block(blocks).ravel()] / columns


def broadcast(fixed, before, size):
    each = numpy.ones((size // before, 1))
    sides = (each, numpy.eye(before)) if fixed.along == "outputs" else (numpy.eye(before), each)
    return numpy.kron(*sides)


def shuffle(fixed, before, size):
    return numpy.eye(before)[order(fixed, ORDERS, size)]


def composed(fixed, before, size):
    middle = {"before": before, "after": size}.get(fixed.between, fixed.between)
    first, second = own(fixed.first, 2, 0), own(fixed.second, 2, 1)
    return matrix_of(second, middle, size) @ matrix_of(first, before, middle)


def own(fixed, count, index):
    """Return a part with streams of its own."""
    if isinstance(fixed, maps.Composed):
        first, second = own(fixed.first, count, index), own(fixed.second, count, index)
        return dataclasses.replace(fixed, first=first, second=second)
    if hasattr(fixed, "substream"):
        return dataclasses.replace(fixed, substream=fixed.substream * count + index)
    return fixed


def block_diagonal(fixed, before, size):
    count = len(fixed.parts)
    sides = [[len(run) for run in numpy.array_split(range(n), count)] for n in (before, size)]
    return block_diag(
        *(
            matrix_of(own(part, count, index), old, new)
            for index, (part, old, new) in enumerate(zip(fixed.parts, *sides, strict=True))
        )
    )


def separable(fixed, before, size):
    matrix = numpy.ones((1, 1))
    for mode, (old, new) in enumerate(zip(fixed.before, fixed.after, strict=True)):
        mapped = fixed.modes is None or mode in fixed.modes
        part = matrix_of(own(fixed.inner, 4096, mode), old, new) if mapped else numpy.eye(old)
        matrix = numpy.kron(matrix, part)
    return matrix[:size]


ORACLES = {
    maps.Identity: lambda fixed, before, size: numpy.eye(size, before),
    maps.Selection: lambda fixed, before, size: numpy.eye(before)[list(fixed.positions)],
    maps.Fastfood: fastfood,
    maps.OneHot: one_hot,
    maps.Gaussian: gaussian,
    maps.Fourier: fourier,
    maps.Broadcast: broadcast,
    maps.Circulant: circulant,
    maps.Wavelet: wavelet,
    maps.Shuffle: shuffle,
    maps.Composed: composed,
    maps.BlockDiagonal: block_diagonal,
    maps.Separable: separable,
}


def matrix_of(fixed, before, size):
    return ORACLES[type(fixed)](fixed, before, size)


FASTFOODS = [
    maps.Fastfood(seed=3, order=o, blocks=b, values=v, normalize=n, stored=n != "variance")
    for o, b, (v, n) in itertools.product(
        ("paper", "le"),
        ("single", "stacked"),
        (("normal", "isometric"), ("sign", "variance"), ("normal", None)),
    )
]
ONE_HOTS = [
    maps.OneHot(seed=3, tiled=tiled, signed=signed, normalize=n, stored=stored)
    for tiled, (signed, n, stored) in itertools.product(
        (True, False), ((True, "isometric", True), (False, "variance", False), (True, None, True))
    )
]
ONE_HOTS += [
    maps.OneHot(seed=3, window=2, tiled=False, normalize="variance"),
    maps.OneHot(seed=3, window=3, stored=False),
    maps.OneHot(seed=3, window=99, signed=False),
]
GAUSSIANS = [
    maps.Gaussian(seed=3),
    maps.Gaussian(seed=3, normalize="variance"),
    maps.Gaussian(seed=3, structured=True),
    maps.Gaussian(seed=3, structured=True, normalize=None, substream=2),
]
NESTED = maps.Composed(
    first=maps.BlockDiagonal(parts=(maps.OneHot(seed=5), maps.Fastfood(seed=5))),
    second=maps.Shuffle(seed=5),
)
TWICE = maps.BlockDiagonal(parts=(maps.Composed(first=maps.OneHot(), second=maps.Shuffle()),) * 2)
SEPARABLES = [
    (maps.Separable(before=(2, 3), after=(3, 5)), 6, 14),
    (maps.Separable(inner=maps.OneHot(), modes=(1,), before=(2, 1, 3), after=(2, 4, 3)), 6, 24),
    (maps.Separable(inner=TWICE.parts[0], before=(2, 3), after=(4, 3)), 6, 12),
]
# (map, entries before, entries after)
CASES = [
    *((fixed, *sizes) for fixed in FASTFOODS for sizes in ((5, 13), (13, 5), (1, 6))),
    *((fixed, *sizes) for fixed in ONE_HOTS for sizes in ((5, 13), (4, 8), (1, 3))),
    *((fixed, *sizes) for fixed in GAUSSIANS for sizes in ((5, 13), (6, 4))),
    (maps.Fourier(seed=3), 5, 13),
    (maps.Fourier(seed=3, shape=(4, 6), normalize="isometric"), 24, 24),
    (maps.Fourier(seed=3, shape=(5, 3)), 7, 15),
    (maps.Fourier(shape=(3, 4), frequencies=(0, 11, 1, 6)), 4, 12),
    (maps.Wavelet(seed=3, shape=(4, 6)), 24, 24),
    (maps.Wavelet(seed=3, shape=(5, 3)), 15, 15),
    (maps.Wavelet(shape=(2, 5), positions=(9, 0, 4, 6)), 4, 10),
    (maps.Wavelet(shape=(1, 3)), 3, 3),
    (maps.Circulant(block=3, shape=(6, 9)), 18, 54),
    (maps.Circulant(block=4, shape=(4, 4)), 4, 16),
    (maps.Circulant(block=1, shape=(2, 3)), 6, 6),
    (maps.Broadcast(), 1, 6),
    (maps.Broadcast(along="inputs"), 3, 12),
    (maps.Broadcast(along="outputs"), 3, 12),
    (maps.Selection(positions=(2, 0, 2, 4)), 5, 4),
    (maps.Shuffle(seed=3), 9, 9),
    (maps.Shuffle(seed=3, stored=False), 9, 7),
    (maps.Composed(first=maps.Identity(), second=maps.OneHot(), between=3), 5, 8),
    (maps.Composed(first=maps.Shuffle(), second=maps.Gaussian(), between="before"), 5, 8),
    (NESTED, 6, 13),
    (TWICE, 5, 13),
    (maps.BlockDiagonal(parts=(maps.Gaussian(), maps.Identity(), maps.OneHot())), 7, 7),
    *SEPARABLES,
]


def name_of(fixed):
    choices = [
        getattr(fixed, name)
        for name in ("order", "blocks", "values", "normalize", "tiled")
        if hasattr(fixed, name)
    ]
    return "-".join([type(fixed).__name__, *map(str, choices)])


def rows(cases):
    return [
        pytest.param(fixed, before, size, id=f"{index}-{name_of(fixed)}-{before}-{size}")
        for index, (fixed, before, size) in enumerate(cases)
    ]


every_case = pytest.mark.parametrize(("fixed", "before", "size"), rows(CASES))
# One of every kind, where a case takes long.
KINDS = [
    (maps.Fastfood(seed=1), 5, 13),
    (maps.Fastfood(seed=1, order="le", blocks="stacked", values="sign"), 3, 13),
    (maps.OneHot(seed=1), 5, 13),
    (maps.OneHot(seed=1, tiled=False), 5, 13),
    (maps.Gaussian(seed=1), 5, 13),
    (maps.Gaussian(seed=1, structured=True), 5, 13),
    (maps.Fourier(seed=1, shape=(3, 4)), 5, 12),
    (maps.Broadcast(along="inputs"), 5, 15),
    (maps.Selection(positions=(2, 0, 2, 4)), 5, 4),
    (maps.Shuffle(seed=1), 5, 5),
    (NESTED, 5, 13),
    (maps.Separable(before=(2, 3), after=(3, 5)), 6, 15),
    (maps.OneHot(seed=1, window=2), 5, 13),
    (maps.Wavelet(seed=1, shape=(3, 4)), 5, 12),
    (maps.Circulant(block=2, shape=(4, 2)), 4, 8),
]
every_kind = pytest.mark.parametrize(("fixed", "before", "size"), rows(KINDS))


def draw(size, seed=0):
    return numpy.random.default_rng(seed).standard_normal(size)


def as_dtype(xp, values, dtype):
    """Return numpy numbers as an array of a library, in a dtype that numpy may not have."""
    array = xp.array(values)
    if xp.name == "torch":
        import torch

        return array.to(getattr(torch, dtype))
    return array.astype(dtype)


def as_double(xp, array):
    return (
        xp.to_numpy(array.double()) if xp.name == "torch" else numpy.asarray(array, numpy.float64)
    )
