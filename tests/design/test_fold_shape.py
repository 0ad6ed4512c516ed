"""Integer arithmetic of folds: exact, balanced, covering, split and aligned."""

from __future__ import annotations

import functools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from superlora.checks import check_count
from superlora.design.fold_shape import (
    aligned_splits,
    balanced,
    balanced_splits,
    ceil_divide,
    cover,
    divisors,
    integer_root,
    split_modes,
)

VIT_Q_V = 24 * 768 * 768
GPT2_MEDIUM_Q_V = 48 * 1024 * 1024


@functools.cache
def least_sum(size: int, order: int) -> int:
    if order == 1:
        return size
    return min(
        mode + least_sum(size // mode, order - 1) for mode in range(1, size + 1) if size % mode == 0
    )


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_balanced_is_exact_ascending_and_of_least_sum(order):
    for size in range(1, 400):
        modes = balanced(size, order)
        assert len(modes) == order
        assert math.prod(modes) == size
        assert list(modes) == sorted(modes)
        assert sum(modes) == least_sum(size, order), (size, modes)


@pytest.mark.parametrize(
    ("size", "greedy", "modes"),
    [
        (3168, (12, 12, 22), (11, 16, 18)),
        (5460, (14, 15, 26), (13, 20, 21)),
        (8775, (15, 15, 39), (13, 25, 27)),
        (34848, (11, 12, 12, 22), (11, 11, 16, 18)),
    ],
)
def test_balanced_is_not_greedy(size, greedy, modes):
    # These are the smallest sizes for which the largest divisor below the root is no good start.
    assert math.prod(greedy) == size
    assert sum(modes) == least_sum(size, len(modes)) < sum(greedy)
    assert balanced(size, len(modes)) == modes


@pytest.mark.parametrize(
    ("size", "modes"),
    [
        (VIT_Q_V, (3456, 4096)),
        (VIT_Q_V, (216, 256, 256)),
        (VIT_Q_V, (54, 64, 64, 64)),
        (VIT_Q_V, (24, 24, 24, 32, 32)),
        (GPT2_MEDIUM_Q_V, (6144, 8192)),
        (GPT2_MEDIUM_Q_V, (256, 384, 512)),
        (GPT2_MEDIUM_Q_V, (64, 64, 96, 128)),
        (GPT2_MEDIUM_Q_V, (32, 32, 32, 32, 48)),
        (768, (24, 32)),
        (768, (8, 8, 12)),
        (768, (4, 4, 6, 8)),
        (2304, (48, 48)),
        (770, (22, 35)),
        (97, (1, 97)),
        (1415578, (2, 707789)),
        (1, (1, 1, 1)),
    ],
)
def test_balanced_gives_the_published_folds(size, modes):
    assert balanced(size, len(modes)) == modes


def test_balanced_of_two_modes_is_the_factorisation_of_lycoris():
    general = pytest.importorskip("lycoris.functional.general")
    for size in range(2, 3000):
        assert balanced(size, 2) == general.factorization(size, -1)


def test_divisors_are_all_divisors():
    for size in range(1, 1000):
        assert divisors(size) == tuple(n for n in range(1, size + 1) if size % n == 0)


def test_a_product_of_two_huge_primes_is_kept_in_one_piece():
    huge = 1048583 * 1048589  # the first two primes above 2**20
    assert divisors(6 * huge) == (1, 2, 3, 6, huge, 2 * huge, 3 * huge, 6 * huge)
    assert sum(balanced_splits(huge, 2, 1)[0]) < 2.001 * math.sqrt(huge)


@given(st.integers(2, 10**9), st.integers(1, 6))
def test_integer_root_is_exact_beside_huge_powers(root, degree):
    power = root**degree
    assert integer_root(power, degree) == root
    assert integer_root(power + 1, degree) == root + 1
    assert integer_root((root - 1) ** degree + 1, degree) == root


@pytest.mark.parametrize("exponent", [29, 31, 39, 47, 51, 63, 90])
def test_integer_root_is_exact_where_a_logarithm_is_not(exponent):
    for degree in (2, 3, 5):
        root = integer_root(2**exponent, degree)
        assert (root - 1) ** degree < 2**exponent <= root**degree


@given(st.integers(1, 10**13), st.integers(1, 6))
def test_cover_covers_with_nearly_equal_modes_and_no_slice_to_spare(size, order):
    modes = cover(size, order)
    assert len(modes) == order
    assert math.prod(modes) >= size
    assert math.prod(modes) - size < math.prod(modes[1:])
    assert max(modes) <= integer_root(size, order)
    assert all(mode >= 1 for mode in modes)


def test_cover_of_a_lopsided_size_is_square():
    assert cover(1415578, 2) == (1190, 1190)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=5), st.integers(1, 4))
