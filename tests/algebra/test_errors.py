"""Plans refuse factors and inputs that do not belong to them, by name."""

from __future__ import annotations

import numpy
import pytest

import superlora as sl
from tests.strategies import Mixing, draw_factors

SHAPES = {"q": (6, 4), "v": (6, 4)}

CALLS = {
    "delta": lambda plan, factors, x: plan.delta(factors, "v"),
    "deltas": lambda plan, factors, x: plan.deltas(factors),
    "apply": lambda plan, factors, x: plan.apply(factors, "v", x),
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)

SPECS = {
    "lora": sl.lora(rank=2),
    "mixing": sl.lora(rank=2, fold="balanced", map=Mixing()),
}
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@specs
@calls
def test_a_missing_block_is_named(xp, spec, call):
    plan = sl.Plan(spec, SHAPES)
    factors = xp.arrays(draw_factors(plan))
    del factors["1.0.factor1"]
    message = "factors must hold '1.0.factor1', a block of 'v': it is missing"
    with pytest.raises(ValueError, match=message):
        call(plan, factors, xp.array(numpy.ones((3, 4))))


@specs
@calls
def test_a_block_of_the_wrong_shape_is_named(xp, spec, call):
    plan = sl.Plan(spec, SHAPES)
    factors = xp.arrays(draw_factors(plan))
    rows, rank = plan.factor_shapes["1.0.factor0"]
    factors["1.0.factor0"] = factors["1.0.factor0"].T
    shapes = rf"must have shape \({rows}, {rank}\): got \({rank}, {rows}\)"
    with pytest.raises(ValueError, match=rf"factors\['1\.0\.factor0'\] {shapes}"):
        call(plan, factors, xp.array(numpy.ones((3, 4))))


@pytest.mark.parametrize("call", [CALLS["delta"], CALLS["apply"]], ids=["delta", "apply"])
def test_blocks_of_other_groups_are_not_asked_for(xp, call):
    plan = sl.Plan(sl.lora(rank=2), SHAPES)
    factors = xp.arrays(draw_factors(plan))
    mine = {name: factors[name] for name in plan.blocks_of("v")}
    assert set(mine) == {"1.0.factor0", "1.0.factor1"}
    assert tuple(call(plan, mine, xp.array(numpy.ones((3, 4)))).shape)[-1] in (4, 6)


@pytest.mark.parametrize("method", ["delta", "apply", "blocks_of"])
def test_an_unknown_weight_is_named(method):
    plan = sl.Plan(sl.lora(rank=2), SHAPES)
    arguments = {
        "delta": (draw_factors(plan), "k"),
        "apply": (draw_factors(plan), "k", numpy.ones((3, 4))),
        "blocks_of": ("k",),
    }
    with pytest.raises(KeyError, match="no weight is named 'k'; the plan has 'q', 'v'"):
        getattr(plan, method)(*arguments[method])


@pytest.mark.parametrize("rank", [2, "full"])  # applied as factors, and formed
@pytest.mark.parametrize("shape", [(3, 5), (4, 3), (), (1,)])
def test_inputs_of_the_wrong_width_are_refused(xp, rank, shape):
    plan = sl.Plan(sl.lora(rank=rank), SHAPES)
    message = (
        "x must have 4 entries in its last axis, the input width of 'v': got shape "
        rf"\({', '.join(map(str, shape))}"
    )
    with pytest.raises(ValueError, match=message):
        plan.apply(xp.arrays(draw_factors(plan)), "v", xp.array(numpy.ones(shape)))


def other_library(xp):
    """Return a function that makes arrays of another library than `xp`."""
    if xp.name != "numpy":
        return numpy.asarray
    return pytest.importorskip("torch").tensor


@specs
@calls
@pytest.mark.parametrize("changed", ["1.0.factor0", "1.0.factor1"])
def test_factors_of_two_libraries_are_refused(xp, spec, call, changed):
    plan = sl.Plan(spec, SHAPES)
    double = draw_factors(plan)
    factors = {**xp.arrays(double), changed: other_library(xp)(double[changed])}
    with pytest.raises(TypeError, match=r"arrays must be of one library: got .* and "):
        call(plan, factors, xp.array(numpy.ones((3, 4))))


@pytest.mark.parametrize("rank", [2, "full"])
def test_inputs_of_another_library_are_refused(xp, rank):
    plan = sl.Plan(sl.lora(rank=rank), SHAPES)
    factors = xp.arrays(draw_factors(plan))
    with pytest.raises(TypeError, match=r"arrays must be of one library: got .* and "):
        plan.apply(factors, "v", other_library(xp)(numpy.ones((3, 4))))


@pytest.mark.parametrize("cored", [True, False])
@pytest.mark.parametrize("changed", [0, 1])
def test_tucker_of_two_libraries_is_refused(xp, cored, changed):
    factors = [xp.array(numpy.ones((3, 2))), xp.array(numpy.ones((4, 2)))]
    factors[changed] = other_library(xp)(numpy.ones((3, 2)))
    with pytest.raises(TypeError, match=r"arrays must be of one library: got .* and "):
        sl.tucker(xp.array(numpy.ones((2, 2))) if cored else None, factors)


def test_kronecker_of_two_libraries_is_refused(xp):
    ones = numpy.ones((2, 2))
    with pytest.raises(TypeError, match=r"arrays must be of one library: got .* and "):
        sl.kronecker([xp.array(ones), other_library(xp)(ones)])


@pytest.mark.parametrize("factor", [[[1.0, 2.0]], 3.0, "factors"])
def test_what_is_no_array_is_refused(factor):
    with pytest.raises((TypeError, AttributeError)):
        sl.tucker(None, [factor, factor])
