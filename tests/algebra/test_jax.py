"""Under jax's transformations: jit, grad, and vmap over many sets of factors."""

from __future__ import annotations

import numpy
import pytest
from numpy.testing import assert_allclose

import superlora as sl
from tests import conftest, oracles
from tests.strategies import Mixing, draw_factors, make_plan

jax = pytest.importorskip("jax")

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
SAME = {"0.q": (6, 4), "1.q": (6, 4)}

SPECS = {
    "lora": sl.lora(rank=2, alpha=3),
    "lokr": sl.lokr(rank=2),
    "lotr": sl.lotr(rank=2),
    "aligned cp": sl.Spec(rank=2, order=3, splits=2, core="identity", groups=1, fold="aligned"),
    "cut anywhere": sl.lorta(rank=2, groups=3),
    "mixing": sl.lora(rank=2, groups=1, fold="balanced", map=Mixing(), ratio=0.5),
    "loha": sl.loha(rank=2, scale=0.5),
    "vera": sl.vera(rank=3),
    "terms, tied": sl.Spec(
        rank=2, groups=3, fold="balanced", terms=2, tied=["0.factor0"], scale=0.3
    ),
    "diagonal": sl.Spec(rank=2, order=3, core="diagonal", groups=1, fold="aligned"),
    "overrides": sl.lora(rank=2, overrides={"1.*": {"terms": 2, "scale": 0.3}}),
}
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@pytest.fixture(autouse=True)
def _double_precision(_global_state_is_untouched):
    with conftest.jax_x64():
        yield


@specs
def test_jit_changes_nothing(spec):
    plan = make_plan(spec, SAME)
    factors = draw_factors(plan)
    expected = oracles.deltas(plan, factors)["1.q"]
    arrays = {name: jax.numpy.asarray(block) for name, block in factors.items()}
    x = numpy.random.default_rng(1).standard_normal((3, 4))
    delta = jax.jit(lambda blocks: plan.delta(blocks, "1.q"))(arrays)
    product = jax.jit(lambda blocks, x: plan.apply(blocks, "1.q", x))(arrays, x)
    assert_allclose(delta, expected, **CLOSE)
    assert_allclose(product, x @ expected.T, **CLOSE)


@specs
def test_vmap_evaluates_many_sets_of_factors_at_once(spec):
    plan = make_plan(spec, SAME)
    sets = [draw_factors(plan, seed) for seed in range(3)]
    batch = {name: jax.numpy.stack([some[name] for some in sets]) for name in sets[0]}
    x = numpy.random.default_rng(1).standard_normal((3, 2, 4))
    expected = [oracles.deltas(plan, some)["1.q"] for some in sets]
    deltas = jax.vmap(lambda blocks: plan.delta(blocks, "1.q"))(batch)
    assert_allclose(deltas, numpy.stack(expected), **CLOSE)
    products = jax.vmap(lambda blocks, x: plan.apply(blocks, "1.q", x))(batch, jax.numpy.asarray(x))
    assert_allclose(products, x @ numpy.stack(expected).swapaxes(1, 2), **CLOSE)


@specs
def test_grad_is_that_of_the_loops(spec):
    plan = make_plan(spec, SAME)
    factors = draw_factors(plan)
    weights = numpy.random.default_rng(2).standard_normal((6, 4))

    def score(blocks):
        return (plan.delta(blocks, "1.q") * weights).sum()

    slopes = jax.jit(jax.grad(score))({n: jax.numpy.asarray(b) for n, b in factors.items()})
    base = (oracles.deltas(plan, factors)["1.q"] * weights).sum()
    generator = numpy.random.default_rng(3)
    for name, block in factors.items():
        # Linear in each block, so that a whole step in one of them is its derivative.
        step = generator.standard_normal(block.shape)
        moved = oracles.deltas(plan, {**factors, name: block + step})["1.q"]
        assert_allclose((slopes[name] * step).sum(), (moved * weights).sum() - base, **CLOSE)
