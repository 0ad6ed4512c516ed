"""Presets whose groups hold many weights: stacks and folds across layers."""

from __future__ import annotations

from typing import Any

from superlora.presets._make import make
from superlora.spec import Spec


def lotr(rank: int = 16, **changes: Any) -> Spec:
    """LoTR (Bershatsky et al. 2024), which is FacT-TT (Jie and Deng 2023).

    Parameters
    ----------
    rank : int
        The rank r of the input and of the output mode.
    **changes : Any
        Other fields of the spec.

    Returns
    -------
    Spec
        One stack (L, do, di) of all weights, which must be of one shape; the
        layer mode is un-factored: ``ΔW_l = s A_2 C_l A_3ᵀ``, of ``L r**2 + r (do +
        di)`` parameters.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.lotr(rank=2), {"0.q": (6, 4), "1.q": (6, 4)}).num_parameters
    28
    """
    return make(changes, rank=("full", rank, rank), order=3, groups=1, fold="stack")


def fact_tt(rank: int = 16, **changes: Any) -> Spec:
    """FacT-TT (Jie and Deng 2023): the same family as `lotr`.

    Parameters
    ----------
    rank : int
        The rank r of the input and of the output mode.
    **changes : Any
        Other fields of the spec.

    Returns
    -------
    Spec
        What `lotr` returns.
    """
    return lotr(rank, **changes)


def fact_tk(rank: int = 16, **changes: Any) -> Spec:
    """FacT-TK (Jie and Deng 2023): a Tucker factorisation of the stack of weights.

    Parameters
    ----------
    rank : int
        The rank r of all three modes; a stack of fewer layers is left un-factored
        in its layer mode.
    **changes : Any
        Other fields of the spec.

    Returns
    -------
    Spec
        ``r**3 + r (L + do + di)`` parameters for all weights, which must be of
        one shape.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.fact_tk(rank=2), {"0.q": (6, 4), "1.q": (6, 4)}).num_parameters
    32
    """
    return make(changes, rank=rank, order=3, groups=1, fold="stack", core="full")


def lorta(rank: int = 8, order: int = 3, groups: str | int = 1, **changes: Any) -> Spec:
    """LoRTA (SuperLoRA): a Tucker factorisation of a balanced fold of many weights.

    Not the CP model of Hounie et al. 2024, which has the same name.

    Parameters
    ----------
    rank : int
        The rank r of every mode.
    order : int
        The number M of modes, more than two.
    groups : {"weight", "layer"} or int
        How many tensors share all updates.
    **changes : Any
        Other fields of the spec.

    Returns
    -------
    Spec
        ``r**M + r sum_m D_m`` parameters a group.

    Examples
    --------
    >>> import superlora as sl
    >>> shapes = {f"blocks.{i}.{part}": (768, 768) for i in range(12) for part in "qv"}
    >>> sl.Plan(sl.lorta(rank=5), shapes).num_parameters
    3765
    """
    return make(changes, rank=rank, order=order, groups=groups, fold="balanced")


def lorta_cp(rank: int = 8, *, fold: tuple[int, int, int, int, int], **changes: Any) -> Spec:
    """LoRTA (Hounie et al. 2024): one CP decomposition of all weights.

    Parameters
    ----------
    rank : int
        The CP rank r.
    fold : tuple of five int
        Layers, matrices a layer, heads, entries of a head, input width: the weights
        in order, layer by layer, each with the heads along its outputs.
    **changes : Any
        Other fields of the spec.

    Returns
    -------
    Spec
        ``r`` times the sum of `fold` parameters for all weights.

    Examples
    --------
    >>> import superlora as sl
    >>> shapes = {f"{layer}.{part}": (6, 4) for layer in range(3) for part in "qv"}
    >>> sl.Plan(sl.lorta_cp(rank=2, fold=(3, 2, 3, 2, 4)), shapes).num_parameters
    28
    """
    return make(changes, rank=rank, order=5, groups=1, fold=fold, core="identity")
