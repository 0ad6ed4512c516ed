"""The separable map: modes, their streams, and what it needs of memory."""

from __future__ import annotations

import dataclasses
import functools
import re

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from superlora import maps
from superlora.maps import separable
from tests.maps.map_cases import as_double, as_dtype, draw, matrix_of, own

SIGNED = maps.Fastfood(seed=1, values="sign")


@given(st.data())
def test_it_is_the_kronecker_product_of_its_modes(data):
    order = data.draw(st.integers(1, 3))
    sizes = st.tuples(*[st.integers(1, 5)] * order)
    inner = data.draw(
        st.sampled_from([maps.Fastfood(seed=2), maps.Gaussian(seed=2, structured=True), SIGNED])
    )
    modes = data.draw(st.sets(st.integers(0, order - 1), min_size=1))
    before, after = data.draw(sizes), data.draw(sizes)
    after = tuple(new if mode in modes else before[mode] for mode, new in enumerate(after))
    fixed = maps.Separable(inner=inner, modes=tuple(modes), before=before, after=after)
    size = data.draw(st.integers(1, int(numpy.prod(after))))
    entries = int(numpy.prod(before))
    x, y = draw(entries), draw(size, seed=1)
    parts = [
        matrix_of(own(inner, 4096, mode), old, new) if mode in modes else numpy.eye(old)
        for mode, (old, new) in enumerate(zip(before, after, strict=True))
    ]
    whole = functools.reduce(numpy.kron, parts)[:size]
    assert_allclose(fixed.apply(x, size), whole @ x, rtol=1e-10, atol=1e-10)
    assert_allclose(fixed.adjoint(y, entries), whole.T @ y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("dense", "dtype"),
    [(0, "float16"), *((1 << 24, dtype) for dtype in ("float64", "float32", "bfloat16"))],
)
def test_a_mode_is_mapped_along_any_axis(monkeypatch, xp, dense, dtype):
    if xp.name == "numpy" and dtype == "bfloat16":
        dtype = "float16"  # numpy has no bfloat16
    monkeypatch.setattr(separable, "_DENSE", dense)
    fixed = maps.Separable(inner=SIGNED)
    rtol = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}[dtype]
    matrix = matrix_of(own(SIGNED, 4096, 2), 5, 7)
    for axis in range(3) if dense else (1,):
        shape = [2, 1, 2]
        for width, size, expected in ((5, 7, matrix), (7, 5, matrix.T)):
            shape[axis] = width
            tensor = as_dtype(xp, draw(tuple(shape)), dtype)
            found = fixed.map_mode(tensor, axis, 2, size, adjoint=size == 5)
            assert found.dtype == tensor.dtype
            wide = numpy.moveaxis(as_double(xp, tensor), axis, -1) @ expected.T
            wide = numpy.moveaxis(wide, -1, axis)
            assert_allclose(as_double(xp, found), wide, rtol=rtol, atol=rtol)


def test_modes_draw_from_streams_of_their_own():
    nested = maps.Composed(first=maps.OneHot(), second=maps.Shuffle())
    for inner in (SIGNED, maps.OneHot(), maps.Gaussian(), nested):
        fixed = maps.Separable(inner=inner)
        found = [fixed.mode(index).apply(draw(6), 8) for index in range(4)]
        for first in range(3):
            for second in range(first + 1, 4):
                assert abs(found[first] - found[second]).max() > 1e-3


def test_a_map_without_a_seed_is_the_same_for_every_mode():
    fixed = maps.Separable(inner=maps.Broadcast(along="inputs"), before=(2, 3), after=(4, 6))
    expected = numpy.kron(numpy.repeat([1.0, 2.0], 2), numpy.repeat([1.0, 2.0, 3.0], 2))
    x = numpy.outer([1.0, 2.0], [1.0, 2.0, 3.0]).ravel()
    assert_array_equal(fixed.apply(x, 24), expected)


def test_groups_that_do_not_share_have_streams_of_their_own():
    fixed = maps.Separable(inner=maps.Fastfood(shared=False), before=(2, 3), after=(4, 4))
    bound = [fixed.bind(maps.Place(group, ((4, 4),), True)) for group in (0, 1, 2)]
    found = [part.apply(draw(6), 16) for part in bound]
    assert abs(found[0] - found[1]).max() > 1e-3
    assert abs(found[1] - found[2]).max() > 1e-3
    shared = dataclasses.replace(fixed, inner=maps.Fastfood())
    assert shared.bind(maps.Place(1, ((4, 4),), True)) is shared


