"""The Walsh–Hadamard transform of numpy's arrays, compiled by Numba; imported on first use.

A row is seen as blocks of `LEAST` entries, which are transformed one after the other. As soon
as four neighbours are done they are joined to one, and so on upwards, while a cache still holds
them. All inner loops go over views of known lengths, as otherwise the compiler checks for
negative positions and makes no vector instructions.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numba
import numpy

if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
    raise ModuleNotFoundError("NUMBA_DISABLE_JIT is set")

LEAST = 256


def _compiled(function: Any) -> Any:
    # Not fast maths: NaN and Inf are numbers here.
    compiled = partial(numba.njit, nogil=True, error_model="numpy", forceinline=True)
    try:
        return compiled(cache=True)(function)
    except RuntimeError:  # there is no folder for a cache
        return compiled()(function)


@_compiled
def _four(a: float, b: float, c: float, d: float) -> tuple[float, float, float, float]:
    return (a + b) + (c + d), (a - b) + (c - d), (a + b) - (c + d), (a - b) - (c - d)


@_compiled
def _turn(x: numpy.ndarray, y: numpy.ndarray, scale: float) -> None:
    """Transform a block for the two lowest bits of its positions, and make them the highest."""
    w = LEAST // 4
    for i in range(w):
        a, b, c, d = _four(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3])
        y[i], y[w + i], y[2 * w + i], y[3 * w + i] = a * scale, b * scale, c * scale, d * scale


@_compiled
def _join(y: numpy.ndarray, size: int, start: int, stop: int) -> None:
    """Join four parts of `size` entries to one, at some of their lines of `LEAST` entries."""
    z = y.reshape((-1, 4, size // LEAST, LEAST))
    for line in range(start, stop):
        parts, at = z[line // z.shape[2]], line % z.shape[2]
        a, b, c, d = parts[0, at], parts[1, at], parts[2, at], parts[3, at]
        for i in range(LEAST):
            a[i], b[i], c[i], d[i] = _four(a[i], b[i], c[i], d[i])


@_compiled
def _rows(x: numpy.ndarray, y: numpy.ndarray, first: int, scale: float) -> None:
    """Transform rows; the parts that are joined by fours are of `first` blocks, 1 or 2."""
    blocks, one = x.shape[1] // LEAST, y.dtype.type(1)
    x, y = x.reshape((-1, LEAST)), y.reshape((-1, LEAST))
    s, t = numpy.empty(LEAST, y.dtype), numpy.empty(LEAST, y.dtype)
    for block in range(len(x)):
        _turn(x[block], s, scale)
        _turn(s, t, one)
        _turn(t, s, one)
        _turn(s, y[block], one)
        done, width = block + 1, 1
        if first == 2 and done % 2 == 0:
            a, b, width = y[block - 1], y[block], 2
            for i in range(LEAST):
                a[i], b[i] = a[i] + b[i], a[i] - b[i]
        while first <= width < blocks and done % (4 * width) == 0:
            _join(y, width * LEAST, done // 4 - width, done // 4)
            width *= 4


def transform(x: numpy.ndarray, y: numpy.ndarray, scale: float, threads: int | None) -> None:
    """Write ``scale H x`` of the rows of `x` to `y`, both contiguous."""
    size, factor, first = x.shape[-1], x.dtype.type(scale), 2 - x.shape[-1].bit_length() % 2
    most = threads or numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    # 8 MiB for each: starting one must pay, and the memory serves a few cores at most.
    threads = min(most, x.nbytes >> 23)
    if threads < 2:
        _rows(x.reshape(-1, size), y.reshape(-1, size), first, factor)
        return
    parts = 4 * threads  # a thread that is held up takes fewer
    while x.size // size < parts:
        size //= 4
    u, v = x.reshape(-1, size), y.reshape(-1, size)
    # Not Numba's threads: two callers at once, or a fork, end their process.
    with ThreadPoolExecutor(threads) as pool:

        def share(work: Any, count: int) -> None:
            cuts = [count * part // parts for part in range(parts + 1)]
            list(pool.map(work, cuts, cuts[1:]))

        share(lambda start, stop: _rows(u[start:stop], v[start:stop], first, factor), len(u))
        while size < x.shape[-1]:
            share(partial(_join, v, size), v.size // (4 * LEAST))
            size *= 4
