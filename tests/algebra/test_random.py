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

from superlora import random
from superlora.random import bits, check_seed, coarse_normals, integers, normal, signs

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


@given(
    st.integers(0, WORD - 1), st.integers(0, WORD - 1), st.integers(0, 2**62), st.integers(0, 40)
)
def test_words_of_any_part_are_the_streams(seed, stream, start, count):
    # numpy's generator counts up before it draws.
    blocks = range(start // 4 + 1, (start + count) // 4 + 2)
    whole = [word for block in blocks for word in philox((seed, stream), (block, 0, 0, 0))]
    found = bits(seed, stream, start, start + count)
    assert found.dtype == numpy.uint64
    assert found.tolist() == whole[start % 4 : start % 4 + count]


def test_words_are_those_of_numpys_generator():
    key = numpy.array([7, 11], dtype=numpy.uint64)
    whole = numpy.random.Philox(key=key).random_raw(1000)
    assert numpy.array_equal(bits(7, 11, 0, 1000), whole)
    assert numpy.array_equal(bits(7, 11, 501, 778), whole[501:778])


@given(st.integers(0, 500), st.integers(0, 300))
def test_signs_of_any_part_are_bits(start, count):
    words = bits(3, 1, 0, 20).tolist()
    expected = [1 - 2 * (words[i // 64] >> i % 64 & 1) for i in range(start, start + count)]
    found = signs(3, 1, start, start + count)
    assert found.dtype == numpy.int8
    assert found.tolist() == expected


@pytest.mark.parametrize("chunk", [7, 1 << 16])
def test_coarse_draws_are_rounded_ones_of_any_part(monkeypatch, chunk):
    monkeypatch.setattr(random, "_CHUNK", chunk)
    fine = normal(3, 1, (500,))
    found = coarse_normals(3, 1, 13, 500)
    assert found.dtype == numpy.float32
    assert_allclose(found, fine[13:], rtol=0, atol=2**-17)
    assert numpy.array_equal(found * 65536, numpy.rint(fine[13:] * 65536))
    assert coarse_normals(3, 1, 9, 9).shape == (0,)


def test_no_draw_is_infinite(monkeypatch):
    ends = numpy.array([0, WORD - 1], dtype=numpy.uint64)
    monkeypatch.setattr(random, "bits", lambda *_: ends)
    low, high = normal(0, 0, (2,))
    assert -9 < low < -8 < 8 < high < 9


def test_signs_and_integers_are_a_format():
    assert signs(2024, 5, 60, 70).tolist() == [1, -1, -1, 1, -1, 1, 1, -1, -1, 1]
    assert integers(2024, 5, 1000, 5).tolist() == [473, 721, 29, 498, 35]
    drawn = coarse_normals(2024, 5, 3, 7) * 65536
    assert drawn.tolist() == [-13447, 1420, -36963, 12092]


def test_signs_and_integers_are_fair():
    assert abs(int(signs(1, 2, 0, 10**6).sum())) < 5000
    counts = numpy.bincount(integers(1, 2, 10, 10**5), minlength=10)
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize(
    ("seed", "error", "match"),
    [
        (-1, ValueError, "seed must be at least 0: got -1"),
        (WORD, ValueError, r"seed must be below 2\*\*64"),
        (1.0, TypeError, "seed must be an integer: got 1.0"),
        (True, TypeError, "seed must be an integer: got True"),
    ],
)
def test_wrong_seeds_are_refused(seed, error, match):
    for draw in (check_seed, lambda value: normal(value, 0, (1,))):
        with pytest.raises(error, match=match):
            draw(seed)
