"""Presets with frozen blocks: random matrices, or singular vectors of the weight."""

from __future__ import annotations

from typing import Any

from superlora.design.spec import Spec
from superlora.presets._make import make


def lora_fa(rank: int = 8, **changes: Any) -> Spec:
    """LoRA-FA (Zhang et al. 2023): LoRA whose A is random and frozen.

    Parameters
    ----------
    rank : int
        The inner dimension r.
    **changes : Any
        Other fields of the spec, such as the ``seed`` of the frozen blocks.

    Returns
    -------
    Spec
        ``r do`` parameters a weight.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.lora_fa(rank=2), {"q": (6, 4)}).num_parameters
    12
    """
    return make(changes, rank=rank, frozen={"0.factor1": "random"})


def vera(rank: int = 256, **changes: Any) -> Spec:
    """VeRA (Kopiczko et al. 2024): ``ΔW = s diag(b) B diag(d) A``, all but b and d frozen.

    Parameters
    ----------
    rank : int
        The inner dimension r.
    **changes : Any
        Other fields of the spec, such as the ``seed`` of the frozen blocks.

    Returns
    -------
    Spec
        ``r + do`` parameters a weight: the Hadamard product of B diag(d) A, a CP
        tensor whose random factors all weights share, and of ``b 1ᵀ``.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.vera(rank=2), {"q": (6, 4)}).num_parameters
    8
    """
    return make(
        changes,
        rank=((rank, rank), (1, 1)),
        splits=2,
        combine="hadamard",
        core=("diagonal", "identity"),
        frozen={"0.factor0": "random", "0.factor1": "random", "1.factor1": "ones"},
        tied=("0.factor0", "0.factor1"),
    )


def lora_xs(rank: int = 8, **changes: Any) -> Spec:
    """LoRA-XS (Bałazy et al. 2024): ``ΔW = s U_r Σ_r C V_rᵀ`` with a trainable core C.

    Parameters
    ----------
    rank : int
        How many leading singular vectors of the weight are taken.
    **changes : Any
        Other fields of the spec.

    Returns
    -------
    Spec
        ``r ** 2`` parameters a weight.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.lora_xs(rank=2), {"q": (6, 4)}).num_parameters
    4
    """
    frozen = {"0.factor0": "singular_scaled", "0.factor1": "singular"}
    return make(changes, rank=rank, core="full", frozen=frozen)


def tinylora(rank: int = 2, projections: int = 64, **changes: Any) -> Spec:
    """TinyLoRA (2026): ``ΔW = s U_r √Σ_r (sum_i v_i P_i) √Σ_r V_rᵀ``, v alone trainable.

    Parameters
    ----------
    rank : int
        How many leading singular vectors of the weight are taken.
    projections : int
        The number u of random matrices P_i, and of entries of v.
    **changes : Any
        Other fields of the spec; ``tied=["0.factor0"]`` for one v for all weights.

    Returns
    -------
    Spec
        ``u`` parameters a weight. The frozen core (u, r, r) holds the P_i.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.tinylora(projections=5), {"q": (6, 4)}).num_parameters
    5
    """
    ranks = (projections, rank, rank)
    frozen = {"0.core": "random", "0.factor1": "singular_root", "0.factor2": "singular_root"}
    return make(changes, rank=ranks, order=3, fold="stack", core="full", frozen=frozen)
