"""Tensor trains: the updates of every fold, grouping and product with one, against loops."""

from __future__ import annotations

import numpy
import pytest
import tensorly
from numpy.testing import assert_allclose

import superlora as sl
from tests import oracles
from tests.strategies import Mixing, draw_factors, make_plan

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
ONE = {"q": (6, 4)}
SAME = {"0.q": (6, 4), "0.v": (6, 4), "1.q": (6, 4)}
MIXED = {"0.q": (6, 4), "0.v": (2, 4), "1.q": (5, 8)}
PRIME = {"0.q": (7, 5), "1.q": (3, 11)}


def train(**fields):
    return sl.Spec(**{"core": "train", "rank": 2, **fields})


ROWS = {
    "a matrix": (train(scale=-2), PRIME),
    "a matrix in digits": (train(order=4, rank=(2, 3, 2)), SAME),
    "ranks of 1": (train(order=3, rank=1), MIXED),
    "full ranks": (train(order=4, rank=("full",) * 3), ONE),
    "lowered": (train(order=5, rank=99), ONE),
    "a stack": (train(order=3, rank=(3, 4), groups=1, fold="stack"), SAME),
    "a stack of rows": (train(rank=3, groups=3, fold="stack"), SAME),
    "layers, matrices": (train(order=4, groups=1, fold=(1, 3, 6, 4), rank=(1, 2, 4)), SAME),
    "aligned": (train(order=3, groups=1, fold="aligned"), MIXED),
    "cut anywhere": (train(order=3, groups=5, fold="balanced"), MIXED),
    "by layer, padded": (train(order=4, groups=2, fold="balanced", cut="pad"), PRIME),
    "mixed by a map": (train(order=3, groups=1, fold="balanced", map=Mixing(4), ratio=0.5), MIXED),
    "a Kronecker product of trains": (train(order=2, splits=2, groups=1, fold="stack"), SAME),
    "a Kronecker product of matrices": (train(splits=2), SAME),
    "train and Tucker": (
        train(order=3, splits=2, core=("train", "full"), groups=1, fold="balanced"),
        MIXED,
    ),
    "CP and train, aligned": (
        train(order=3, splits=2, core=("identity", "train"), groups=1, fold="aligned"),
        {"q": (6, 8), "v": (4, 8)},
    ),
    "a Hadamard product": (
        train(order=3, splits=2, combine="hadamard", core=("train", "diagonal"), fold="aligned"),
        MIXED,
    ),
    "of lower order": (
        train(order=(2, 4), splits=2, combine="hadamard", groups=2, fold="balanced"),
        MIXED,
    ),
    "of lower order, Kronecker": (
        train(order=(3, 2), splits=2, fold=((2, 1, 2), (3, 2, 1)), core=("full", "train")),
        ONE,
    ),
    "terms": (train(order=3, terms=3), MIXED),
    "tied": (train(order=3, tied=["0.core1", "0.core2"]), MIXED),
    "frozen": (train(order=3, frozen={"0.core0": "ones", "0.core2": "random"}), MIXED),
    "made by a map": (train(order=3, factor_map=Mixing(3), factor_size=7), MIXED),
}
rows = pytest.mark.parametrize(("spec", "shapes"), ROWS.values(), ids=ROWS)


def test_the_loops_are_tensorlys_train():
    generator = numpy.random.default_rng(0)
    shapes = [(1, 2, 3), (3, 4, 2), (2, 1, 2), (2, 3, 1)]
    cores = [generator.standard_normal(shape) for shape in shapes]
    expected = numpy.einsum("aib,bjc,ckd,dle->ijkl", *cores)
    assert_allclose(oracles.train(cores), expected, **CLOSE)
    assert_allclose(tensorly.tt_to_tensor(cores), expected, **CLOSE)


@rows
def test_updates_are_those_of_the_loops(xp, spec, shapes):
    plan = make_plan(spec, shapes)
    factors = draw_factors(plan)
    if spec.factor_map is not None:
        generator = numpy.random.default_rng(1)
        factors |= {n: generator.standard_normal(s) for n, s in plan.factor_shapes.items()}
        factors = {name: factors[name] for name in plan.layout.input_shapes}
    expected = oracles.deltas(plan, factors)
    arrays = xp.arrays(factors)
    deltas = plan.deltas(arrays)
    for name, shape in plan.shapes.items():
        for delta in (deltas[name], plan.delta(arrays, name)):
            assert xp.owns(delta)
            assert tuple(delta.shape) == shape
            assert_allclose(xp.to_numpy(delta), expected[name], **CLOSE)


@rows
def test_outputs_are_those_of_the_updates(xp, spec, shapes):
    plan = make_plan(spec, shapes)
    factors = draw_factors(plan)
    factors |= {n: numpy.ones(s) for n, s in plan.factor_shapes.items() if n not in factors}
    arrays = xp.arrays({name: factors[name] for name in plan.layout.input_shapes})
    for name, (_, inputs) in plan.shapes.items():
        x = numpy.random.default_rng(5).standard_normal((2, 3, inputs))
        expected = x @ xp.to_numpy(plan.delta(arrays, name)).T
        for how in ("auto", "formed"):
            assert_allclose(
                xp.to_numpy(plan.apply(arrays, name, xp.array(x), apply=how)), expected, **CLOSE
            )


@rows
def test_the_updates_start_at_zero(spec, shapes):
    plan = make_plan(spec, shapes)
    factors = plan.init(seed=3, like=numpy.float64) | plan.frozen(like=numpy.float64)
    if spec.factor_map is None:
        assert not any(delta.any() for delta in plan.deltas(factors).values())
