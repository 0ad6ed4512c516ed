"""WaveFT's map: coefficients at random places of a two-dimensional Haar transform."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy

from superlora._backend import Array, backend_of, scatter_add, take, zeros
from superlora.maps._shaped import PlacedMap, shape_given
from superlora.maps.shuffle import position_type

# The four outputs of a coefficient.
_CORNERS = tuple(itertools.product((0, 1), (0, 1)))


@dataclass(frozen=True, kw_only=True)
class Wavelet(PlacedMap):
    """The inverse of a one-level Haar transform of sparse coefficients (WaveFT [1]_).

    Parameters
    ----------
    seed : int
        In [0, 2**64), of the positions.
    shared : bool
        Whether all groups of one shape have the same positions.
    shape : tuple of int, optional
        The weight's outputs and inputs; in a plan those of the group's one weight.
    positions : tuple of int, optional
        The positions ``row di + column`` of the coefficients instead of random ones.
    version, substream : int
        As in every map with a seed.

    Raises
    ------
    TypeError, ValueError
        If a field is out of its range.

    Notes
    -----
    Of a weight (do, di) with H = ⌈do / 2⌉ and V = ⌈di / 2⌉ the coefficient at
    ``(p H + i, q V + j)``, p and q 0 or 1, is in four outputs:
    ``Y[2 i + t, 2 j + u] += x (-1)^(t q + u p) / 2`` for t and u 0 or 1. That is PEFT 0.21's
    default, one level of ``"db1"`` with its order of the bands; its scale, 25 by default, is the
    spec's. Of other wavelets and more levels there is none.

    The columns are orthonormal where both widths are even. An odd width is padded by one, and the
    outputs beyond are cut, as in PEFT: the columns that they cut are shorter.

    References
    ----------
    .. [1] A. Bilican et al., "Exploring Sparsity for Parameter Efficient Fine Tuning Using
       Wavelets", 2025.

    Examples
    --------
    >>> import numpy as np
    >>> Wavelet(shape=(2, 4), positions=(0, 2)).apply(np.array([2.0, 4.0]), 8).reshape(2, 4)
    array([[ 3.,  3.,  0.,  0.],
           [-1., -1.,  0.,  0.]])
    """

    positions: tuple[int, ...] | None = None

    given: ClassVar = "positions"

    def gain(self, before: int, size: int) -> float:
        """Return the mean square of an output for inputs of mean square 1.

        Parameters
        ----------
        before, size : int
            Entries of the fold and of the group.

        Returns
        -------
        float
            ``before / size``, less what an odd width cuts, in the mean over the positions.
        """
        kept = math.prod(1 - width % 2 / (2 * width) for width in shape_given(self))
        return before / size * kept

    def operations(self, before: int, size: int) -> int:
        """Return how many additions and multiplications `apply` takes.

        Parameters
        ----------
        before, size : int
            Entries of the fold and of the group.

        Returns
        -------
        int
            Of four outputs a coefficient.
        """
        return 9 * before

    def nbytes(self, before: int, size: int) -> int:
        """Return how many bytes of positions and signs are kept.

        Parameters
        ----------
        before, size : int
            Entries of the fold and of the group.

        Returns
        -------
        int
            Four of each for every coefficient.
        """
        return 4 * before * (position_type(size + 1).itemsize + 1)

    def _axes(self, size: int) -> tuple[int, ...]:
        return shape_given(self)

    def _split(self, before: int) -> tuple[numpy.ndarray, ...]:
        """Return the coefficients' half and place within it, of rows and of columns."""
        rows, columns = shape_given(self)
        row, column = numpy.divmod(self._chosen(before, rows * columns), columns)
        return *numpy.divmod(row, -(-rows // 2)), *numpy.divmod(column, -(-columns // 2))

    def _outputs(self, before: int) -> numpy.ndarray:
        """Return the four outputs of every coefficient; what is cut goes beyond the end."""
        rows, columns = shape_given(self)
        _, i, _, j = self._split(before)
        found = []
        for t, u in _CORNERS:
            row, column = 2 * i + t, 2 * j + u
            inside = (row < rows) & (column < columns)
            found.append(numpy.where(inside, row * columns + column, rows * columns))
        return numpy.concatenate(found).astype(position_type(rows * columns + 1))

    def _signs(self, before: int) -> numpy.ndarray:
        p, _, q, _ = self._split(before)
        odd = numpy.concatenate([(t * q + u * p) % 2 for t, u in _CORNERS])
        return (1 - 2 * odd).astype(numpy.int8)

    def _forward(self, x: Array, size: int, start: int, stop: int) -> Array:
        before = x.shape[0]
        four = backend_of(x).concatenate([x / 2] * 4, axis=0) * self.kept(x, "_signs", before)
        return scatter_add(four, self.kept(x, "_outputs", before), size + 1)[start:stop]

    def _backward(self, y: Array, before: int) -> Array:
        library = backend_of(y)
        whole = library.concatenate([y, zeros((1,), like=y)], axis=0)
        four = take(whole, self.kept(y, "_outputs", before)) * self.kept(y, "_signs", before)
        return library.sum(library.reshape(four, (4, before)), axis=0) / 2
