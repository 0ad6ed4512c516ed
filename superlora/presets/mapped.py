"""Presets of few numbers and a fixed map: of the update, or of the factors."""

from __future__ import annotations

from typing import Any

from superlora.design.spec import Spec
from superlora.maps import Circulant, Fastfood, Fourier, Gaussian, OneHot, Wavelet
from superlora.presets._make import make, refuse_rank


def fourierft(size: int = 1000, scale: float = 150.0, seed: int = 0, **changes: Any) -> Spec:
    """FourierFT (Gao et al. 2024): coefficients at random frequencies of each update.

    Parameters
    ----------
    size : int
        Frequencies a weight.
    scale : float
        The method's own scale.
    seed : int
        Of the frequencies, which all weights of one shape share.
    **changes : Any
        Other fields of the spec.

    Returns
    -------
    Spec
        ``size`` parameters a weight: ``ΔW = s Re ifft2(S)``.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.fourierft(size=5), {"q": (6, 4)}).num_parameters
    5
    """
    refuse_rank("fourierft", changes)
    fields = {"order": 1, "map": Fourier(seed=seed), "size": size, "scale": scale}
    return make(changes, rank="full", **fields)


def waveft(size: int = 2592, scale: float = 25.0, seed: int = 0, **changes: Any) -> Spec:
    """WaveFT (Bilican et al. 2025): coefficients at random places of each update's wavelets.

    Parameters
    ----------
    size : int
        Coefficients a weight.
    scale : float
        The method's own scale.
    seed : int
        Of the places, which all weights of one shape share.
    **changes : Any
        Other fields of the spec.

    Returns
    -------
    Spec
        ``size`` parameters a weight: ``ΔW = s idwt2(S)`` with one level of Haar's wavelets.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.waveft(size=5), {"q": (6, 4)}).num_parameters
    5
    """
    refuse_rank("waveft", changes)
    fields = {"order": 1, "map": Wavelet(seed=seed), "size": size, "scale": scale}
    return make(changes, rank="full", **fields)


def c3a(block: int = 256, **changes: Any) -> Spec:
    """C3A (Chen et al. 2024): every update is made of circulant blocks.

    Parameters
    ----------
    block : int
        The blocks' width b, which divides all widths of the weights.
    **changes : Any
        Other fields of the spec.

    Returns
    -------
    Spec
        ``do di / b`` parameters a weight: ``ΔW[p b + i, q b + k] = s x[p, q, (k - i) mod b] / di``.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.c3a(block=2), {"q": (6, 4)}).num_parameters
    12
    """
    refuse_rank("c3a", changes)
    return make(changes, rank="full", order=1, map=Circulant(block=block))


def did(size: int = 1000, seed: int = 0, **changes: Any) -> Spec:
    """DID (Li et al. 2018; Aghajanyan et al. 2021): one vector for all weights.

    Parameters
    ----------
    size : int
        The intrinsic dimension.
    seed : int
        Of the projections.
    **changes : Any
        Other fields of the spec.

    Returns
    -------
    Spec
        ``size`` parameters in all: ``ΔW_l = s F_l θ`` with an independent fastfood
        projection of each weight, in the order of Le et al.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.did(size=5), {"q": (6, 4), "v": (6, 4)}).num_parameters
    5
    """
    refuse_rank("did", changes)
    fixed = Fastfood(seed=seed, order="le", shared=False)
    return make(changes, rank="full", order=1, tied=("0.core",), map=fixed, size=size)


def said(size: int = 1000, seed: int = 0, **changes: Any) -> Spec:
    """SAID (Aghajanyan et al. 2021): one vector for all weights, and a number for each.

    Parameters
    ----------
    size : int
        The intrinsic dimension, without the numbers.
    seed : int
        Of the projections.
    **changes : Any
        Other fields of the spec.

    Returns
    -------
    Spec
        ``size + L`` parameters for L weights: ``ΔW_l = s λ_l F_l θ``. λ starts at
        zero and θ random.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.said(size=5), {"q": (6, 4), "v": (6, 4)}).num_parameters
    7
    """
    refuse_rank("said", changes)
    fixed = Fastfood(seed=seed, order="le", shared=False)
    return make(changes, rank=1, fold=(1, size), tied=("0.factor1",), map=fixed)


def unilora(size: int = 256, rank: int = 4, seed: int = 0, **changes: Any) -> Spec:
    """Uni-LoRA (Li et al. 2025): every entry of all LoRA factors is one of a few numbers.

    Parameters
    ----------
    size : int
        The numbers that are trained, for all weights.
    rank : int
        The inner dimension r of every update.
    seed : int
        Of which entry is which number.
    **changes : Any
        Other fields of the spec.

    Returns
    -------
    Spec
        ``size`` parameters in all: LoRA's factors are an isometric one-hot map of one vector,
        which does not start at zero.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.unilora(size=5, rank=2), {"q": (6, 4), "v": (6, 4)}).num_parameters
    5
    """
    fixed = OneHot(seed=seed, tiled=False, signed=False)
    # Of a dense matrix instead of two factors the map would be another method's.
    fields = {"dense_from": "never", "factor_map": fixed, "factor_size": size}
    return make(changes, rank=rank, **fields)


def nola(size: int = 256, rank: int = 4, seed: int = 0, **changes: Any) -> Spec:
    """NOLA (Koohpayegani et al. 2024): each LoRA factor is a sum of random ones.

    Parameters
    ----------
    size : int
        How many random matrices are summed for each factor, and coefficients trained.
    rank : int
        The inner dimension r of every update.
    seed : int
        Of the random matrices, which every factor has of its own.
    **changes : Any
        Other fields of the spec.

    Returns
    -------
    Spec
        ``2 size`` parameters a weight: ``A = sum_i α_i A_i`` and ``B = sum_j β_j B_j``, the
        matrices normal and in no file.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Plan(sl.nola(size=5, rank=2), {"q": (6, 4)}).num_parameters
    10
    """
    fixed = Gaussian(seed=seed, shared=False)
    fields = {"dense_from": "never", "factor_map": fixed, "factor_size": size}
    return make(changes, rank=rank, factor_scope="block", **fields)
