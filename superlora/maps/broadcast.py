"""Maps that repeat entries, and that pick them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy

from superlora._backend import Array, backend_of, ones, scatter_add, take
from superlora.maps._base import Place
from superlora.maps._seeded import CheckedMap
from superlora.maps._shaped import freeze_counts, weight_shape


@dataclass(frozen=True, kw_only=True)
class Broadcast(CheckedMap):
    """One number for a whole weight, for each of its outputs, or for each of its inputs.

    Parameters
    ----------
    along : {"all", "inputs", "outputs"}
        What an entry is repeated along: everything (one scalar), the inputs (a vector of one
        entry an output, each row constant), or the outputs (one entry an input).

    Raises
    ------
    ValueError
        If `along` is none of them.

    Notes
    -----
    ``y = v ⊗ 1`` or ``1 ⊗ v``. In a plan the fold is the vector, whatever the spec's ratio; the
    group must be one whole weight.

    Examples
    --------
    >>> import numpy as np
    >>> Broadcast(along="inputs").apply(np.array([1.0, 2.0]), 6)
    array([1., 1., 1., 2., 2., 2.])
    >>> Broadcast(along="outputs").apply(np.array([1.0, 2.0]), 6)
    array([1., 2., 1., 2., 1., 2.])
    """

    along: str = "all"

    sliced: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.along not in ("all", "inputs", "outputs"):
            raise ValueError(
                f"along must be one of ('all', 'inputs', 'outputs'): got {self.along!r}"
            )

    def fixed_entries(self, place: Place) -> int:
        """Return how many entries the vector has.

        Parameters
        ----------
        place : Place
            The group and the weights in it.

        Returns
        -------
        int
            1, the output width or the input width.

        Raises
        ------
        ValueError
            If the group is not one whole weight.
        """
        rows, columns = weight_shape(self, place)
        return {"all": 1, "inputs": rows, "outputs": columns}[self.along]

    def check(self, before: int, size: int) -> None:
        """Refuse sizes that are no multiples of each other.

        Parameters
        ----------
        before, size : int
            Entries of the vector and of the group.

        Raises
        ------
        ValueError
            If the entries cannot be repeated to `size`, or a scalar is not one entry.
        """
        if size % before:
            raise ValueError(f"size must be a multiple of {before}, the entries of x: got {size}")
        if self.along == "all" and before != 1:
            raise ValueError(f"x must have one entry to be broadcast along all: got {before}")

    def _forward(self, x: Array, size: int, start: int, stop: int) -> Array:
        library = backend_of(x)
        before = x.shape[0]
        if before == 1:
            return x * ones((stop - start,), like=x)
        each = size // before
        if self.along == "outputs":
            first, last = start // before, -(-stop // before)
            rows = x[None] * ones((last - first, 1), like=x)
            return library.reshape(rows, (-1,))[start - first * before : stop - first * before]
        first, last = start // each, -(-stop // each)
        columns = x[first:last, None] * ones((1, each), like=x)
        return library.reshape(columns, (-1,))[start - first * each : stop - first * each]

    def _backward(self, y: Array, before: int) -> Array:
        library = backend_of(y)
        if self.along == "outputs":
            return library.sum(library.reshape(y, (-1, before)), axis=0)
        return library.sum(library.reshape(y, (before, -1)), axis=1)


@dataclass(frozen=True, kw_only=True)
class Selection(CheckedMap):
    """Entries at positions that are given one by one.

    Parameters
    ----------
    positions : tuple of int
        Where each output comes from; as many as the group has entries.

    Raises
    ------
    TypeError, ValueError
        If they are not integers of at least 0.

    Notes
    -----
    ``y_i = x_positions[i]``. The entries ``i (rows + 1)``, ``j (columns + 1)`` of a Kronecker
    product of two matrices are their Hadamard product. The positions are a part of the spec and
    of its file: this map is for small things.

    Examples
    --------
    >>> import numpy as np
    >>> Selection(positions=(2, 0, 2)).apply(np.array([1.0, 2.0, 3.0]), 3)
    array([3., 1., 3.])
    """

    positions: tuple[int, ...]

    sliced: ClassVar[bool] = True

    def __post_init__(self) -> None:
        freeze_counts(self, "positions", least=0)

    def check(self, before: int, size: int) -> None:
        """Refuse positions beyond the fold, and another number of them than of outputs.

        Parameters
        ----------
        before, size : int
            Entries of the fold and of the group.

        Raises
        ------
        ValueError
            If it is so.
        """
        if len(self.positions) != size:
            raise ValueError(
                f"positions must be {size}, one for each entry of the group: got "
                f"{len(self.positions)}"
            )
        if max(self.positions) >= before:
            raise ValueError(
                f"positions must be below {before}, the entries of the fold: got "
                f"{max(self.positions)}"
            )

    def nbytes(self, before: int, size: int) -> int:
        """Return how many bytes of positions are kept.

        Parameters
        ----------
        before, size : int
            Entries of the fold and of the group.

        Returns
        -------
        int
            8 a position.
        """
        return 8 * size

    def _forward(self, x: Array, size: int, start: int, stop: int) -> Array:
        return take(x, self.kept(x, "_draw_positions")[start:stop])

    def _backward(self, y: Array, before: int) -> Array:
        return scatter_add(y, self.kept(y, "_draw_positions"), before)

    def _draw_positions(self) -> numpy.ndarray:
        return numpy.array(self.positions)
