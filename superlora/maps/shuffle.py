"""A fixed permutation of a group's entries, or of all groups'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy

from superlora._backend import Array, take
from superlora.maps._seeded import CHECKED, ORDERS, SeededMap, joined
from superlora.maps.identity import padded
from superlora.permutations import Permutation

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
        """Refuse a group of more entries than the fold has.

        Parameters
        ----------
        before, size : int
            Entries of the fold and of the group.

        Raises
        ------
        ValueError
            If it is so.
        """
        if size > before:
            raise ValueError(f"size must be at most {before}, the entries of x: got {size}")

    def constants(self, before: int, size: int) -> dict[str, numpy.ndarray]:
        """Return the first positions.

        Parameters
        ----------
        before, size : int
            Entries of the fold and of the group.

        Returns
        -------
        dict of str to numpy.ndarray
            At most 4096 of them.
        """
        return {"positions": self._permutation(size).forward(0, min(size, CHECKED))}

    def nbytes(self, before: int, size: int) -> int:
        """Return how many bytes of positions are kept, both ways.

        Parameters
        ----------
        before, size : int
            Entries of the fold and of the group.

        Returns
        -------
        int
            0 where they are not kept.
        """
        return 2 * size * position_type(size).itemsize if self.stored else 0

    def _permutation(self, size: int) -> Permutation:
        return Permutation(self.seed, self._stream(ORDERS), size)

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
        permutation = self._permutation(size)
        found = (permutation.inverse if inverse else permutation.forward)(first, last)
        return found.astype(position_type(size))


def position_type(size: int) -> numpy.dtype:
    """Return the smallest type that holds positions below `size`."""
    return numpy.dtype(numpy.int32 if size < 1 << 31 else numpy.int64)