@pytest.mark.parametrize(
    ("share", "after", "before"),
    [(0.5, (4, 6), (2, 3)), (0.3, (10, 7), (3, 3)), (1e-12, (4, 6), (1, 1)), (1.0, (4, 6), (4, 6))],
)
def test_the_sizes_before_are_rounded_up(share, after, before):
    assert maps.Separable().sizes_before(after, share) == before
    assert maps.Separable(modes=(1,)).sizes_before(after, share) == (after[0], before[1])


def test_joined_splits_have_the_modes_of_all():
    fixed = maps.Separable(modes=(1,), inner=SIGNED)
    joined = fixed.joined([((2, 3), (2, 4)), ((1, 2), (1, 4))])
    assert joined == maps.Separable(
        modes=(1, 3), inner=SIGNED, before=(2, 3, 1, 2), after=(2, 4, 1, 4)
    )


def test_a_kept_matrix_is_of_the_precision_in_use():
    fixed = maps.Separable(inner=SIGNED, before=(8, 8), after=(16, 16))
    fixed.apply(numpy.ones(64, numpy.float32), 256)
    kept = vars(fixed)["_constants"].values()
    assert {array.dtype for array in kept} == {numpy.dtype(numpy.float32)}
    assert sum(array.nbytes for array in kept) == fixed.nbytes(64, 256) // 2
    # What the modes' own maps draw is not kept beside their matrices.
    assert all("_constants" not in vars(fixed.mode(mode)) for mode in (0, 1))


def test_operations_and_bytes_are_those_of_the_products():
    fixed = maps.Separable(inner=SIGNED, before=(2, 3), after=(4, 5))
    assert fixed.operations(6, 20) == 2 * (4 * 2 * 3 + 4 * 5 * 3)
    assert fixed.nbytes(6, 20) == 8 * (2 * 4 + 3 * 5)
    assert maps.Separable().nbytes(6, 20) == 0


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"inner": 3}, TypeError, "inner must be a superlora.maps.Map: got 3"),
        ({"inner": maps.Identity()}, ValueError, "inner must be a map of one mode"),
        ({"inner": maps.Separable()}, ValueError, "inner must be a map of one mode"),
        ({"inner": maps.Shuffle(scope="all")}, ValueError, "inner must be a map of one group"),
        ({"modes": ()}, TypeError, "modes must be a tuple of integers: got ()"),
        ({"modes": 1}, TypeError, "modes must be a tuple of integers: got 1"),
        ({"modes": (0, 0)}, ValueError, "modes must all be different: got (0, 0)"),
        ({"modes": (0.5,)}, TypeError, "modes[0] must be an integer: got 0.5"),
        ({"modes": (-1,)}, ValueError, "modes[0] must be at least 0: got -1"),
        ({"before": (2,)}, ValueError, "before and after must be given together: got one of them"),
        ({"before": (2, 0), "after": (2, 2)}, ValueError, "before[1] must be at least 1: got 0"),
        ({"before": (2,), "after": (2, 2)}, ValueError, "before must have 2 modes"),
        (
            {"modes": (2,), "before": (2, 2), "after": (2, 2)},
            ValueError,
            "modes must be below 2, the order of the fold: got (2,)",
        ),
        (
            {"modes": (0,), "before": (2, 2), "after": (2, 3)},
            ValueError,
            "before[1] must be 3, the size after, in a mode without a map: got 2",
        ),
    ],
)
def test_wrong_fields_are_refused(fields, error, match):
    with pytest.raises(error, match=re.escape(match)):
        maps.Separable(**fields)


@pytest.mark.parametrize(
    ("fields", "before", "size", "match"),
    [
        ({}, 6, 6, "before and after must be given for a map outside a plan: got neither"),
        ({"before": (2, 2), "after": (3, 3)}, 6, 9, "before must have 6 entries, those of x"),
        ({"before": (2, 3), "after": (3, 3)}, 6, 10, "after must cover 10 entries: got (3, 3)"),
        (
            {"inner": maps.OneHot(), "before": (2, 3), "after": (3, 2)},
            6,
            6,
            "size must be at least 3, the entries before OneHot: got 2",
        ),
    ],
)
def test_sizes_that_are_not_those_of_the_modes_are_refused(fields, before, size, match):
    fixed = maps.Separable(**fields)
    for call in (
        lambda: fixed.apply(numpy.ones(before), size),
        lambda: fixed.adjoint(numpy.ones(size), before),
    ):
        with pytest.raises(ValueError, match=re.escape(match)):
            call()
