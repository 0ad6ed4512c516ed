"""Named methods as points of the design space: each returns a `Spec`, nothing else."""

from __future__ import annotations

from typing import Any

from superlora.spec import Rank, Spec


def dense(**changes: Any) -> Spec:
    """Dense fine-tuning: one un-factored vector a weight.

    Parameters
    ----------
    **changes : Any
        Other fields of the spec.

    Returns
    -------
    Spec
        ``do * di`` parameters a weight (SuperLoRA, Table 1: M = 1, C = I).

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.dense(), {"q": (6, 4)}).num_parameters
    24
    """
    _refuse_rank("dense", changes)
    return _preset(changes, rank="full", order=1)


def lora(rank: int = 8, **changes: Any) -> Spec:
    """LoRA (Hu et al. 2021): ``ΔW = s A_1 A_2ᵀ`` for each weight.

    Parameters
    ----------
    rank : int
        The inner dimension r; ``A_1`` is LoRA's B, ``A_2ᵀ`` its A.
    **changes : Any
        Other fields of the spec, such as ``alpha=16``.

    Returns
    -------
    Spec
        ``r (do + di)`` parameters a weight.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.lora(rank=2), {"q": (6, 4)}).num_parameters
    20
    """
    return _preset(changes, rank=rank)


def lokr(rank: int = 8, decompose_both: bool = False, **changes: Any) -> Spec:
    """LoKr (Yeh et al. 2024): ``ΔW = s X_1 ⊗ (A_1 A_2ᵀ)`` for each weight.

    Parameters
    ----------
    rank : int
        The inner dimension r of the second split.
    decompose_both : bool
        Whether the first split is of rank r too; by default it is dense.
    **changes : Any
        Other fields of the spec.

    Returns
    -------
    Spec
        ``do1 di1 + r (do2 + di2)`` parameters a weight, by default.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.lokr(rank=1), {"q": (6, 4)}).num_parameters
    9
    """
    first: Rank = rank if decompose_both else "full"
    return _preset(changes, rank=(first, rank), splits=2)


def krona(**changes: Any) -> Spec:
    """KronA (Edalati et al. 2022): ``ΔW = s X_1 ⊗ X_2`` with two dense splits.

    Parameters
    ----------
    **changes : Any
        Other fields of the spec.

    Returns
    -------
    Spec
        ``do1 di1 + do2 di2`` parameters a weight.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.krona(), {"q": (6, 4)}).num_parameters
    10
    """
    _refuse_rank("krona", changes)
    return _preset(changes, rank="full", splits=2)


def lonkr(rank: int = 2, splits: int = 3, **changes: Any) -> Spec:
    """LoNKr (SuperLoRA): a Kronecker product of K low-rank matrices.

    Parameters
    ----------
    rank : int
        The inner dimension of every split; a split smaller than it is dense.
    splits : int
        The number K of factors, more than two.
    **changes : Any
        Other fields of the spec; ``groups=1, fold="balanced"`` for the group-wise form.

    Returns
    -------
    Spec
        ``sum_k r (do_k + di_k)`` parameters a weight; its rank is ``r ** K``.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.lonkr(rank=1), {"q": (8, 8)}).num_parameters
    12
    """
    return _preset(changes, rank=rank, splits=splits)


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
    return _preset(changes, rank=("full", rank, rank), order=3, groups=1, fold="stack")


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
    return _preset(changes, rank=rank, order=3, groups=1, fold="stack", core="full")


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
    return _preset(changes, rank=rank, order=order, groups=groups, fold="balanced")


def _preset(changes: dict[str, Any], **fields: Any) -> Spec:
    return Spec(**{**fields, **changes})


def _refuse_rank(preset: str, changes: dict[str, Any]) -> None:
    if "rank" in changes:
        raise TypeError(
            f"{preset}() must have no rank, its splits are dense: got {changes['rank']}"
        )
