"""Tucker and CP reconstruction from a core and plane factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from superlora._backend import Array, backend_of


def tucker(core: Array | None, factors: Sequence[Array | None]) -> Array:
    """Multiply a core by a factor in every mode.

    Parameters
    ----------
    core : array, (r_1, …, r_M), or None
        None is the superdiagonal core of ones: the sum of rank-one terms (CP),
        for M = 2 the product ``A_1 A_2ᵀ`` of LoRA. A vector (r,) beside M > 1
        factors is a superdiagonal core of these numbers.
    factors : sequence of M arrays (d_m, r_m), or None
        None leaves that mode un-factored: ``A_m`` is the identity, d_m = r_m.

    Returns
    -------
    array, (d_1, …, d_M)
        ``C x_1 A_1 … x_M A_M``, of the library, dtype and device given.

    Raises
    ------
    TypeError
        If the arrays are of different libraries.
    ValueError
        If there are not M factors, or a factor has the wrong rank.

    Notes
    -----
    The bracket of [1]_, Section 2. ``vec`` of the result, row-major, is
    ``(A_1 ⊗ … ⊗ A_M) vec(C)``.

    References
    ----------
    .. [1] X. Chen et al., "SuperLoRA: Parameter-Efficient Unified Adaptation for
       Large Vision Models", 2024.

    Examples
    --------
    >>> import numpy as np
    >>> tucker(None, [np.ones((2, 3)), np.ones((4, 3))]).shape
    (2, 4)
    >>> tucker(np.ones((2, 3)), [np.eye(2), None])
    array([[1., 1., 1.],
           [1., 1., 1.]])
    """
    if not factors:
        raise ValueError("factors must hold one factor a mode: got none")
    arrays = [array for array in (core, *factors) if array is not None]
    library = backend_of(*arrays)
    _check(core, factors)
    if core is None:
        return _canonical(library, arrays)
    if _is_diagonal(core, factors):
        return _canonical(library, [arrays[1] * core, *arrays[2:]])
    return _multiply_modes(library, core, factors)


def _multiply_modes(
    library: Any, tensor: Array, factors: Sequence[Array | None], after: int = 0
) -> Array:
    # From the last mode on, each put in front, so that the last and largest product is in order;
    # the axes `after` those of the factors stay behind.
    axis = len(factors) - 1
    front = (axis, *range(axis), *range(axis + 1, axis + 1 + after))
    for factor in reversed(factors):
        if factor is None:
            tensor = library.transpose(tensor, front)
        else:
            tensor = library.tensordot(factor, tensor, axes=([1], [axis]))
    return tensor


def _canonical(library: Any, factors: list[Array]) -> Array:
    *leading, last = factors
    if not leading:
        return library.sum(last, axis=1)
    return library.tensordot(khatri_rao(leading), last, axes=([len(leading)], [1]))


def khatri_rao(factors: Sequence[Array]) -> Array:
    """Return the rank-one terms of a CP tensor, not yet summed.

    Parameters
    ----------
    factors : sequence of arrays (d_m, r)
        At least one.

    Returns
    -------
    array, (d_1, …, d_M, r)
        ``prod_m A_m[i_m, j]`` at ``[i_1, …, i_M, j]``.
    """
    terms = factors[0]
    for factor in factors[1:]:
        terms = terms[..., None, :] * factor
    return terms


def open_last_mode(core: Array | None, factors: Sequence[Array | None]) -> Array:
    """Reconstruct all modes but the last, whose rank index stays open.

    Parameters
    ----------
    core : array, (r_1, …, r_M), or None
        As in `tucker`.
    factors : sequence of M - 1 arrays (d_m, r_m), or None
        The factors of all modes but the last.

    Returns
    -------
    array, (d_1, …, d_{M-1}, r_M)
        Multiplied by the last factor in its last mode this is `tucker`.
    """
    if core is None:
        return khatri_rao([factor for factor in factors if factor is not None])
    if len(core.shape) == 1 and factors:
        return khatri_rao([factor for factor in factors if factor is not None]) * core
    library = backend_of(core, *(factor for factor in factors if factor is not None))
    return _multiply_modes(library, core, factors, after=1)


def _is_diagonal(core: Array, factors: Sequence[Array | None]) -> bool:
    return len(core.shape) == 1 < len(factors)


def _check(core: Array | None, factors: Sequence[Array | None]) -> None:
    diagonal = core is not None and _is_diagonal(core, factors)
    if core is not None and not diagonal and len(core.shape) != len(factors):
        raise ValueError(
            f"factors must hold one factor for each of {len(core.shape)} modes of core: got "
            f"{len(factors)}"
        )
    rank = None
    for mode, factor in enumerate(factors):
        if factor is None:
            if core is None or diagonal:
                kind = "None" if core is None else "diagonal"
                raise ValueError(f"factors[{mode}] must be an array where core is {kind}: got None")
            continue
        if len(factor.shape) != 2:
            raise ValueError(
                f"factors[{mode}] must have two modes (size, rank): got shape {tuple(factor.shape)}"
            )
        if core is not None:
            rank = core.shape[0 if diagonal else mode]
        elif rank is None:
            rank = factor.shape[1]
        if factor.shape[1] != rank:
            raise ValueError(
                f"factors[{mode}] must have rank {rank} in mode {mode}: got shape "
                f"{tuple(factor.shape)}"
            )
