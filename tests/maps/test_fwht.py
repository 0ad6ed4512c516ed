"""The Walsh–Hadamard transform against the matrix and its algebra, on every library."""

from __future__ import annotations

import math

import hypothesis
import numpy
import pytest
from hypothesis import strategies
from numpy.testing import assert_allclose, assert_array_equal
from scipy.linalg import hadamard

from superlora.maps.walsh_hadamard import (
    fwht,
    next_power_of_two,
    transform_cropped,
    transform_padded,
)
from tests.conftest import LIBRARIES, is_installed
from tests.maps.fwht_helpers import DOUBLE, ROUNDING, SINGLE, draw
from tests.pairs import pairwise


@pairwise(
    {"bits": range(11), "dtype": {"single": SINGLE, "double": DOUBLE}, "xp": LIBRARIES},
    indirect=["xp"],
)
def test_it_multiplies_by_the_matrix(xp, bits, dtype):
    n = 2**bits
    x = draw(3, n, dtype=dtype, seed=bits)
    for scale, options in ((1.0, {}), (n**-0.5, {"orthonormal": True})):
        y = fwht(xp.array(x), **options)
        assert xp.owns(y)
        assert y.dtype == xp.array(x).dtype
        expected = scale * (x.astype(DOUBLE) @ hadamard(n))
        tolerance = ROUNDING[dtype] * (bits + 1) * math.sqrt(n) * scale * 4
        assert_allclose(xp.to_numpy(y), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((8,), 0),
        ((8, 3), 0),
        ((3, 8), 1),
        ((2, 16, 3), 1),
        ((2, 16, 3), -2),
        ((512, 3), 0),
        ((2, 256, 2), 1),
        ((4, 2, 3), -3),
        ((2, 3, 1), -1),
        ((0, 8), 1),
        ((256, 0), 0),
    ],
)
def test_any_axis_of_any_batch(xp, shape, axis):
    x = draw(*shape)
    given_ = xp.array(x)
    y = xp.to_numpy(fwht(given_, axis))
    n = shape[axis]
    expected = numpy.moveaxis(numpy.moveaxis(x, axis, -1) @ hadamard(n), -1, axis)
    assert y.shape == shape
    assert_allclose(y, expected, rtol=0, atol=1e-12)
    assert_array_equal(xp.to_numpy(given_), x)


@hypothesis.settings(max_examples=20)  # each shape is compiled anew by some libraries
@hypothesis.given(
    bits=strategies.integers(0, 9),
    before=strategies.lists(strategies.integers(1, 3), max_size=2),
    after=strategies.lists(strategies.integers(1, 3), max_size=2),
    orthonormal=strategies.booleans(),
    seed=strategies.integers(0, 99),
)
def test_it_is_symmetric_and_its_own_inverse(xp, bits, before, after, orthonormal, seed):
    shape, axis, n = (*before, 2**bits, *after), len(before), 2**bits
    x, y = draw(*shape, seed=seed), draw(*shape, seed=seed + 100)
    options = {"axis": axis, "orthonormal": orthonormal}
    hx, hy = (xp.to_numpy(fwht(xp.array(v), **options)) for v in (x, y))
    back = xp.to_numpy(fwht(xp.array(hx), **options))
    assert_allclose(back, x if orthonormal else n * x, rtol=0, atol=1e-13 * n)
    assert_allclose(numpy.vdot(hx, y), numpy.vdot(x, hy), rtol=0, atol=1e-11 * n)


