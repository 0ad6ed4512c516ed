"""Maps of one whole weight: FourierFT's, WaveFT's and C3A's."""

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
    ones,
    scatter_add,
    take,
    widened,
    zeros,
)
from superlora.checks import check_count
from superlora.maps._base import Place
from superlora.maps._seeded import PlacedMap, WeightMap, weight_shape
from superlora.maps.index_maps import position_type


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
        """Return the mean square of an output for inputs of mean square 1."""
        return before / size if self.normalize else before / (2 * size**2)

    def operations(self, before: int, size: int) -> int:
        """Return about how many additions and multiplications `apply` takes."""
        return 5 * size * size.bit_length() // 2

    def nbytes(self, before: int, size: int) -> int:
        """Return how many bytes of positions are kept."""
        return 2 * before * position_type(size).itemsize

    def product_operations(  # noqa: D102  (inherited)
        self, before: int, shape: tuple[int, int]
    ) -> tuple[int, int] | None:
        if self.shape != shape:
            return None
        butterflies = sum(size * size.bit_length() for size in shape)
        return 8 * butterflies, 2 * sum(shape) + 5 * before

    def multiply(self, values: Array, x: Array) -> Array:
        """Multiply by the update that the coefficients make, which is never formed."""
        rows = super()._axes()[0]
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
        rows, columns = self._axes()
        u, v = numpy.divmod(self._chosen(before, rows * columns), columns)
        beyond = u > rows // 2
        return numpy.where(beyond, -u % rows, u), numpy.where(beyond, -v % columns, v)

    def _sources(self, before: int) -> numpy.ndarray:
        """Return where the inputs' half spectrum has each frequency, real and imaginary."""
        columns = self._axes()[1]
        _, v = self._upper(before)
        return _both_parts(numpy.minimum(v, columns - v), columns)

    def _targets(self, before: int) -> numpy.ndarray:
        """Return where the outputs' half spectrum has each frequency, real and imaginary."""
        return _both_parts(self._upper(before)[0], self._axes()[0])

    def _weights(self, before: int) -> numpy.ndarray:
        """Return what multiplies the real and imaginary parts."""
        rows, columns = self._axes()
        u, v = self._upper(before)
        own = 2 * u % rows == 0  # a frequency that is its own mirror has no imaginary part
        signs = numpy.where(v > columns // 2, 0.5, -0.5)
        both = numpy.concatenate([numpy.where(own, 1.0, 0.5), numpy.where(own, 0.0, signs)])
        return both * (self._factor(rows * columns) / columns)

    def _axes(self, size: int = 0) -> tuple[int, ...]:
        return self.shape or (1, size)

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


def _both_parts(places: numpy.ndarray, size: int) -> numpy.ndarray:
    """Return places in the real parts of a half spectrum, and then in its imaginary parts."""
    both = numpy.concatenate([places, places + size // 2 + 1])
    return both.astype(position_type(2 * size))


_T, _U = numpy.divmod(numpy.arange(4)[:, None], 2)  # the four outputs of a coefficient


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
        """Return the mean square of an output for inputs of mean square 1."""
        kept = math.prod(1 - width % 2 / (2 * width) for width in self._axes())
        return before / size * kept

    def operations(self, before: int, size: int) -> int:
        """Return how many additions and multiplications `apply` takes."""
        return 9 * before

    def nbytes(self, before: int, size: int) -> int:
        """Return how many bytes of positions and signs are kept."""
        return 4 * before * (position_type(size + 1).itemsize + 1)

    def _split(self, before: int) -> tuple[numpy.ndarray, ...]:
        """Return the coefficients' half and place within it, of rows and of columns."""
        rows, columns = self._axes()
        row, column = numpy.divmod(self._chosen(before, rows * columns), columns)
        return *numpy.divmod(row, -(-rows // 2)), *numpy.divmod(column, -(-columns // 2))

    def _outputs(self, before: int) -> numpy.ndarray:
        """Return the four outputs of every coefficient; what is cut goes beyond the end."""
        rows, columns = self._axes()
        _, i, _, j = self._split(before)
        row, column = 2 * i + _T, 2 * j + _U
        inside = (row < rows) & (column < columns)
        found = numpy.where(inside, row * columns + column, rows * columns)
        return found.ravel().astype(position_type(rows * columns + 1))

    def _signs(self, before: int) -> numpy.ndarray:
        p, _, q, _ = self._split(before)
        odd: numpy.ndarray = (_T * q + _U * p) % 2
        return (1 - 2 * odd).ravel().astype(numpy.int8)

    def _forward(self, x: Array, size: int, start: int, stop: int) -> Array:
        before = x.shape[0]
        four = backend_of(x).concatenate([x / 2] * 4, axis=0) * self.kept(x, "_signs", before)
        return scatter_add(four, self.kept(x, "_outputs", before), size + 1)[start:stop]

    def _backward(self, y: Array, before: int) -> Array:
        library = backend_of(y)
        whole = library.concatenate([y, zeros((1,), like=y)], axis=0)
        four = take(whole, self.kept(y, "_outputs", before)) * self.kept(y, "_signs", before)
        return library.sum(library.reshape(four, (4, before)), axis=0) / 2


@dataclass(frozen=True, kw_only=True)
class Circulant(WeightMap):
    """A weight of circulant blocks, each made of one kernel (C3A [1]_).

    Parameters
    ----------
    block : int
        The blocks' width b, which divides both widths of the weight.
    shape : tuple of int, optional
        The weight's outputs and inputs; in a plan those of the group's one weight.

    Raises
    ------
    TypeError, ValueError
        If a field is out of its range.

    Notes
    -----
    ``ΔW[p b + i, q b + k] = x[p, q, (k - i) mod b] / di`` for a weight (do, di) and kernels x of
    the shape (do / b, di / b, b), as in PEFT 0.21, so that ``ΔW`` times an input is a circular
    cross-correlation. In a plan the fold is the kernels, whatever the spec's ratio. A call
    takes twice the memory of its result, and nothing is kept.

    References
    ----------
    .. [1] A. Chen et al., "Parameter-Efficient Fine-Tuning via Circular Convolution", 2024.

    Examples
    --------
    >>> import numpy as np
    >>> y = Circulant(block=3, shape=(3, 3)).apply(np.array([3.0, 6.0, 9.0]), 9)
    >>> y.reshape(3, 3)
    array([[1., 2., 3.],
           [3., 1., 2.],
           [2., 3., 1.]])
    """

    block: int

    sliced: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("block", self.block)
        super().__post_init__()

    def fixed_entries(self, place: Place) -> int:
        """Return how many entries the kernels have."""
        rows, columns = self._divided(self.shape or weight_shape(self, place))
        return rows * columns * self.block

    def check(self, before: int, size: int) -> None:
        """Refuse a shape of another size, and another number of kernels."""
        super().check(before, size)
        rows, columns = self._divided(self._axes())
        if before != rows * columns * self.block:
            raise ValueError(
                f"x must have {rows * columns * self.block} entries, those of the kernels: "
                f"got {before}"
            )

    def gain(self, before: int, size: int) -> float:
        """Return the mean square of an output for inputs of mean square 1."""
        return float(self._axes()[1] ** -2)

    def operations(self, before: int, size: int) -> int:
        """Return how many multiplications `apply` takes."""
        return before

    def _divided(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return how many blocks there are along outputs and inputs."""
        rows, columns = shape
        if rows % self.block or columns % self.block:
            raise ValueError(
                f"block must divide both widths of the weight: got {self.block} and {shape}"
            )
        return rows // self.block, columns // self.block

    def _forward(self, x: Array, size: int, start: int, stop: int) -> Array:
        library = backend_of(x)
        block, columns = self.block, self._axes()[1]
        each = block * columns  # entries of a row of blocks
        first, last = start // each, -(-stop // each)
        kernels = library.reshape(x, (-1, columns // block, 1, block))[first:last] / columns
        # A kernel's copies in rows of 2 b - 1 entries: each row begins one entry earlier.
        copies = kernels * ones((2 * block - 1, 1), like=x)
        rows = library.reshape(copies, (last - first, -1, block, 2 * block - 1))
        y = library.transpose(rows[..., :block], (0, 2, 1, 3))
        return library.reshape(y, (-1,))[start - first * each : stop - first * each]

    def _backward(self, y: Array, before: int) -> Array:
        library = backend_of(y)
        block, (height, columns) = self.block, self._axes()
        blocks = library.reshape(y, (height // block, block, columns // block, block))
        rows = library.transpose(blocks, (0, 2, 1, 3))
        rows = library.concatenate([rows, zeros((*rows.shape[:3], block - 1), like=y)], axis=3)
        copies = library.reshape(rows, (-1, 2 * block - 1, block))
        return library.reshape(library.sum(copies, axis=1), (-1,)) / columns
