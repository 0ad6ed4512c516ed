"""A random matrix with independent normal entries, or one with a fast product."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy

from superlora._backend import Array, backend_of, cast
from superlora.maps._seeded import CHECKED, NORMALIZE, SeededMap, chunks, joined, scale_of
from superlora.maps.fastfood import Fastfood
from superlora.maps.walsh_hadamard import next_power_of_two

_MOST = 1 << 28  # entries of a dense matrix
_KEPT = 1 << 24  # that are kept in memory
_CHUNK = 1 << 20  # that are drawn at once where they are not
_RUN = 1 << 18  # rows whose lengths are kept together
_LENGTHS = 9  # the kind of stream of the rows' lengths


@dataclass(frozen=True, kw_only=True)
class Gaussian(SeededMap):
    """A matrix of independent normal numbers.

    Parameters
    ----------
    seed : int
        In [0, 2**64).
    shared : bool
        Whether all groups of one size have the same matrix.
    structured : bool
        Whether a product in loglinear time takes the matrix's place: stacked fastfood blocks
        whose rows have the lengths of Gaussian ones, ``S H diag(G) Π H diag(B)`` (Le et al. [1]_).
    normalize : {"isometric", "variance", None}
        Entries of variance ``1 / size``, ``1 / before``, or 1.
    stored : bool
        Whether up to 2**24 entries of a dense matrix, or what the blocks draw, are kept in
        memory.
    version, substream : int
        As in every map with a seed.

    Raises
    ------
    TypeError, ValueError
        If a field is out of its range.

    Notes
    -----
    ``y = R x``, ``E |y|² = |x|²`` if isometric. A dense matrix has at most 2**28 entries; up to
    2**24 are kept in memory, and more are drawn anew for each product.

    References
    ----------
    .. [1] Q. Le, T. Sarlós and A. Smola, "Fastfood: Approximating Kernel Expansions in
       Loglinear Time", 2013.

    Examples
    --------
    >>> import numpy as np
    >>> Gaussian(seed=0).apply(np.ones(2), 4).round(4)
    array([ 1.293 , -0.4437,  0.1633, -0.4049])
    """

    structured: bool = False
    normalize: str | None = "isometric"
    stored: bool = True

    choices: ClassVar = {"normalize": NORMALIZE}
    sliced: ClassVar[bool] = True

    def check(self, before: int, size: int) -> None:
        """Refuse a dense matrix that no memory would hold."""
        if self.structured:
            self._blocks.check(before, size)
        elif before * size > _MOST:
            raise ValueError(
                f"size must be at most {_MOST // before} for a dense Gaussian of {before} columns, "
                f"2**28 entries in all: got {size}; take structured=True"
            )

    def gain(self, before: int, size: int) -> float:
        """Return the mean square of an output for inputs of mean square 1."""
        return before * scale_of(self.normalize, before, size) ** 2

    def constants(self, before: int, size: int) -> dict[str, numpy.ndarray]:
        """Return the first entries, or those of the fastfood blocks."""
        if self.structured:
            lengths = self._lengths(before, 0, min(size, CHECKED))
            return {**self._blocks.constants(before, size), "lengths": lengths}
        return {"entries": self._rows(1, 0, min(before * size, CHECKED))}

    def operations(self, before: int, size: int) -> int:
        """Return about how many additions and multiplications `apply` takes."""
        return self._blocks.operations(before, size) if self.structured else 2 * before * size

    def nbytes(self, before: int, size: int) -> int:
        """Return how many bytes of the matrix are kept."""
        if self.structured:
            return self._blocks.nbytes(before, size) + self.stored * 8 * size
        return self.stored * 4 * before * size if before * size <= _KEPT else 0

    @functools.cached_property
    def _blocks(self) -> Fastfood:
        return Fastfood(
            seed=self.seed,
            substream=self.substream,
            order="le",
            blocks="stacked",
            normalize=None,
            stored=self.stored,
        )

    def _forward(self, x: Array, size: int, start: int, stop: int) -> Array:
        before = x.shape[0]
        scale = scale_of(self.normalize, before, size)
        if self.structured:
            y = self._blocks.apply_slice(x, size, start, stop)
            return self._scaled(y, before, size, start, scale)
        library = backend_of(x)
        parts = [
            library.tensordot(cast(rows, like=x), x, axes=([1], [0]))
            for _, rows in self._chunks(before, size, start, stop, x)
        ]
        return joined(parts) * scale

    def _backward(self, y: Array, before: int) -> Array:
        size = y.shape[0]
        scale = scale_of(self.normalize, before, size)
        if self.structured:
            return self._blocks.adjoint(self._scaled(y, before, size, 0, scale), before)
        library = backend_of(y)
        total: Array = None
        for first, rows in self._chunks(before, size, 0, size, y):
            run = y[first : first + rows.shape[0]]
            part = library.tensordot(run, cast(rows, like=y), axes=([0], [0]))
            total = part if total is None else total + part
        return total * scale

    def _chunks(
        self, before: int, size: int, start: int, stop: int, like: Array
    ) -> Iterator[tuple[int, Array]]:
        """Yield the rows of a slice, few enough at a time, and where they begin."""
        if self.stored and before * size <= _KEPT:
            yield start, self.kept(like, "_rows", before, 0, size)[start:stop]
            return
        step = max(1, _CHUNK // before)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            yield first, self.kept(like, "_rows", before, first, last, keep=False)

    def _rows(self, before: int, first: int, last: int) -> numpy.ndarray:
        return self._draw_normals(first * before, last * before).reshape(-1, before)

    def _scaled(self, y: Array, before: int, size: int, start: int, scale: float) -> Array:
        """Give rows that are some of the fastfood blocks' their own lengths."""
        stop = start + y.shape[0]
        width = max(_RUN, next_power_of_two(before))
        runs = []
        for first, last in chunks(width, size, start, stop):
            low, high = max(start, first), min(stop, last)
            ratios = cast(self._fixed(y, "_ratios", before, first, last), like=y)
            runs.append(
                y[low - start : high - start] * (ratios[low - first : high - first] * scale)
            )
        return joined(runs)

    def _ratios(self, before: int, start: int, stop: int) -> numpy.ndarray:
        """Return the lengths of rows, where a block begins, over those that the blocks give."""
        width = next_power_of_two(before)
        first, last = start // width, -(-stop // width)
        numbers = self._blocks._draw_values(first * width, last * width).reshape(-1, width)
        norms = numpy.linalg.norm(numbers.astype(numpy.float64), axis=1) * math.sqrt(width)
        norms[norms == 0] = numpy.inf  # a row of zeros has no direction, and stays one
        ratios: numpy.ndarray = self._lengths(before, start, stop)
        ratios /= numpy.repeat(norms, width)[: stop - start]
        return ratios

    def _lengths(self, before: int, start: int, stop: int) -> numpy.ndarray:
        # Of a normal vector of d entries: about sqrt(d - 1/2) + a normal number / sqrt(2).
        width = next_power_of_two(before)
        drawn = self._draw_normals(start, stop, _LENGTHS)
        drawn = drawn.astype(numpy.float64) * math.sqrt(0.5)
        lengths: numpy.ndarray = numpy.abs(math.sqrt(width - 0.5) + drawn)
        return lengths
