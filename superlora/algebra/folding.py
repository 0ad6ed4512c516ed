"""Fold a group's vector to a tensor of M modes, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence

from superlora._backend import Array, backend_of
from superlora.checks import check_count
from superlora.maps import Identity


def fold_group(vector: Array, fold: Sequence[int]) -> Array:
    """Fold a vector to a tensor, row-major, with zeros beyond its end.

    Not TensorLy's ``fold``, which undoes a mode-n unfolding.

    Parameters
    ----------
    vector : array, (size,)
        A group's entries.
    fold : sequence of int
        Mode sizes ``D_1 … D_M`` whose product is at least ``size``.

    Returns
    -------
    array, (D_1, …, D_M)
        Same library, dtype and device as `vector`.

    Raises
    ------
    ValueError
        If `vector` is not one, or the fold does not cover it.

    Examples
    --------
    >>> import numpy as np
    >>> fold_group(np.arange(5.0), (2, 3))
    array([[0., 1., 2.],
           [3., 4., 0.]])
    """
    library = backend_of(vector)
    if len(vector.shape) != 1:
        raise ValueError(f"vector must have one mode: got shape {tuple(vector.shape)}")
    covered = math.prod(check_count(f"fold[{mode}]", size) for mode, size in enumerate(fold))
    if covered < vector.shape[0]:
        raise ValueError(
            f"fold must cover the vector: expected at least {vector.shape[0]} entries, got "
            f"{tuple(fold)} with {covered}"
        )
    return library.reshape(Identity().adjoint(vector, covered), tuple(fold))


def unfold_group(tensor: Array, size: int) -> Array:
    """Ravel a tensor row-major and keep its first `size` entries.

    Parameters
    ----------
    tensor : array, (D_1, …, D_M)
        A folded group.
    size : int
        Entries of the group.

    Returns
    -------
    array, (size,)
        Same library, dtype and device as `tensor`.

    Raises
    ------
    ValueError
        If the tensor has fewer than `size` entries.

    Examples
    --------
    >>> import numpy as np
    >>> unfold_group(np.arange(6.0).reshape(2, 3), 5)
    array([0., 1., 2., 3., 4.])
    """
    return Identity().apply(ravel(tensor), check_count("size", size, least=0))


def ravel(tensor: Array) -> Array:
    """Return the entries of `tensor` in row-major order."""
    return backend_of(tensor).reshape(tensor, (math.prod(tensor.shape),))
