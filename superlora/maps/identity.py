"""The map of plain methods, which changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from superlora._backend import Array, backend_of, zeros
from superlora.maps._base import Map
from superlora.values import check_count


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
    sliced: ClassVar[bool] = True

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
        if check_count("size", size) > before:
            raise ValueError(f"size must be at most {before}, the entries of x: got {size}")

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
        TypeError
            If `size` is not an integer.
        ValueError
            If `x` is not a vector, or has fewer than `size` entries.
        """
        _check_rank("x", x)
        self.check(x.shape[0], size)
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
        TypeError
            If `size` is not an integer.
        ValueError
            If `y` is not a vector, or has more than `size` entries.
        """
        _check_rank("y", y)
        if check_count("size", size) < y.shape[0]:
            raise ValueError(f"size must be at least {y.shape[0]}, the entries of y: got {size}")
        return padded(y, size)


def _check_rank(name: str, array: Array) -> None:
    if len(array.shape) != 1:
        raise ValueError(f"{name} must be a vector of entries: got shape {tuple(array.shape)}")


def padded(x: Array, size: int) -> Array:
    """Return a vector followed by as many zeros as it lacks of `size` entries."""
    missing = size - x.shape[0]
    if not missing:
        return x
    return backend_of(x).concatenate([x, zeros((missing,), like=x)], axis=0)
