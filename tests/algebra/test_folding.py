"""Fold and unfold: row-major, inverse to each other, each the other's adjoint."""

from __future__ import annotations

import math

import numpy
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import superlora as sl
from tests import oracles

CASES = [(1, (1,)), (5, (5,)), (5, (2, 3)), (6, (2, 3)), (7, (2, 2, 2)), (23, (2, 3, 2, 2))]
cases = pytest.mark.parametrize(("size", "fold"), CASES)


def draw(*shape, seed=0):
    return numpy.random.default_rng(seed).standard_normal(shape)


@cases
def test_fold_fills_row_by_row_then_zeros(xp, size, fold):
    vector = draw(size)
    tensor = sl.fold_group(xp.array(vector), fold)
    assert xp.owns(tensor)
    assert_array_equal(xp.to_numpy(tensor), oracles.fold(vector, fold))


@cases
def test_unfold_reads_row_by_row_and_crops(xp, size, fold):
    tensor = draw(*fold)
    vector = sl.unfold_group(xp.array(tensor), size)
    assert xp.owns(vector)
    assert_array_equal(xp.to_numpy(vector), oracles.unfold(tensor, size))


@cases
def test_unfold_undoes_fold(xp, size, fold):
    vector = draw(size)
    again = sl.unfold_group(sl.fold_group(xp.array(vector), fold), size)
    assert_array_equal(xp.to_numpy(again), vector)


@cases
def test_unfold_is_the_adjoint_of_fold(xp, size, fold):
    x, y = draw(size), draw(*fold, seed=1)
    left = numpy.vdot(xp.to_numpy(sl.fold_group(xp.array(x), fold)), y)
    right = numpy.vdot(x, xp.to_numpy(sl.unfold_group(xp.array(y), size)))
    assert_allclose(left, right, rtol=1e-13)


def test_a_transposed_tensor_is_read_in_its_own_order(xp):
    tensor = xp.array(draw(3, 4)).T
    assert_array_equal(xp.to_numpy(sl.unfold_group(tensor, 12)), xp.to_numpy(tensor).ravel())


def test_a_fold_that_does_not_cover_is_refused(xp):
    message = r"fold must cover .*: expected at least 7 entries, got \(2, 3\) with 6"
    with pytest.raises(ValueError, match=message):
        sl.fold_group(xp.array(draw(7)), (2, 3))


def test_a_tensor_that_is_too_small_is_refused(xp):
    with pytest.raises(ValueError, match="size must be at most 6, the entries of x: got 7"):
        sl.unfold_group(xp.array(draw(2, 3)), 7)


def test_a_covering_fold_holds_zeros_alone_beyond_the_end(xp):
    tensor = xp.to_numpy(sl.fold_group(xp.array(1 + numpy.abs(draw(7))), (3, 4)))
    assert numpy.count_nonzero(tensor) == 7
    assert math.prod(tensor.shape) == 12
