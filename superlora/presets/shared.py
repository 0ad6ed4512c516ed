"""Presets whose groups hold many weights: stacks and folds across layers."""

from __future__ import annotations

from typing import Any

from superlora.design.spec import Spec
from superlora.design.spec_checks import Rank, check_choice
from superlora.presets._make import make
from superlora.presets.partly_frozen import vera


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


def metatt(rank: Rank = 8, fold: str | tuple[int, ...] = "stack", **changes: Any) -> Spec:
    """MetaTT (Lopez-Piqueres et al. 2025), in the fold's order: one tensor train of all weights.

    The paper's train runs (inputs, layers, matrices, outputs), this one in the order in which
    the weights lie, (layers, matrices, outputs, inputs): the same kind, another family.

    Parameters
    ----------
    rank : int or tuple of int
        The ranks between the modes, one number or one each.
    fold : "stack" or tuple of int
        ``"stack"`` is (weights, outputs, inputs). Layers, matrices a layer, outputs and inputs
        is the paper's 4-D form, with the outputs as heads and entries of a head its 5-D form.
    **changes : Any
        Other fields of the spec.

    Returns
    -------
    Spec
        ``r L + r**2 do + r di`` parameters for a stack of L weights, which must be of one
        shape: ``ΔW_l = s sum_a G_0[l, a] G_1[a] G_2``. Between outputs and layers
        `lotr` has the paper's order, with a matrix of its own for each weight.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.metatt(rank=2), {"0.q": (6, 4), "1.q": (6, 4)}).num_parameters
    36
    """
    order = 3 if isinstance(fold, str) else len(fold)
    return make(changes, rank=rank, order=order, groups=1, fold=fold, core="train")


def tenslora(rank: Rank = 8, *, fold: tuple[int, ...], **changes: Any) -> Spec:
    """TensLoRA (Marmoret et al. 2025): a Tucker factorisation of the weights by depth and kind.

    Parameters
    ----------
    rank : int or tuple of int
        The rank of every mode, or one each. A mode of a smaller size than an integer is
        left un-factored.
    fold : tuple of int
        Layers, matrices a layer, outputs and inputs, or any other modes of all weights in
        order, layer by layer: QKV_Depth in the paper's names, with heads Att_QKV_Depth.
    **changes : Any
        Other fields of the spec.

    Returns
    -------
    Spec
        ``prod_m r_m + sum_m r_m D_m`` parameters for all weights.

    Examples
    --------
    >>> import superlora as sl
    >>> shapes = {f"{layer}.{part}": (6, 4) for layer in range(4) for part in "qkv"}
    >>> sl.Plan(sl.tenslora(rank=2, fold=(4, 3, 6, 4)), shapes).num_parameters
    50
    """
    return make(changes, rank=rank, order=len(fold), groups=1, fold=fold, core="full")


def share_lora(rank: int = 8, which: str = "A", **changes: Any) -> Spec:
    """ShareLoRA (Song et al. 2024): LoRA whose A, or B, is one for all weights.

    Parameters
    ----------
    rank : int
        The inner dimension r.
    which : {"A", "B", "AB"}
        What is shared; with both all updates are one, but for the weights' shapes.
    **changes : Any
        Other fields of the spec. Weights with `overrides` of their own share among themselves,
        as the paper's queries, keys and values do.

    Returns
    -------
    Spec
        ``r (L do + di)``, ``r (do + L di)`` or ``r (do + di)`` parameters for L weights of
        one shape; a smaller weight takes the leading rows of a shared matrix.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.share_lora(rank=2), {"0.q": (6, 4), "1.q": (6, 4)}).num_parameters
    32
    """
    check_choice("which", which, ("A", "B", "AB"))
    tied = [f"0.factor{'BA'.index(side)}" for side in which]
    return make(changes, rank=rank, tied=tied, dense_from="never")


def tied_lora(rank: int = 8, **changes: Any) -> Spec:
    """Tied-LoRA (Renduchintala et al. 2024): ``ΔW = s diag(v) B diag(u) A``, B and A for all.

    Parameters
    ----------
    rank : int
        The inner dimension r.
    **changes : Any
        Other fields of the spec.

    Returns
    -------
    Spec
        ``r (do + di) + L (r + do)`` parameters for L weights of one shape: u and v are each
        weight's own. What `vera` is with frozen B and A. v starts at zero, not B.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.tied_lora(rank=2), {"0.q": (6, 4), "1.q": (6, 4)}).num_parameters
    36
    """
    return vera(rank, **{"frozen": {"1.factor1": "ones"}, **changes})
