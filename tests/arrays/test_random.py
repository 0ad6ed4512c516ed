"""Random numbers: Philox in plain integers, then the inverse normal distribution."""

from __future__ import annotations

import math
import statistics

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy import stats

from superlora.random import normal

WORD = 2**64


def philox(key, counter):
    """Return four 64-bit words: Philox4x64 with ten rounds (Salmon et al. 2011)."""
    words, (low, high) = list(counter), key
    for _ in range(10):
        first, second = words[0] * 0xD2E7470EE14C6C93, words[2] * 0xCA5A826395121157
        words = [
            second // WORD ^ words[1] ^ low,
            second % WORD,
            first // WORD ^ words[3] ^ high,
            first % WORD,
        ]
        low, high = (low + 0x9E3779B97F4A7C15) % WORD, (high + 0xBB67AE8584CAA73B) % WORD
    return words


def test_the_plain_philox_gives_the_authors_known_answers():
    # Random123, kat_vectors: philox4x64 10
    assert philox((0, 0), (0, 0, 0, 0)) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]


@given(st.integers(0, WORD - 1), st.integers(0, WORD - 1), st.integers(1, 9))
def test_a_draw_is_the_inverse_distribution_of_the_upper_53_bits(seed, stream, size):
    # numpy's generator counts up before it draws.
    raw = [word for block in (1, 2, 3) for word in philox((seed, stream), (block, 0, 0, 0))]
    inverse = statistics.NormalDist().inv_cdf
    expected = [inverse(((word >> 11) + 0.5) / 2**53) for word in raw[:size]]
    assert_allclose(normal(seed, stream, (size,)), expected, rtol=1e-12, atol=1e-15)


def test_the_values_are_a_format():
    # A file stores a seed: what it stands for may never change.
    assert normal(0, 0, (3,)).tolist() == pytest.approx(
        [-2.271884148324594, -0.701327920628698, -1.218980191079758], rel=1e-14, abs=0
    )


def test_draws_fill_a_shape_row_by_row():
    flat = normal(3, 4, (24,))
    for shape in [(4, 6), (2, 3, 4), (24, 1)]:
        assert numpy.array_equal(normal(3, 4, shape), flat.reshape(shape))
    assert normal(3, 4, ()).shape == ()


def test_draws_are_normal_and_independent():
    draws = normal(11, 0, (100_000,))
    assert stats.kstest(draws, "norm").pvalue > 1e-3
    assert abs(draws.mean()) < 5 / math.sqrt(len(draws))
    for seed, stream in [(11, 1), (12, 0), (0, 11)]:
        other = normal(seed, stream, (100_000,))
        assert abs(numpy.corrcoef(draws, other)[0, 1]) < 5 / math.sqrt(len(draws))
