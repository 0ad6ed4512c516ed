"""FourierFT's map: coefficients at random frequencies of a two-dimensional Fourier transform."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy

from superlora._backend import (
    Array,
    backend_of,
    cast,
    fourier_transforms,
    scatter_add,
    take,
    widened,
    zeros,
)
from superlora.maps._shaped import PlacedMap
from superlora.maps.shuffle import position_type


@dataclass(frozen=True, kw_only=True)
class Fourier(PlacedMap):
    """The real part of the inverse Fourier transform of a sparse spectrum (FourierFT [1]_).

    Parameters
    ----------
    seed : int
        In [0, 2**64), of the frequencies.
    shared : bool
        Whether all groups of one shape have the same frequencies.
    shape : tuple of int, optional
        The two axes of the transform, whose product is the group's size. In a plan it is by
        default the one weight's own shape; otherwise the vector itself is the one axis.
    frequencies : tuple of int, optional
        The frequencies ``u d2 + v`` instead of random ones.
    normalize : {"isometric", None}
        Multiply by ``sqrt(2 d1 d2)``, which keeps the norm in the mean over coefficients that
        are independent, or not at all, as in PEFT, where the spec's scale is the
        method's (150 by default there).
    version, substream : int
        As in every map with a seed.

    Raises
    ------
    TypeError, ValueError
        If a field is out of its range.

    Notes
    -----
    ``Y[a, b] = c / (d1 d2) sum_i x_i cos(2 π (a u_i / d1 + b v_i / d2))``. Frequencies (u, v)
    and (-u, -v) give the same column, so that all of them together span about half of the
    space; a column that is its own partner is longer than the others by ``sqrt(2)``.

    References
    ----------
    .. [1] Z. Gao et al., "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", 2024.

    Examples
    --------
    >>> import numpy as np
    >>> Fourier(shape=(2, 2), frequencies=(1,), normalize=None).apply(np.array([4.0]), 4)
    array([ 1., -1.,  1., -1.])
    """

    frequencies: tuple[int, ...] | None = None
    normalize: str | None = None

    given: ClassVar = "frequencies"
    choices: ClassVar = {"normalize": ("isometric", None)}

    def gain(self, before: int, size: int) -> float:
        """Return the mean square of an output for inputs of mean square 1.

        Parameters
        ----------
        before, size : int
            Entries of the fold and of the group.

        Returns
        -------
        float
            ``before / size`` if isometric.
        """
        return before / size if self.normalize else before / (2 * size**2)

    def operations(self, before: int, size: int) -> int:
        """Return about how many additions and multiplications `apply` takes.

        Parameters
        ----------
        before, size : int
            Entries of the fold and of the group.

        Returns
        -------
        int
            ``2.5 n log2 n`` for a transform to n real numbers.
        """
        return 5 * size * size.bit_length() // 2

    def nbytes(self, before: int, size: int) -> int:
        """Return how many bytes of positions are kept.

        Parameters
        ----------
        before, size : int
            Entries of the fold and of the group.

        Returns
        -------
        int
            Two positions for each coefficient.
        """
        return 2 * before * position_type(size).itemsize

    def product_operations(  # noqa: D102  (inherited)
        self, before: int, shape: tuple[int, int]
    ) -> tuple[int, int] | None:
        if self.shape != shape:
            return None
        butterflies = sum(size * size.bit_length() for size in shape)
        return 8 * butterflies, 2 * sum(shape) + 5 * before

    def multiply(self, values: Array, x: Array) -> Array:
        """Multiply by the update that the coefficients make, which is never formed.

        Parameters
        ----------
        values : array, (before,)
            The coefficients.
        x : array, (n, d2)
            Inputs, where the transform has the axes (d1, d2).

        Returns
        -------
        array, (n, d1)
            ``x @ Yᵀ`` of ``Y = apply(values, d1 d2)``: the inputs' transform is taken at the
            frequencies v and transformed back from the frequencies u.

        Raises
        ------
        ValueError
            If the map has no shape.
        """
        if self.shape is None:
            raise ValueError("shape must be given to multiply inputs: got None")
        rows = self.shape[0]
        if x.shape[0] == 0:  # which no transform takes
            return zeros((0, rows), like=x)
        transforms = fourier_transforms(x)
        library = backend_of(values, x)
        sources, targets, weights = (
            self.kept(x, name, values.shape[0]) for name in ("_sources", "_targets", "_weights")
        )
        spectrum = transforms.rfft(widened(x))
        parts = [library.transpose(spectrum.real), library.transpose(spectrum.imag)]
        found = take(library.concatenate(parts, axis=0), sources)
        both = library.concatenate([values, values], axis=0)
        scales = cast(both, like=found) * cast(weights, like=found)
        kept = rows // 2 + 1
        sums = library.transpose(scatter_add(found * scales[:, None], targets, 2 * kept))
        y = transforms.irfft(sums[:, :kept] + 1j * sums[:, kept:], n=rows)
        return cast(y, like=x)

    def _upper(self, before: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Return the frequencies, or their mirrors, whose u is in a real transform's half."""
        rows, columns = self._axes(0)
        u, v = numpy.divmod(self._chosen(before, rows * columns), columns)
        beyond = u > rows // 2
        return numpy.where(beyond, -u % rows, u), numpy.where(beyond, -v % columns, v)

    def _sources(self, before: int) -> numpy.ndarray:
        """Return where the inputs' half spectrum has each frequency, real and imaginary."""
        columns = self._axes(0)[1]
        _, v = self._upper(before)
        half = numpy.minimum(v, columns - v)
        both = numpy.concatenate([half, half + columns // 2 + 1])
        return both.astype(position_type(2 * columns))

    def _targets(self, before: int) -> numpy.ndarray:
        """Return where the outputs' half spectrum has each frequency, real and imaginary."""
        rows = self._axes(0)[0]
        u, _ = self._upper(before)
        both = numpy.concatenate([u, u + rows // 2 + 1])
        return both.astype(position_type(2 * rows))

    def _weights(self, before: int) -> numpy.ndarray:
        """Return what multiplies the real and imaginary parts."""
        rows, columns = self._axes(0)
        u, v = self._upper(before)
        own = 2 * u % rows == 0  # a frequency that is its own mirror has no imaginary part
        signs = numpy.where(v > columns // 2, 0.5, -0.5)
        both = numpy.concatenate([numpy.where(own, 1.0, 0.5), numpy.where(own, 0.0, signs)])
        return both * (self._factor(rows * columns) / columns)

    def _factor(self, size: int) -> float:
        return float(2 * size) ** 0.5 if self.normalize else 1.0

    def _half(self, before: int, size: int, mirrored: bool) -> numpy.ndarray:
        """Return where a real transform's half spectrum has each coefficient, or its mirror."""
        # Both have half of it; what is not in the half goes to a place of its own beyond the end.
        rows, columns = self._axes(size)
        kept = columns // 2 + 1
        high, low = numpy.divmod(self._chosen(before, size), columns)
        u, v = (-high % rows, -low % columns) if mirrored else (high, low)
        return numpy.where(v < kept, u * kept + v, rows * kept).astype(position_type(size))

    def _places(self, before: int, size: int, like: Array) -> tuple[Array, Array]:
        first, second = (self.kept(like, "_half", before, size, side) for side in (False, True))
        return first, second

    def _forward(self, x: Array, size: int, start: int, stop: int) -> Array:
        library = backend_of(x)
        rows, columns = self._axes(size)
        shape = (rows, columns // 2 + 1)
        half = x * 0.5
        total = math.prod(shape) + 1
        first, second = self._places(x.shape[0], size, x)
        spectrum = scatter_add(half, first, total) + scatter_add(half, second, total)
        spectrum = library.reshape(spectrum[:-1], shape)
        y = fourier_transforms(x).irfft2(spectrum, s=(rows, columns))
        return library.reshape(y, (-1,))[start:stop] * self._factor(size)

    def _backward(self, y: Array, before: int) -> Array:
        library = backend_of(y)
        size = y.shape[0]
        rows, columns = self._axes(size)
        # Of real input the transform at (-u, -v) is the conjugate: its real part is the same.
        spectrum = fourier_transforms(y).rfft2(library.reshape(y, (rows, columns))).real
        kept = columns // 2 + 1
        first, second = self._places(before, size, y)
        inside = first < rows * kept
        places = library.where(inside, first, second)
        found = take(library.reshape(spectrum, (-1,)), places)
        return found * (self._factor(size) / size)
