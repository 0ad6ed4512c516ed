"""The Kronecker product of tensors against loops, numpy and its algebra."""

from __future__ import annotations

import functools

import numpy
import pytest
from numpy.testing import assert_allclose

import superlora as sl
from tests import oracles

CLOSE = {"rtol": 1e-12, "atol": 1e-12}

SHAPES = [
    [(3,), (4,)],
    [(3,), (2,), (2,), (3,)],
    [(2, 3)],
    [(2, 3), (4, 1)],
    [(2, 3), (1, 1), (3, 2)],
    [(2, 3, 2), (2, 1, 3)],
    [(2, 1, 2), (1, 3, 2), (2, 2, 1)],
    [(2, 2, 1, 2, 2), (1, 2, 2, 1, 2)],
]
several = pytest.mark.parametrize("shapes", SHAPES, ids=str)


def draw(shapes, seed=0):
    generator = numpy.random.default_rng(seed)
    return [generator.standard_normal(shape) for shape in shapes]


def product(xp, tensors):
    result = sl.kronecker([xp.array(tensor) for tensor in tensors])
    assert xp.owns(result)
    return xp.to_numpy(result)


@several
def test_kronecker_is_the_product_over_the_digits(xp, shapes):
    tensors = draw(shapes)
    assert_allclose(product(xp, tensors), oracles.kronecker(tensors), **CLOSE)


@several
def test_kronecker_is_numpys_for_equal_orders(xp, shapes):
    tensors = draw(shapes)
    assert_allclose(product(xp, tensors), functools.reduce(numpy.kron, tensors), **CLOSE)


def test_kronecker_is_associative(xp):
    a, b, c = draw([(2, 3, 2), (3, 1, 2), (2, 2, 2)])
    whole = product(xp, [a, b, c])
    assert_allclose(product(xp, [product(xp, [a, b]), c]), whole, **CLOSE)
    assert_allclose(product(xp, [a, product(xp, [b, c])]), whole, **CLOSE)


def test_kronecker_does_not_commute(xp):
    a, b = draw([(2, 3), (3, 2)])
    assert numpy.abs(product(xp, [a, b]) - product(xp, [b, a])).max() > 0.1


def test_the_product_of_two_matrices_is_mixed(xp):
    a, b, c, d = draw([(2, 3), (4, 2), (3, 2), (2, 5)])
    left = product(xp, [a, b]) @ product(xp, [c, d])
    assert_allclose(left, product(xp, [a @ c, b @ d]), **CLOSE)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_kronecker_of_tucker_tensors_is_the_tucker_tensor_of_kronecker_products(xp, order):
    sizes = [(2, 3, 2)[:order], (3, 1, 2)[:order], (2, 2, 3)[:order]]
    ranks = [(2, 2, 1)[:order], (1, 2, 2)[:order], (2, 1, 2)[:order]]
    cores = draw(ranks)
    planes = [draw(list(zip(*pair, strict=True))) for pair in zip(sizes, ranks, strict=True)]
    splits = [
        xp.to_numpy(sl.tucker(xp.array(core), [xp.array(plane) for plane in factors]))
        for core, factors in zip(cores, planes, strict=True)
    ]
    joined = [product(xp, [factors[mode] for factors in planes]) for mode in range(order)]
    one = sl.tucker(xp.array(product(xp, cores)), [xp.array(plane) for plane in joined])
    assert_allclose(product(xp, splits), xp.to_numpy(one), **CLOSE)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([], "tensors must hold at least one tensor: got none"),
        ([(2, 3), (2,)], r"tensors\[1\] must have 2 modes like tensors\[0\]: got shape \(2,\)"),
        ([(2,), (2,), (2, 1)], r"tensors\[2\] must have 1 modes .*: got shape \(2, 1\)"),
    ],
)
def test_tensors_of_different_orders_are_refused(xp, shapes, message):
    with pytest.raises(ValueError, match=message):
        sl.kronecker([xp.array(tensor) for tensor in draw(shapes)])
