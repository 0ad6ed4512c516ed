"""Random permutations from a seed, any part of which can be had without the rest."""

from __future__ import annotations

import functools
import math

import numpy

from superlora.checks import check_count
from superlora.random import bits, check_seed, integers

# Up to here random keys are sorted; above, no list of all positions is needed.
_SORTED = 1 << 16
_MOST = 1 << 48
_ROUNDS = 6
_CHUNK = 1 << 17  # positions whose temporary arrays stay in a core's cache


class Permutation:
    """A random permutation of ``0 … size - 1`` and its inverse.

    Parameters
    ----------
    seed : int
        In [0, 2**64).
    stream : int
        Which of the seed's independent streams, a multiple of 8 below 2**64.
    size : int
        Number of positions, at least 1 and at most 2**48.

    Raises
    ------
    TypeError, ValueError
        If a number is not an integer of its range.

    Notes
    -----
    Up to 2**16 positions it is the order of as many random words. Above that it is a Feistel
    network on pairs, ``position = l B + r`` with l < A, r < B and A B just above `size`: l and r
    are in turn shifted, modulo A and B, by a table of random numbers at the other one, six times
    (Luby and Rackoff 1988 [1]_ ask for four with functions like these), and what falls beyond
    `size` goes through again. It takes tables of about ``6 sqrt(size)`` numbers of 4 bytes, 1 MiB
    for 2**31 positions, where a list of them would take 16 GiB.

    References
    ----------
    .. [1] M. Luby and C. Rackoff, "How to construct pseudorandom permutations from pseudorandom
       functions", SIAM Journal on Computing, 1988.

    Examples
    --------
    >>> import numpy as np
    >>> shuffle = Permutation(seed=0, stream=0, size=5)
    >>> shuffle.forward(0, 5)
    array([0, 2, 1, 4, 3])
    >>> shuffle.inverse(0, 5)
    array([0, 2, 1, 4, 3])
    >>> Permutation(seed=0, stream=0, size=10**12).forward(7, 9)
    array([765467453535, 754944553122])
    """

    def __init__(self, seed: int, stream: int, size: int) -> None:
        self.seed, self.stream, self.size = check_seed(seed), stream, check_size(size)
        # A and B; where B is the root rounded up, A B exceeds size by less than B.
        self._low = math.isqrt(size - 1) + 1
        self._high = -(-size // self._low)

    def forward(self, start: int, stop: int) -> numpy.ndarray:
        """Return where the positions ``start … stop - 1`` go."""
        return self._images(start, stop, inverse=False)

    def inverse(self, start: int, stop: int) -> numpy.ndarray:
        """Return what goes to the positions ``start … stop - 1``."""
        return self._images(start, stop, inverse=True)

    @functools.cached_property
    def _tables(self) -> list[numpy.ndarray]:
        """Shifts of l by r, of r by l, and so on, in [0, A) or [0, B)."""
        sizes = [(self._high, self._low), (self._low, self._high)] * (_ROUNDS // 2)
        return [
            integers(self.seed, self.stream + 1 + turn, bound, size).astype(numpy.int32)
            for turn, (bound, size) in enumerate(sizes)
        ]

    def _images(self, start: int, stop: int, inverse: bool) -> numpy.ndarray:
        if not 0 <= start <= stop <= self.size:
            raise ValueError(
                f"start and stop must be a slice of {self.size} positions: got {start} and {stop}"
            )
        if self.size <= _SORTED:
            (row,) = permutation_rows(self.seed, self.stream, self.size, 0, 1, inverse=inverse)
            return numpy.array(row[start:stop])
        found = numpy.arange(start, stop, dtype=numpy.int64)
        for first in range(0, len(found), _CHUNK):
            part = found[first : first + _CHUNK]
            part[:] = self._turn(part, inverse)
            beyond = numpy.flatnonzero(part >= self.size)
            while beyond.size:
                part[beyond] = self._turn(part[beyond], inverse)
                beyond = beyond[part[beyond] >= self.size]
        return found

    def _turn(self, positions: numpy.ndarray, inverse: bool) -> numpy.ndarray:
        high, low = numpy.divmod(positions, self._low)
        for turn in reversed(range(_ROUNDS)) if inverse else range(_ROUNDS):
            by, moved, bound = (high, low, self._low) if turn % 2 else (low, high, self._high)
            shift = self._tables[turn].take(by)
            if inverse:
                moved -= shift
                moved += bound * (moved < 0)
            else:
                moved += shift
                moved -= bound * (moved >= bound)
        high *= self._low
        high += low
        return high


def check_size(size: int) -> int:
    """Return a number of positions if it is one that can be permuted, or say what it must be."""
    if check_count("size", size) > _MOST:
        raise ValueError(f"size must be at most 2**48, the positions of a permutation: got {size}")
    return size


def permutation_rows(
    seed: int, stream: int, size: int, first: int, last: int, *, inverse: bool = False
) -> numpy.ndarray:
    """Return some of a seed's permutations of one size."""
    if size > _SORTED:
        each = (Permutation(seed, stream + 8 * k, size) for k in range(first, last))
        return numpy.stack([p.inverse(0, size) if inverse else p.forward(0, size) for p in each])
    keys = bits(seed, stream, first * size, last * size).reshape(-1, size)
    rows = numpy.argsort(keys, axis=1, kind="stable")
    if not inverse:
        return rows
    places = numpy.empty_like(rows)
    numpy.put_along_axis(places, rows, numpy.arange(size)[None], axis=1)
    return places
