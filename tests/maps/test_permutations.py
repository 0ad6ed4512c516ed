"""Permutations: bijections, the same from any part, and without a structure."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from scipy import stats

from superlora.maps import permutations
from superlora.maps.permutations import Permutation, permutation_rows
from superlora.random import bits

LIMIT = 1 << 16  # above it a Feistel network takes the place of sorting


@pytest.fixture
def feistel(monkeypatch):
    """The network at any size."""
    monkeypatch.setattr(permutations, "_SORTED", 0)


SIZES = [1, 2, 3, 97, 256, *range(LIMIT - 1, LIMIT + 4), 257**2, 300**2, 65537 + 14, 10**6]


@pytest.mark.parametrize("size", SIZES)
def test_it_is_a_bijection_with_its_inverse(size):
    fixed = Permutation(5, 8, size)
    forward, inverse = fixed.forward(0, size), fixed.inverse(0, size)
    assert_array_equal(numpy.sort(forward), numpy.arange(size))
    assert_array_equal(inverse[forward], numpy.arange(size))


@pytest.mark.usefixtures("feistel")
@given(st.integers(0, 2**64 - 1), st.integers(1, 200))
def test_the_network_is_a_bijection_at_every_size(seed, size):
    fixed = Permutation(seed, 0, size)
    forward = fixed.forward(0, size)
    assert_array_equal(numpy.sort(forward), numpy.arange(size))
    assert_array_equal(fixed.inverse(0, size)[forward], numpy.arange(size))


def plain_feistel(seed, stream, size, position):
    """Return where a position goes, in Python's integers."""
    low = math.isqrt(size - 1) + 1
    high = math.ceil(size / low)
    while True:
        left, right = divmod(position, low)
        for turn in range(6):
            by, bound = (left, low) if turn % 2 else (right, high)
            shift = int(bits(seed, stream + 1 + turn, by, by + 1)[0]) % bound
            if turn % 2:
                right = (right + shift) % low
            else:
                left = (left + shift) % high
        position = left * low + right
        if position < size:
            return position


@pytest.mark.parametrize("size", [LIMIT + 1, 10**6, 10**9 + 7])
def test_the_network_is_its_definition(size):
    fixed = Permutation(3, 16, size)
    for start in (0, size // 3, size - 5):
        expected = [plain_feistel(3, 16, size, start + i) for i in range(5)]
        assert fixed.forward(start, start + 5).tolist() == expected


@pytest.mark.parametrize("size", [7, LIMIT, LIMIT + 1, 300_000])
@pytest.mark.parametrize("chunk", [1000, 1 << 17])
def test_a_part_is_what_the_whole_has_there(monkeypatch, size, chunk):
    monkeypatch.setattr(permutations, "_CHUNK", chunk)
    fixed = Permutation(2, 8, size)
    for draw in (fixed.forward, fixed.inverse):
        whole = draw(0, size)
        for start, stop in [(0, 1), (size - 1, size), (size // 3, size // 2), (size, size)]:
            assert_array_equal(draw(start, stop), whole[start:stop])


@pytest.mark.parametrize(("size", "most"), [(10**12, 1 << 26), (1 << 40, 1 << 26)])
def test_random_access_takes_no_memory_of_that_size(size, most):
    tracemalloc.start()
    try:
        fixed = Permutation(2, 8, size)
        found = fixed.forward(size - 9, size)
        for image, origin in zip(found.tolist(), range(size - 9, size), strict=True):
            assert 0 <= image < size
            assert fixed.inverse(image, image + 1).tolist() == [origin]
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [2**48 + 1, 2**62, 2**80])
def test_a_size_beyond_any_memory_is_refused(size):
    with pytest.raises(ValueError, match=rf"size must be at most 2\*\*48.*got {size}"):
        Permutation(0, 0, size)


@pytest.mark.parametrize(
    ("size", "error", "match"),
    [
        (0, ValueError, "size must be at least 1: got 0"),
        (-3, ValueError, "size must be at least 1"),
        (2.0, TypeError, "size must be an integer"),
        (True, TypeError, "size must be an integer"),
    ],
)
def test_wrong_sizes_are_refused(size, error, match):
    with pytest.raises(error, match=match):
        Permutation(0, 0, size)


@pytest.mark.parametrize("size", [10, LIMIT + 10])
@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (4, 3), (0, LIMIT + 11)])
def test_positions_outside_are_refused(size, start, stop):
    fixed = Permutation(0, 0, size)
    for draw in (fixed.forward, fixed.inverse):
        with pytest.raises(ValueError, match=f"must be a slice of {size} positions: got {start}"):
            draw(start, stop)


