"""Random numbers from raw Philox bits: the same on every array library and device."""

from __future__ import annotations

import math

import numpy
from scipy.special import ndtri

from superlora.values import check_count


def normal(seed: int, stream: int, shape: tuple[int, ...]) -> numpy.ndarray:
    """Draw standard normal numbers.

    Parameters
    ----------
    seed : int
        In [0, 2**64).
    stream : int
        Which of the seed's independent streams, in [0, 2**64).
    shape : tuple of int
        Shape of the result.

    Returns
    -------
    numpy.ndarray of float64
        One number for each 64 raw bits: the inverse normal distribution function
        of their upper 53, so that no library's own sampler decides the values.

    Raises
    ------
    ValueError
        If `seed` is not an integer of that range.

    Examples
    --------
    >>> normal(0, 0, (2,)).round(6)
    array([-2.271884, -0.701328])
    """
    if check_count("seed", seed, least=0) >= 1 << 64:
        raise ValueError(f"seed must be below 2**64: got {seed}")
    bits = numpy.random.Philox(key=numpy.array([seed, stream], dtype=numpy.uint64))
    raw = bits.random_raw(math.prod(shape))
    # The half keeps both ends of (0, 1) out, where the inverse is infinite.
    uniform = ((raw >> numpy.uint64(11)).astype(numpy.float64) + 0.5) * 2.0**-53
    values: numpy.ndarray = ndtri(uniform).reshape(shape)
    return values
