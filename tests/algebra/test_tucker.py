"""Tucker and CP reconstruction against loops, TensorLy and their algebra."""

from __future__ import annotations

import functools

import numpy
import pytest
import tensorly
from numpy.testing import assert_allclose

import superlora as sl
from tests import oracles
from tests.conftest import LIBRARIES
from tests.pairs import pairwise

CLOSE = {"rtol": 1e-12, "atol": 1e-12}

# sizes d_m, ranks r_m
SHAPES = [
    ((4,), (2,)),
    ((3, 4), (2, 3)),
    ((3, 4), (5, 1)),
    ((2, 3, 4), (2, 2, 3)),
    ((2, 1, 3, 2), (1, 1, 2, 3)),
    ((2, 3, 2, 2, 3), (2, 1, 2, 2, 2)),
]
orders = pytest.mark.parametrize(("sizes", "ranks"), SHAPES)


def draw(sizes, ranks, seed=0):
    generator = numpy.random.default_rng(seed)
    factors = [generator.standard_normal(shape) for shape in zip(sizes, ranks, strict=True)]
    return generator.standard_normal(ranks), factors


def reconstruct(xp, core, factors):
    result = sl.tucker(
        None if core is None else xp.array(core),
        [None if factor is None else xp.array(factor) for factor in factors],
    )
    assert xp.owns(result)
    return xp.to_numpy(result)


@orders
def test_tucker_is_the_sum_over_the_core(xp, sizes, ranks):
    core, factors = draw(sizes, ranks)
    tensor = reconstruct(xp, core, factors)
    assert_allclose(tensor, oracles.tucker(core, factors), **CLOSE)
    assert_allclose(tensor, tensorly.tucker_to_tensor((core, factors)), **CLOSE)


@orders
def test_a_mode_without_factor_is_multiplied_by_the_identity(xp, sizes, ranks):
    core, factors = draw(sizes, ranks)
    modes = range(len(sizes))
    for bare in [*((mode,) for mode in modes), tuple(modes)]:
        some = [None if mode in bare else factor for mode, factor in enumerate(factors)]
        full = [numpy.eye(r) if f is None else f for r, f in zip(ranks, some, strict=True)]
        tensor = reconstruct(xp, core, some)
        assert_allclose(tensor, tensorly.tucker_to_tensor((core, full)), **CLOSE)
        assert_allclose(oracles.tucker(core, some), tensor, **CLOSE)


@orders
def test_the_vector_is_the_kronecker_product_of_the_factors_times_the_cores(xp, sizes, ranks):
    core, factors = draw(sizes, ranks)
    matrix = functools.reduce(numpy.kron, factors)
    assert_allclose(reconstruct(xp, core, factors).ravel(), matrix @ core.ravel(), **CLOSE)


@orders
def test_tucker_is_linear_in_each_block(xp, sizes, ranks):
    core, factors = draw(sizes, ranks)
    core2, factors2 = draw(sizes, ranks, seed=1)
    blocks, others = [core, *factors], [core2, *factors2]
    for changed in range(len(blocks)):
        ends = []
        for block in (blocks[changed], others[changed], 2 * blocks[changed] - 3 * others[changed]):
            some = [*blocks[:changed], block, *blocks[changed + 1 :]]
            ends.append(reconstruct(xp, some[0], some[1:]))
        assert_allclose(ends[2], 2 * ends[0] - 3 * ends[1], **CLOSE)


@pairwise(
    {
        "rank": [1, 2, 5],
        "sizes": [(4,), (3, 4), (2, 3, 4), (2, 1, 3, 2), (2, 2, 2, 2, 3)],
        "xp": LIBRARIES,
    },
    indirect=["xp"],
)
def test_no_core_is_a_sum_of_rank_one_terms(xp, sizes, rank):
    _, factors = draw(sizes, (rank,) * len(sizes))
    tensor = reconstruct(xp, None, factors)
    assert_allclose(tensor, oracles.canonical(factors), **CLOSE)
    diagonal = numpy.zeros((rank,) * len(sizes))
    diagonal[(numpy.arange(rank),) * len(sizes)] = 1.0
    assert_allclose(tensor, oracles.tucker(diagonal, factors), **CLOSE)
    if len(sizes) > 1:  # TensorLy's own refuses one mode
        assert_allclose(tensor, tensorly.cp_to_tensor((None, factors)), **CLOSE)


def test_no_core_and_two_modes_is_loras_product(xp):
    _, (b, a) = draw((5, 4), (2, 2))
    assert_allclose(reconstruct(xp, None, [b, a]), b @ a.T, **CLOSE)


@pytest.mark.parametrize(
    ("core", "factors", "message"),
    [
        (None, [], "factors must hold one factor a mode: got none"),
        ((2, 2), [(3, 2)], "factors must hold one factor for each of 2 modes of core: got 1"),
        ((2, 2), [(3, 2)] * 3, "one factor for each of 2 modes of core: got 3"),
        ((2, 2), [(3, 2), (3, 3)], r"factors\[1\] must have rank 2 in mode 1: got shape \(3, 3\)"),
        ((2, 2), [None, (3, 1)], r"factors\[1\] must have rank 2 in mode 1: got shape \(3, 1\)"),
        ((2, 2), [(2,), (3, 2)], r"factors\[0\] must have two modes .*: got shape \(2,\)"),
        (None, [(3, 2), (4, 3)], r"factors\[1\] must have rank 2 in mode 1: got shape \(4, 3\)"),
        (None, [(3, 2), None], r"factors\[1\] must be an array where core is None: got None"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(xp, core, factors, message):
    with pytest.raises(ValueError, match=message):
        sl.tucker(
            None if core is None else xp.array(numpy.ones(core)),
            [None if shape is None else xp.array(numpy.ones(shape)) for shape in factors],
        )
