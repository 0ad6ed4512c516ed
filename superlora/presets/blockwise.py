"""Presets of designed blocks: a weight's outputs and inputs in digits of chosen sizes."""

from __future__ import annotations

from typing import Any

from superlora.checks import check_count
from superlora.design.spec import Spec
from superlora.presets._make import by_rank, make, refuse_rank


def gralora(rank: int = 32, blocks: int = 2, **changes: Any) -> Spec:
    """GraLoRA (Jung et al. 2025): every of k x k blocks of ΔW has a low rank of its own.

    Parameters
    ----------
    rank : int
        The rank r of a LoRA of as many parameters; each block has rank ``r / k``.
    blocks : int
        The number k of blocks along the outputs and along the inputs.
    **changes : Any
        Other fields of the spec; ``alpha`` is divided by `rank`.

    Returns
    -------
    Spec
        ``r (do + di)`` parameters a weight: a sum of ``r / k`` Hadamard products of order 4,
        ``ΔW[(j, o), (n, i)] = s sum_t B_t[j, o, n] A_t[j, n, i]``. Both widths must be
        multiples of k, and ``r / k`` is 16 at most.

    Raises
    ------
    ValueError
        If `rank` is no multiple of `blocks`.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.gralora(rank=2, blocks=2), {"q": (6, 4)}).num_parameters
    20
    """
    if check_count("rank", rank) % check_count("blocks", blocks):
        raise ValueError(f"rank must be a multiple of blocks={blocks}: got {rank}")
    fold = (blocks, None, blocks, None)
    return _product((3, 1), fold, rank // blocks, by_rank(changes, rank))


def monarch(blocks: int = 4, terms: int = 1, **changes: Any) -> Spec:
    """Monarch matrices (Dao et al. 2022), as in MoRe (Tan et al. 2024): ``ΔW = s P_1 L P_2 R``.

    Parameters
    ----------
    blocks : int
        The number k of blocks of L, and of R.
    terms : int
        The rows of a block of R, and columns of a block of L, over k: 1 is Monarch's own.
    **changes : Any
        Other fields of the spec.

    Returns
    -------
    Spec
        ``terms k (do + di)`` parameters a weight: L and R are block-diagonal and the P fixed
        permutations, which makes a sum of Hadamard products of order 4,
        ``ΔW[(o, j), (n, i)] = s sum_t L_t[o, j, n] R_t[j, n, i]``. Both widths must be
        multiples of k.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.monarch(blocks=2), {"q": (6, 4)}).num_parameters
    20
    """
    refuse_rank("monarch", changes)
    return _product((3, 0), (None, blocks, blocks, None), terms, changes)


def miss(rank: int = 64, mini: int | None = None, **changes: Any) -> Spec:
    """MiSS (Kang and Yin 2024): ΔW repeats one matrix along the inputs, ``1ᵀ ⊗ D``.

    Parameters
    ----------
    rank : int
        The columns r of D; the inputs are summed in groups of every r-th.
    mini : int, optional
        The rows of D, which is then repeated along the outputs too; all outputs by default.
    **changes : Any
        Other fields of the spec.

    Returns
    -------
    Spec
        ``r do`` parameters a weight, or ``r mini``. The input width must be a multiple of r,
        the output width one of `mini`.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.miss(rank=2), {"q": (6, 4)}).num_parameters
    12
    """
    outputs = (1, None) if mini is None else (None, mini)
    fold = tuple(zip(outputs, (None, rank), strict=True))
    return make(changes, rank="full", splits=2, fold=fold, frozen={"0.core": "ones"})


def cdka(rows: int = 2, columns: int = 8, terms: int = 4, **changes: Any) -> Spec:
    """CDKA (2026): a sum of Kronecker products of designed sizes, ``s sum_t B_t ⊗ A_t``.

    Parameters
    ----------
    rows : int
        The rows r1 of every A, (r1, di / r2).
    columns : int
        The columns r2 of every B, (do / r1, r2).
    terms : int
        The number r of products; with ``rows = columns = 1`` this is LoRA of that rank.
    **changes : Any
        Other fields of the spec; ``alpha`` is divided by `terms`.

    Returns
    -------
    Spec
        ``terms (do r2 / r1 + r1 di / r2)`` parameters a weight. The output width must be a
        multiple of r1, the input width one of r2.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.cdka(rows=2, columns=2, terms=3), {"q": (6, 4)}).num_parameters
    30
    """
    refuse_rank("cdka", changes)
    fold = ((None, columns), (rows, None))
    return make(by_rank(changes, terms), rank="full", splits=2, terms=terms, fold=fold)


def _product(
    without: tuple[int, int], fold: tuple[Any, ...], terms: int, changes: dict[str, Any]
) -> Spec:
    """Return a sum of Hadamard products of two dense tensors, each constant along one mode."""
    ranks = tuple(tuple(1 if mode == own else "full" for mode in range(4)) for own in without)
    frozen = {f"{split}.factor{mode}": "ones" for split, mode in enumerate(without)}
    fields = {"order": 4, "splits": 2, "combine": "hadamard", "terms": terms}
    return make(changes, rank=ranks, fold=fold, frozen=frozen, **fields)