def test_what_is_returned_can_be_written_to():
    fixed = Permutation(0, 0, 5)
    fixed.forward(0, 5)[:] = 0
    assert sorted(fixed.forward(0, 5)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("size", [1, 6, 100])
def test_rows_follow_one_another_in_one_stream(size):
    whole = permutation_rows(4, 8, size, 0, 9)
    assert_array_equal(permutation_rows(4, 8, size, 3, 7), whole[3:7])
    assert_array_equal(whole[0], Permutation(4, 8, size).forward(0, size))
    inverse = permutation_rows(4, 8, size, 3, 7, inverse=True)
    assert_array_equal(numpy.take_along_axis(inverse, whole[3:7], 1), [range(size)] * 4)
    assert size < 100 or len(set(map(tuple, whole.tolist()))) == 9


def test_large_rows_have_streams_of_their_own():
    rows = permutation_rows(4, 8, LIMIT + 1, 1, 3)
    for row, stream in zip(rows, (16, 24), strict=True):
        assert_array_equal(row, Permutation(4, stream, LIMIT + 1).forward(0, LIMIT + 1))


GOLDEN = [
    (11, [9, 10, 4, 0], [10, 0, 2, 9]),
    (65536, [27882, 54235, 56736, 49143], [61128, 2590, 14251, 57991]),
    (65537, [61955, 17976, 39084, 43297], [51159, 2661, 52715, 44213]),
    (
        1000000000000,
        [989873012042, 197913887444, 53748638130, 871099914349],
        [173951829257, 91895898167, 580171911571, 873178328442],
    ),
]


@pytest.mark.parametrize(("size", "forward", "inverse"), GOLDEN)
def test_a_permutation_is_a_format(size, forward, inverse):
    fixed = Permutation(2024, 3 << 56 | 8, size)
    assert fixed.forward(5, 9).tolist() == forward
    assert fixed.inverse(5, 9).tolist() == inverse


def test_small_permutations_are_uniform():
    counts = dict.fromkeys(itertools.permutations(range(4)), 0)
    for row in permutation_rows(1, 0, 4, 0, 12_000).tolist():
        counts[tuple(row)] += 1
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


@pytest.mark.usefixtures("feistel")
@pytest.mark.parametrize("size", [7, 12, 16])
def test_places_of_the_network_are_uniform(size):
    drawn = numpy.array([Permutation(s, 0, size).forward(0, size) for s in range(3000)])
    for place in (0, size // 2, size - 1):
        assert stats.chisquare(numpy.bincount(drawn[:, place], minlength=size)).pvalue > 1e-4


@pytest.mark.usefixtures("feistel")
@pytest.mark.parametrize("size", [101, 121])
def test_pairs_of_the_network_are_uniform(size):
    drawn = numpy.array([Permutation(s, 0, size).forward(0, size) for s in range(3000)])
    for a, b in [(0, 1), (0, size - 1), (0, 11), (12, 35)]:
        steps = numpy.bincount((drawn[:, a] - drawn[:, b]) % size, minlength=size)
        assert steps[0] == 0
        assert stats.chisquare(steps[1:]).pvalue > 1e-4


@pytest.mark.parametrize("size", [LIMIT, LIMIT + 1, 300**2, 10**6])
def test_a_large_permutation_has_no_structure(size):
    found = Permutation(9, 0, size).forward(0, size)
    other = Permutation(9, 8, size).forward(0, size)
    root = math.isqrt(size - 1) + 1
    series = [(found, numpy.arange(size)), (found, other)]
    series += [(found[lag:], found[:-lag]) for lag in (1, 2, root, root + 1)]
    bound = 5 / math.sqrt(size)
    for left, right in series:
        assert abs(numpy.corrcoef(left, right)[0, 1]) < bound
        # The low digits of the network's pairs too.
        assert abs(numpy.corrcoef(left % root, right % root)[0, 1]) < bound
    # Fixed points are Poisson's, of mean 1, and so are neighbours that stay neighbours.
    assert numpy.count_nonzero(found == numpy.arange(size)) < 8
    assert numpy.count_nonzero(numpy.diff(found) == 1) < 8
    places, _ = numpy.histogram(found[: size // 2], bins=64, range=(0, size))
    assert stats.chisquare(places).pvalue > 1e-4
