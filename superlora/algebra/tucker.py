"""Tucker and CP reconstruction from a core and plane factors."""

from __future__ import annotations

from collections.abc import Sequence

from superlora._backend import Array, backend_of
from superlora.algebra.contract import run
from superlora.design.contraction import contract


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
    order = len(factors)
    shared = core is None or len(core.shape) == 1 < order
    _check(core, factors, shared)
    if core is None and order == 1:  # the rank is in no other array
        return library.sum(factors[0], axis=1)
    # Labels of modes come first; those of ranks follow, one for all where the core is diagonal.
    ranks = [order if shared else mode if own is None else order + mode
             for mode, own in enumerate(factors)]  # fmt: skip
    operands = [] if core is None else [tuple(ranks[:1] if shared else ranks)]
    operands += [(mode, ranks[mode]) for mode, own in enumerate(factors) if own is not None]
    sizes = {
        label: size
        for labels, array in zip(operands, arrays, strict=True)
        for label, size in zip(labels, array.shape, strict=True)
    }
    if len(arrays) == 1 and len(operands[0]) == order:  # all modes un-factored
        return library.copy(arrays[0])
    return run(contract(operands, tuple(range(order)), sizes), arrays)


def _check(core: Array | None, factors: Sequence[Array | None], shared: bool) -> None:
    if core is not None and not shared and len(core.shape) != len(factors):
        raise ValueError(
            f"factors must hold one factor for each of {len(core.shape)} modes of core: got "
            f"{len(factors)}"
        )
    rank = None
    for mode, factor in enumerate(factors):
        if factor is None:
            if shared:
                kind = "None" if core is None else "diagonal"
                raise ValueError(f"factors[{mode}] must be an array where core is {kind}: got None")
            continue
        if len(factor.shape) != 2:
            raise ValueError(
                f"factors[{mode}] must have two modes (size, rank): got shape {tuple(factor.shape)}"
            )
        if core is not None:
            rank = core.shape[0 if shared else mode]
        elif rank is None:
            rank = factor.shape[1]
        if factor.shape[1] != rank:
            raise ValueError(
                f"factors[{mode}] must have rank {rank} in mode {mode}: got shape "
                f"{tuple(factor.shape)}"
            )
