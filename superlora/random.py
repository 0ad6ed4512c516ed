"""Random numbers from raw Philox bits: the same on every array library and device.

A seed is a format: files store it in place of what is drawn. Everything here is derived from
Philox 4x64-10 (Salmon et al. 2011) by integer arithmetic, but for the normal distribution's
inverse, and any part of a stream can be drawn without the rest.
"""

from __future__ import annotations

import math

import numpy
from scipy.special import ndtri

from superlora.checks import check_count

# Of these derivations, in the maps that a file names; a later one gets another number.
VERSION = 1
_WORDS = 4  # that Philox makes of one counter
_CHUNK = 1 << 16  # numbers whose temporary arrays stay in a core's cache


def check_seed(seed: object) -> int:
    """Return `seed` if it is one, or say what it must be."""
    if check_count("seed", seed, least=0) >= 1 << 64:
        raise ValueError(f"seed must be below 2**64: got {seed}")
    assert isinstance(seed, int)
    return seed


def bits(seed: int, stream: int, start: int, stop: int) -> numpy.ndarray:
    """Draw raw words of a stream."""
    skipped = start % _WORDS
    philox = numpy.random.Philox(
        key=numpy.array([seed, stream], dtype=numpy.uint64),
        counter=numpy.array([start // _WORDS, 0, 0, 0], dtype=numpy.uint64),
    )
    words: numpy.ndarray = philox.random_raw(stop - start + skipped)[skipped:]
    return words


def normal(seed: int, stream: int, shape: tuple[int, ...]) -> numpy.ndarray:
    """Draw standard normal numbers."""
    values: numpy.ndarray = _normals(check_seed(seed), stream, 0, math.prod(shape)).reshape(shape)
    return values


def _normals(seed: int, stream: int, start: int, stop: int) -> numpy.ndarray:
    raw = bits(seed, stream, start, stop)
    # The half keeps 0 out, where the inverse is infinite; in the last interval it rounds up to 1.
    places = ((raw >> numpy.uint64(11)).astype(numpy.float64) + 0.5) * 2**-53
    values: numpy.ndarray = ndtri(numpy.minimum(places, 1 - 2**-53))
    return values


def coarse_normals(seed: int, stream: int, start: int, stop: int) -> numpy.ndarray:
    """Draw standard normal numbers that do not depend on the last bits of the inverse."""
    found = numpy.empty(stop - start, dtype=numpy.float32)
    for first in range(start, stop, _CHUNK):
        last = min(first + _CHUNK, stop)
        scaled = numpy.rint(_normals(seed, stream, first, last) * 65536.0)
        found[first - start : last - start] = scaled / 65536.0
    return found


def signs(seed: int, stream: int, start: int, stop: int) -> numpy.ndarray:
    """Draw random signs, 64 from each raw word, its lowest bit first."""
    first = start // 64
    words = bits(seed, stream, first, -(-stop // 64))
    drawn = numpy.unpackbits(words.astype("<u8").view(numpy.uint8), bitorder="little")
    drawn = drawn[start - 64 * first : stop - 64 * first]
    return numpy.int8(1) - 2 * drawn.view(numpy.int8)


def integers(seed: int, stream: int, bound: int, size: int) -> numpy.ndarray:
    """Draw integers below a bound."""
    drawn: numpy.ndarray = (bits(seed, stream, 0, size) % numpy.uint64(bound)).astype(numpy.int64)
    return drawn
