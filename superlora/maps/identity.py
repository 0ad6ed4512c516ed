"""The map of plain methods, which changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from superlora._backend import Array, backend_of, zeros
from superlora.maps._base import Map


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
    sliced: ClassVar[bool] = True

    def apply(self, x: Array, size: int) -> Array:
        """Return the first `size` entries of `x`.

        Parameters
        ----------
        x : array, (before,)
            At least `size` entries.
        size : int
            Entries to keep.

        Returns
        -------
        array, (size,)
            A slice of `x`.

        Raises
        ------
        ValueError
            If `x` has fewer than `size` entries.
        """
        if x.shape[0] < size:
            raise ValueError(f"size must be at most {x.shape[0]}, the entries of x: got {size}")
        return x[:size]

    def adjoint(self, y: Array, size: int) -> Array:
        """Return `y` followed by zeros.

        Parameters
        ----------
        y : array, (after,)
            At most `size` entries.
        size : int
            Entries of the result.

        Returns
        -------
        array, (size,)
            Same library, dtype and device as `y`.

        Raises
        ------
        ValueError
            If `y` has more than `size` entries.
        """
        if size < y.shape[0]:
            raise ValueError(f"size must be at least {y.shape[0]}, the entries of y: got {size}")
        return padded(y, size)


def padded(x: Array, size: int) -> Array:
    """Return a vector followed by as many zeros as it lacks of `size` entries."""
    missing = size - x.shape[0]
    if not missing:
        return x
    return backend_of(x).concatenate([x, zeros((missing,), like=x)], axis=0)
