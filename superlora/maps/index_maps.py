"""Maps that move entries: they keep, permute, repeat or pick them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy

from superlora._backend import Array, backend_of, ones, scatter_add, take, zeros
from superlora.checks import check_count
from superlora.maps._base import Map, Place
from superlora.maps._seeded import (
    CHECKED,
    CheckedMap,
    SeededMap,
    check_rank,
    freeze_counts,
    joined,
    weight_shape,
)


@dataclass(frozen=True)
class Identity(Map):
    """The map of plain methods: keep the first entries, drop the cover's tail.

    Examples
    --------
    >>> import numpy as np
    >>> Identity().apply(np.arange(6.0), 4)
    array([0., 1., 2., 3.])
    >>> Identity().adjoint(np.ones(4), 6)
    array([1., 1., 1., 1., 0., 0.])
    """

    keeps_size: ClassVar[bool] = True
    keeps_fold: ClassVar[bool] = True
    in_place: ClassVar[bool] = True
    is_identity: ClassVar[bool] = True
    sliced: ClassVar[bool] = True

    def check(self, before: int, size: int) -> None:
        """Refuse a group of more entries than the fold has."""
        if check_count("size", size) > before:
            raise ValueError(f"size must be at most {before}, the entries of x: got {size}")

    def apply(self, x: Array, size: int) -> Array:
        """Return the first `size` entries of `x`."""
        check_rank("x", x)
        self.check(x.shape[0], size)
        return backend_of(x).copy(x[:size])

    def adjoint(self, y: Array, size: int) -> Array:
        """Return `y` followed by zeros."""
        check_rank("y", y)
        if check_count("size", size) < y.shape[0]:
            raise ValueError(f"size must be at least {y.shape[0]}, the entries of y: got {size}")
        x = padded(y, size)
        return backend_of(y).copy(x) if x is y else x


def padded(x: Array, size: int) -> Array:
    """Return a vector followed by as many zeros as it lacks of `size` entries."""
    missing = size - x.shape[0]
    if not missing:
        return x
    return backend_of(x).concatenate([x, zeros((missing,), like=x)], axis=0)


# Entries whose positions are worked out at once where they are not kept.
CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Shuffle(SeededMap):
    """A fixed random permutation, the shuffling of SuperLoRA (Fig. 2 e).

    Parameters
    ----------
    seed : int
        In [0, 2**64).
    shared : bool
        Whether all groups of one size have the same permutation.
    scope : {"group", "all"}
        Whether each group is permuted in itself, or the concatenation of all, so that the
        entries of every weight come from all groups.
    stored : bool
        Whether positions are kept in memory, 8 bytes an entry; else they are worked out anew
        for 2**20 entries at a time, which takes no memory and about 20 ns an entry.
    version, substream : int
        As in every map with a seed.

    Raises
    ------
    TypeError, ValueError
        If a field is out of its range.

    Notes
    -----
    ``y = x[P]``: an isometry. The fold may have more entries than the group; its tail is
    dropped before.

    Examples
    --------
    >>> import numpy as np
    >>> shuffle = Shuffle(seed=0)
    >>> y = shuffle.apply(np.arange(5.0), 5)
    >>> y
    array([0., 4., 2., 3., 1.])
    >>> shuffle.adjoint(y, 5)
    array([0., 1., 2., 3., 4.])
    """

    scope: str = "group"
    stored: bool = True

    keeps_size: ClassVar[bool] = True
    keeps_fold: ClassVar[bool] = True
    sliced: ClassVar[bool] = True
    choices: ClassVar = {"scope": ("group", "all")}

    @property
    def joint(self) -> bool:  # type: ignore[override]
        """Whether it takes all groups together."""
        return self.scope == "all"

    def check(self, before: int, size: int) -> None:
        """Refuse a group of more entries than the fold has."""
        if size > before:
            raise ValueError(f"size must be at most {before}, the entries of x: got {size}")

    def constants(self, before: int, size: int) -> dict[str, numpy.ndarray]:
        """Return the first positions."""
        return {"positions": self._order(size).forward(0, min(size, CHECKED))}

    def nbytes(self, before: int, size: int) -> int:
        """Return how many bytes of positions are kept, both ways."""
        return 2 * size * position_type(size).itemsize if self.stored else 0

    def _forward(self, x: Array, size: int, start: int, stop: int) -> Array:
        return self._taken(x[:size], start, stop, inverse=False)

    def _backward(self, y: Array, before: int) -> Array:
        return padded(self._taken(y, 0, y.shape[0], inverse=True), before)

    def _taken(self, x: Array, start: int, stop: int, inverse: bool) -> Array:
        size = x.shape[0]
        if self.stored:
            return take(x, self.kept(x, "_draw", size, 0, size, inverse)[start:stop])
        parts = []
        for first in range(start, stop, CHUNK):
            last = min(first + CHUNK, stop)
            parts.append(take(x, self.kept(x, "_draw", size, first, last, inverse, keep=False)))
        return joined(parts)

    def _draw(self, size: int, first: int, last: int, inverse: bool) -> numpy.ndarray:
        permutation = self._order(size)
        found = (permutation.inverse if inverse else permutation.forward)(first, last)
        return found.astype(position_type(size))


def position_type(size: int) -> numpy.dtype:
    """Return the smallest type that holds positions below `size`."""
    return numpy.dtype(numpy.int32 if size < 1 << 31 else numpy.int64)


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
    choices: ClassVar = {"along": ("all", "inputs", "outputs")}

    def repeated(self) -> str:
        """Return what the vector is repeated along."""
        return self.along

    def fixed_entries(self, place: Place) -> int:
        """Return how many entries the vector has."""
        rows, columns = weight_shape(self, place)
        return {"all": 1, "inputs": rows, "outputs": columns}[self.along]

    def check(self, before: int, size: int) -> None:
        """Refuse sizes that are no multiples of each other."""
        if size % before:
            raise ValueError(f"size must be a multiple of {before}, the entries of x: got {size}")
        if self.along == "all" and before != 1:
            raise ValueError(f"x must have one entry to be broadcast along all: got {before}")

    def _forward(self, x: Array, size: int, start: int, stop: int) -> Array:
        library = backend_of(x)
        before = x.shape[0]
        if before == 1:
            return x * ones((stop - start,), like=x)
        width = before if self.along == "outputs" else size // before
        first, last = start // width, -(-stop // width)
        if self.along == "outputs":
            rows = x[None] * ones((last - first, 1), like=x)
        else:
            rows = x[first:last, None] * ones((1, width), like=x)
        return library.reshape(rows, (-1,))[start - first * width : stop - first * width]

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
        """Refuse positions beyond the fold, and another number of them than of outputs."""
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
        """Return how many bytes of positions are kept."""
        return 8 * size

    def _forward(self, x: Array, size: int, start: int, stop: int) -> Array:
        return take(x, self.kept(x, "_draw_positions")[start:stop])

    def _backward(self, y: Array, before: int) -> Array:
        return scatter_add(y, self.kept(y, "_draw_positions"), before)

    def _draw_positions(self) -> numpy.ndarray:
        return numpy.array(self.positions)