@pytest.mark.parametrize("n", [4, 4096])
def test_a_result_is_exact_to_rounding(xp, n):
    # Sums of integers are exact, so that every entry must be.
    x = numpy.random.default_rng(0).integers(-1000, 1000, n).astype(DOUBLE)
    expected = x.copy().reshape(1, n)
    for _ in range(n.bit_length() - 1):
        half = expected.reshape(-1, 2, expected.shape[1] // 2)
        expected = numpy.stack((half[:, 0] + half[:, 1], half[:, 0] - half[:, 1]), 1)
        expected = expected.reshape(-1, expected.shape[2])
    assert_array_equal(xp.to_numpy(fwht(xp.array(x))), expected.ravel())


def test_one_entry_is_a_new_array(xp):
    x = xp.array(numpy.ones((2, 1)))
    y = fwht(x)
    assert y is not x
    if xp.name in ("numpy", "torch"):
        y += 1.0
        assert_array_equal(xp.to_numpy(x), numpy.ones((2, 1)))


@pytest.mark.parametrize("n", [8, 512])
def test_not_a_number_and_infinity_spread_along_their_row_only(xp, n):
    x = draw(4, n)
    x[0, 1], x[1, 2], x[2, 0], x[2, 3] = numpy.nan, numpy.inf, numpy.inf, numpy.inf
    y = xp.to_numpy(fwht(xp.array(x)))
    assert numpy.isnan(y[0]).all()
    assert_array_equal(y[1], numpy.inf * hadamard(n)[2])
    columns = hadamard(n)[0] + hadamard(n)[3]
    with numpy.errstate(invalid="ignore"):
        assert_array_equal(y[2], numpy.inf * columns)
    assert numpy.isfinite(y[3]).all()


def halves():
    rows = [("numpy", "float16", lambda v: v.astype(numpy.float16))]
    if is_installed("torch"):
        import torch

        rows += [
            ("torch", name, lambda v, name=name: torch.tensor(v).to(getattr(torch, name)))
            for name in ("float16", "bfloat16")
        ]
    if is_installed("jax"):
        import jax.numpy

        rows += [
            ("jax", name, lambda v, name=name: jax.numpy.asarray(v).astype(name))
            for name in ("float16", "bfloat16")
        ]
    return [pytest.param(*row[1:], id="-".join(row[:2])) for row in rows]


def as_double(x):
    return numpy.asarray(x.double() if hasattr(x, "double") else x).astype(DOUBLE)


@pytest.mark.parametrize(("name", "make"), halves())
def test_short_types_are_summed_in_single_precision(name, make):
    n = 2**16
    ones = make(numpy.ones(n, SINGLE))
    y = fwht(ones, orthonormal=True)
    assert str(y.dtype).endswith(name)
    assert_array_equal(as_double(y), numpy.r_[256.0, numpy.zeros(n - 1)])
    x = make(draw(2, 1024, dtype=SINGLE))
    expected = (as_double(x) @ hadamard(1024)).astype(SINGLE)
    # One rounding at the end, to the short type.
    assert_allclose(as_double(fwht(x)), as_double(make(expected)), rtol=1e-2, atol=1e-4)
    exact = numpy.isclose(as_double(fwht(x)), as_double(make(expected)), rtol=1e-6, atol=0)
    assert exact.mean() > 0.95


@pytest.mark.parametrize(("name", "make"), halves())
def test_folds_of_short_types_are_summed_in_single_precision(name, make):
    n = 2**16
    y = transform_cropped(make(numpy.ones(n, SINGLE)), 3, 2.0**-8)
    assert str(y.dtype).endswith(name)
    assert_array_equal(as_double(y), [256.0, 0.0, 0.0])
    # 2048 + 1 is no half.
    z = numpy.zeros(n, SINGLE)
    z[0], z[4:8004:4] = 2048, 1
    assert as_double(transform_cropped(make(z), 1, 2.0**-6))[0] == pytest.approx(63.25, rel=5e-3)
    x = transform_padded(make(numpy.ones(3, SINGLE)), 8, 0.5)
    assert str(x.dtype).endswith(name)
    assert_array_equal(as_double(x), [1.5, 0.5, 0.5, -0.5] * 2)


def test_long_doubles_keep_their_precision():
    x = draw(8).astype(numpy.longdouble)
    y = fwht(fwht(x)) / 8
    assert y.dtype == numpy.longdouble
    assert abs(y - x).max() <= 16 * numpy.finfo(numpy.longdouble).eps


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool", "complex64", "complex128"])
def test_other_types_of_numbers_are_refused(xp, dtype):
    x = xp.array(numpy.ones(4, dtype))
    for call in (fwht, lambda v: transform_padded(v, 4)):
        with pytest.raises(TypeError, match=f"x must have a floating-point dtype: got {dtype}"):
            call(x)
    with pytest.raises(TypeError, match=f"y must have a floating-point dtype: got {dtype}"):
        transform_cropped(x, 2)


@pytest.mark.parametrize(
    ("shape", "axis", "error", "message"),
    [
        ((6,), -1, ValueError, "along axis -1: got 6; the next is 8$"),
        ((3, 4), 0, ValueError, "x must have a power of two of entries along axis 0: got 3"),
        ((2, 0), 1, ValueError, "along axis 1: got 0; the next is 1$"),
        ((), -1, ValueError, r"x must have at least one axis: got shape \(\)"),
        ((4, 4), 2, ValueError, "axis must lie in -2 … 1: got 2"),
        ((4, 4), -3, ValueError, "axis must lie in -2 … 1: got -3"),
        ((4, 4), 1.0, TypeError, "axis must be an integer: got 1.0"),
        ((4, 4), None, TypeError, "axis must be an integer: got None"),
    ],
)
def test_what_cannot_be_transformed_is_refused(xp, shape, axis, error, message):
    with pytest.raises(error, match=message):
        fwht(xp.array(numpy.ones(shape)), axis)


def test_lists_are_refused():
    with pytest.raises(TypeError, match=r"got builtins\.list"):
        fwht([1.0, 2.0])


def test_the_next_power_of_two():
    assert [next_power_of_two(n) for n in range(1, 10)] == [1, 2, 4, 4, 8, 8, 8, 8, 16]
    assert next_power_of_two(2**62 + 1) == 2**63


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize(
    ("p", "n"),
    [(1, 1), (1, 8), (3, 4), (3, 16), (4, 16), (8, 8), (5, 512), (300, 1024), (512, 512)],
)
def test_padding_and_cropping_are_slices_of_the_matrix(xp, p, n, scale):
    x, y = draw(2, 3, p), draw(2, 3, n, seed=1)
    wide = transform_padded(xp.array(x), n, scale)
    narrow = transform_cropped(xp.array(y), p, scale)
    assert xp.owns(wide)
    assert xp.owns(narrow)
    wide, narrow = xp.to_numpy(wide), xp.to_numpy(narrow)
    assert_allclose(wide, scale * x @ hadamard(n)[:p], rtol=0, atol=1e-11)
    assert_allclose(narrow, scale * y @ hadamard(n)[:, :p], rtol=0, atol=1e-11)
    assert_allclose(numpy.vdot(wide, y), numpy.vdot(x, narrow), rtol=0, atol=1e-9)
