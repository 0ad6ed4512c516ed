"""Presets of one group a weight: dense, low rank, Kronecker and Hadamard products."""

from __future__ import annotations

from typing import Any

from superlora.design.spec import Spec
from superlora.design.spec_checks import Rank
from superlora.presets._make import make, refuse_rank


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
    refuse_rank("dense", changes)
    return make(changes, rank="full", order=1)


def lora(rank: int = 8, rslora: bool = False, **changes: Any) -> Spec:
    """LoRA (Hu et al. 2021): ``ΔW = s A_1 A_2ᵀ`` for each weight.

    Parameters
    ----------
    rank : int
        The inner dimension r; ``A_1`` is LoRA's B, ``A_2ᵀ`` its A.
    rslora : bool
        Whether the scale is ``alpha / sqrt(r)`` (Kalajdzievski 2023) instead of
        ``alpha / r``.
    **changes : Any
        Other fields of the spec, such as ``alpha=16``.

    Returns
    -------
    Spec
        ``r (do + di)`` parameters a weight.

    Raises
    ------
    ValueError
        If `rslora` is given without alpha.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.lora(rank=2), {"q": (6, 4)}).num_parameters
    20
    """
    return make(changes, rank=rank, rslora=rslora)


def lokr(
    rank: int = 8, decompose_both: bool = False, factor: int | None = None, **changes: Any
) -> Spec:
    """LoKr (Yeh et al. 2024): ``ΔW = s X_1 ⊗ (A_1 A_2ᵀ)`` for each weight.

    Parameters
    ----------
    rank : int
        The inner dimension r of the second split, which is dense from half of its
        larger mode on, as in PEFT and LyCORIS.
    decompose_both : bool
        Whether the first split is of rank r too; by default it is dense.
    factor : int, optional
        Bound on the mode sizes of the first split; balanced by default. As in
        LyCORIS the first split is the smaller one, and one number for two prime widths.
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
    return make(changes, rank=(first, rank), splits=2, first_split=factor, dense_from="half")


def loha(rank: int = 8, **changes: Any) -> Spec:
    """LoHa (Hyeon-Woo et al. 2022, FedPara): ``ΔW = s (A_1 A_2ᵀ) ∘ (A_3 A_4ᵀ)``.

    Parameters
    ----------
    rank : int
        The inner dimension r of both products; the rank of ΔW is up to ``r ** 2``.
    **changes : Any
        Other fields of the spec.

    Returns
    -------
    Spec
        ``2 r (do + di)`` parameters a weight.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.loha(rank=2), {"q": (6, 4)}).num_parameters
    40
    """
    return make(changes, rank=rank, splits=2, combine="hadamard")


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
    refuse_rank("krona", changes)
    return make(changes, rank="full", splits=2)


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
    return make(changes, rank=rank, splits=splits)


def tt_lora(rank: Rank = 8, order: int = 4, **changes: Any) -> Spec:
    """TT-LoRA (Anjum et al. 2024): a tensor train of each weight's outputs and inputs in digits.

    Parameters
    ----------
    rank : int or tuple of int
        The ranks between the modes, one number or one each.
    order : int
        The number M of modes: the outputs have the first half of them, the inputs the others.
    **changes : Any
        Other fields of the spec, such as the sizes of the modes: ``fold=(12, 64, 64, 12)``.

    Returns
    -------
    Spec
        ``r D_1 + r**2 (D_2 + … + D_{M-1}) + r D_M`` parameters a weight, where the sizes
        allow r on either side.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.tt_lora(rank=2), {"q": (6, 4)}).num_parameters
    28
    """
    return make(changes, rank=rank, order=order, core="train")