def test_split_modes_factors_every_mode_ascending(fold, splits):
    sizes = split_modes(fold, splits)
    assert len(sizes) == splits
    for mode, size in enumerate(fold):
        digits = [split[mode] for split in sizes]
        assert math.prod(digits) == size
        assert digits == sorted(digits)
        assert sum(digits) == sum(balanced(size, splits))


@pytest.mark.parametrize(
    ("size", "order", "splits", "sizes"),
    [
        (VIT_Q_V, 2, 1, ((3456, 4096),)),
        (VIT_Q_V, 2, 2, ((54, 64), (64, 64))),
        (1415578, 2, 1, ((1190, 1190),)),
        (10007, 2, 1, ((101, 100),)),
        (97, 1, 1, ((97,),)),
        (97, 1, 2, ((10,), (10,))),
    ],
)
def test_balanced_splits_take_the_exact_fold_unless_it_is_lopsided(size, order, splits, sizes):
    assert balanced_splits(size, order, splits) == sizes


def assert_covers_with_no_slice_to_spare(size, sizes):
    """Check that every slice of every split, not only of every mode, holds some entry."""
    digits = [split[mode] for mode in range(len(sizes[0])) for split in sizes]
    covered = math.prod(digits)
    leading = next((digit for digit in digits if digit > 1), 1)
    assert 0 <= covered - size < covered // leading


@given(st.integers(1, 10**8), st.integers(1, 5), st.integers(1, 4))
def test_balanced_splits_cover_at_nearly_the_least_cost(size, order, splits):
    sizes = balanced_splits(size, order, splits)
    assert [len(split) for split in sizes] == [order] * splits
    if splits > 1 and any(math.prod(split) == 1 for split in sizes):
        assert math.prod(map(math.prod, sizes)) == size
        assert size < 2 ** (order * splits)  # too few entries for that many digits
    else:
        assert_covers_with_no_slice_to_spare(size, sizes)
        assert sum(map(sum, sizes)) <= 1.25 * order * splits * integer_root(size, order * splits)


def test_two_splits_are_not_redundant_where_a_cover_exists():
    sizes = balanced_splits(35, 2, 2)
    assert all(math.prod(split) > 1 for split in sizes)


@given(
    st.integers(2, 400),
    st.integers(1, 400),
    st.integers(2, 5),
    st.integers(1, 3),
)
def test_aligned_splits_end_in_a_mode_that_divides_every_width(divisor, rows, order, splits):
    size = divisor * rows
    try:
        sizes = aligned_splits(size, order, splits, divisor)
    except ValueError as error:
        sizes, message = None, str(error)
    if sizes is None:
        assert splits > 1
        assert "splits must leave every split more than one entry" in message
        return
    last = math.prod(split[-1] for split in sizes)
    assert last > 1
    assert divisor % last == 0
    assert_covers_with_no_slice_to_spare(size, sizes)
    assert splits == 1 or all(math.prod(split) > 1 for split in sizes)


@given(st.integers(2, 2000), st.integers(1, 2000))
def test_aligned_order_two_has_the_least_sum(divisor, rows):
    size = divisor * rows
    choices = [size // last + last for last in divisors(divisor)[1:]]
    assert sum(aligned_splits(size, 2, 1, divisor)[0]) == min(choices)


@pytest.mark.parametrize(
    ("size", "order", "divisor", "fold"),
    [
        (VIT_Q_V, 2, 768, (18432, 768)),
        (VIT_Q_V, 3, 768, (216, 256, 256)),
        (24 * (1024 * 1024 + 1024 * 2816), 3, 256, (576, 640, 256)),
    ],
)
def test_aligned_folds_of_known_models(size, order, divisor, fold):
    assert aligned_splits(size, order, 1, divisor) == (fold,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: aligned_splits(6, 1, 1, 2), "must have order 2 or more: got order 1"),
        (lambda: aligned_splits(6, 2, 1, 1), "must find a divisor above 1 .*: got 1"),
        (lambda: aligned_splits(6, 2, 4, 2), "splits must leave every split more than one"),
        (lambda: check_count("x", 2, least=3), "x must be at least 3: got 2"),
    ],
)
def test_sizes_that_make_no_fold_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("value", [True, 2.0, "2", None])
def test_a_count_must_be_an_integer(value):
    with pytest.raises(TypeError, match=f"rank must be an integer: got {value!r}"):
        check_count("rank", value)


@given(st.integers(0, 10**20), st.integers(1, 10**10))
def test_ceil_divide_rounds_up(size, by):
    quotient = ceil_divide(size, by)
    assert (quotient - 1) * by < size <= quotient * by
