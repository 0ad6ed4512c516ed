"""C3A's map: circulant blocks, each of one kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from superlora._backend import Array, backend_of, ones, zeros
from superlora.maps._base import Map, Place
from superlora.maps._seeded import CheckedMap
from superlora.maps._shaped import check_axes, freeze_shape, shape_given, weight_shape, with_shape
from superlora.values import check_count


@dataclass(frozen=True, kw_only=True)
class Circulant(CheckedMap):
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
    shape: tuple[int, ...] | None = None

    sliced: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("block", self.block)
        freeze_shape(self)

    def bind(self, place: Place) -> Map:
        """Return the map with the shape of the group's weight.

        Parameters
        ----------
        place : Place
            The group and the weights in it.

        Returns
        -------
        Map
            With a shape.
        """
        return with_shape(self, place)

    def fixed_entries(self, place: Place) -> int:
        """Return how many entries the kernels have.

        Parameters
        ----------
        place : Place
            The group and the weights in it.

        Returns
        -------
        int
            ``do di / b``.
        """
        rows, columns = self._divided(self.shape or weight_shape(self, place))
        return rows * columns * self.block

    def check(self, before: int, size: int) -> None:
        """Refuse a shape of another size, and another number of kernels.

        Parameters
        ----------
        before, size : int
            Entries of the kernels and of the group.

        Raises
        ------
        ValueError
            If it is so.
        """
        shape = shape_given(self)
        check_axes(shape, size)
        rows, columns = self._divided(shape)
        if before != rows * columns * self.block:
            raise ValueError(
                f"x must have {rows * columns * self.block} entries, those of the kernels: "
                f"got {before}"
            )

    def gain(self, before: int, size: int) -> float:
        """Return the mean square of an output for inputs of mean square 1.

        Parameters
        ----------
        before, size : int
            Entries of the kernels and of the group.

        Returns
        -------
        float
            ``1 / di²``.
        """
        return float(shape_given(self)[1] ** -2)

    def operations(self, before: int, size: int) -> int:
        """Return how many multiplications `apply` takes.

        Parameters
        ----------
        before, size : int
            Entries of the kernels and of the group.

        Returns
        -------
        int
            One for each entry of the kernels.
        """
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
        block, columns = self.block, shape_given(self)[1]
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
        block, (height, columns) = self.block, shape_given(self)
        blocks = library.reshape(y, (height // block, block, columns // block, block))
        rows = library.transpose(blocks, (0, 2, 1, 3))
        rows = library.concatenate([rows, zeros((*rows.shape[:3], block - 1), like=y)], axis=3)
        copies = library.reshape(rows, (-1, 2 * block - 1, block))
        return library.reshape(library.sum(copies, axis=1), (-1,)) / columns
