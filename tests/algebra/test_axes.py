"""Updates of weights with windows and stacks: those of their matrices, in their own shape."""

from __future__ import annotations

import numpy
import pytest

import superlora as sl
from superlora._backend import backend_of
from tests.strategies import draw_factors, make_plan

CONV = sl.Axes(out=6, in_=2, window=(3, 2))
SERIES = sl.Axes(out=6, in_=4, window=3)
EXPERTS = sl.Axes(stack=3, out=6, in_=4)
KINDS = {"conv": CONV, "series": SERIES, "experts": EXPERTS}
# One group for a whole weight, so that its matrix has the same one.
WHOLE = {
    "lora": sl.lora(2),
    "lokr": sl.lokr(1),
    "loha": sl.loha(2),
    "dense": sl.dense(),
    "balanced": sl.lora(2, fold="balanced"),
    "aligned": sl.Spec(rank=2, order=3, fold="aligned"),
    "all": sl.lorta(rank=2, order=3, groups=1),
    "cut": sl.Spec(rank=2, groups=4, fold="balanced"),
    "fourier": sl.fourierft(5),
    "ia3-like": sl.Spec(rank="full", order=1, map=sl.maps.Broadcast(along="inputs")),
    "shuffled": sl.lora(2, fold="balanced", map=sl.maps.Shuffle()),
}


def matrices(shapes):
    return {name: axes.matrix for name, axes in shapes.items()}


@pytest.mark.parametrize("spec", WHOLE.values(), ids=WHOLE)
def test_a_convolution_has_the_update_of_its_matrix(spec):
    shapes = {"conv": CONV, "series": SERIES}
    plan, flat = make_plan(spec, shapes), make_plan(spec, matrices(shapes))
    assert plan.factor_shapes == flat.factor_shapes
    factors = draw_factors(plan)
    assert {n: v.tobytes() for n, v in plan.init().items()} == {
        n: v.tobytes() for n, v in flat.init().items()
    }
    deltas, expected = plan.deltas(factors), flat.deltas(factors)
    for name, axes in shapes.items():
        own = plan.delta(factors, name)
        assert own.shape == deltas[name].shape == axes.shape
        numpy.testing.assert_array_equal(own, flat.delta(factors, name).reshape(axes.shape))
        numpy.testing.assert_array_equal(deltas[name], expected[name].reshape(axes.shape))


@pytest.mark.parametrize("name", ["balanced", "aligned", "all", "cut", "shuffled"])
def test_a_stack_that_is_one_group_has_the_update_of_its_matrix(name):
    plan, flat = (make_plan(WHOLE[name], {"e": each}) for each in (EXPERTS, EXPERTS.matrix))
    factors = draw_factors(flat)
    numpy.testing.assert_array_equal(
        plan.delta(factors, "e"), flat.delta(factors, "e").reshape(3, 6, 4)
    )


@pytest.mark.parametrize("spec", [WHOLE[n] for n in ("lora", "lokr", "loha", "dense", "fourier")])
def test_a_stack_has_an_update_for_each_entry_as_if_each_were_a_weight(spec):
    axes = sl.Axes(stack=(2, 2), out=6, in_=2, window=2)
    plan = make_plan(spec, {"q": (6, 4), "e": axes, "v": (3, 4)})
    each = {"q": (6, 4), **{f"e{i}": (6, 4) for i in range(4)}, "v": (3, 4)}
    apart = make_plan(spec, each)
    assert plan.factor_shapes == apart.factor_shapes
    for name, value in plan.init(seed=3).items():
        numpy.testing.assert_array_equal(value, apart.init(seed=3)[name])
    factors = draw_factors(plan)
    expected = numpy.stack([apart.delta(factors, f"e{i}") for i in range(4)])
    numpy.testing.assert_array_equal(plan.delta(factors, "e"), expected.reshape(2, 2, 6, 2, 2))
    numpy.testing.assert_array_equal(plan.deltas(factors)["v"], apart.delta(factors, "v"))


def test_a_stack_that_is_a_mode_is_that_of_weights_in_one_group():
    spec = sl.Spec(rank=2, order=3, fold="stack")
    plan = sl.Plan(spec, {"e": EXPERTS})
    apart = sl.Plan(spec.replace(groups=1), {f"{i}": (6, 4) for i in range(3)})
    assert plan.factor_shapes == apart.factor_shapes
    factors = draw_factors(plan)
    expected = numpy.stack([apart.delta(factors, f"{i}") for i in range(3)])
    numpy.testing.assert_allclose(plan.delta(factors, "e"), expected, rtol=1e-12, atol=1e-12)


def test_the_array_library_stays(xp):
    plan = sl.Plan(sl.lora(2), KINDS)
    factors = {name: xp.array(value) for name, value in draw_factors(plan).items()}
    for name, delta in plan.deltas(factors).items():
        assert tuple(delta.shape) == KINDS[name].shape
        assert backend_of(delta) is backend_of(*factors.values())


@pytest.mark.parametrize("name", KINDS)
def test_only_plain_matrices_are_applied_to_inputs(name):
    plan = sl.Plan(sl.lora(1), KINDS)
    factors, x = plan.init(), numpy.ones((2, 4), numpy.float32)
    message = rf"'{name}' must be a matrix .*: it has shape .*; form its update with Plan.delta"
    with pytest.raises(ValueError, match=message):
        plan.apply(factors, name, x)
    with pytest.raises(ValueError, match=message):
        plan.low_rank(factors, name)


@pytest.mark.parametrize("name", KINDS)
def test_merging_adds_the_update(name):
    plan = sl.Plan(sl.lora(1), KINDS)
    factors, shape = draw_factors(plan), KINDS[name].shape
    weight = numpy.random.default_rng(0).standard_normal(shape)
    bias = numpy.ones(shape[:2] if name == "experts" else shape[:1])
    merged, same = plan.merge(factors, name, weight, bias)
    numpy.testing.assert_allclose(merged, weight + plan.delta(factors, name))
    numpy.testing.assert_array_equal(same, bias)
    assert same is not bias
    with pytest.raises(ValueError, match="weight must have shape"):
        plan.merge(factors, name, weight.reshape(KINDS[name].matrix))


def test_operations_that_do_not_ask_how_inputs_meet_a_convolution():
    rank = sl.lora(1)
    designs = {
        "add_weight": rank,
        "scale_weight": rank,
        "left_weight": rank,
        "add_bias": sl.dense(),
    }
    plan = make_plan(designs, {"conv": CONV})
    assert plan.shapes == {
        "add_weight.conv": (6, 2, 3, 2),
        "scale_weight.conv": (6, 2, 3, 2),
        "left_weight.conv": (6, 6),
        "add_bias.conv": (6, 1),
    }
    factors = draw_factors(plan)
    add, scale, left, shift = (plan.delta(factors, f"{op}.conv") for op in designs)
    weight = numpy.random.default_rng(0).standard_normal(CONV.shape)
    merged, bias = plan.merge(factors, "conv", weight)
    expected = weight + weight * scale + add + numpy.einsum("ab,bcde->acde", left, weight)
    numpy.testing.assert_allclose(merged, expected)
    numpy.testing.assert_allclose(bias, shift[:, 0])


@pytest.mark.parametrize("spec", [{"add_weight": sl.dense(), "scale_weight": "add_weight"},
                                  {"add_weight": sl.dense(fold="balanced"),
                                   "scale_weight": "add_weight"}])  # fmt: skip
def test_operations_of_a_stack_share_the_entries_of_each_of_its_weights(spec):
    plan = sl.Plan(spec, {"e": EXPERTS})
    factors = draw_factors(sl.Plan(sl.dense(fold=spec["add_weight"].fold), {"e": EXPERTS}))
    assert plan.factor_shapes == {name: value.shape for name, value in factors.items()}
    add, scale = (plan.delta(factors, f"{operation}.e") for operation in spec)
    numpy.testing.assert_array_equal(add, scale)
    numpy.testing.assert_array_equal(add.reshape(-1), numpy.concatenate([*factors.values()]))


def test_singular_vectors_are_those_of_each_matrix():
    generator = numpy.random.default_rng(0)
    weights = {name: generator.standard_normal(axes.shape) for name, axes in KINDS.items()}
    plan = sl.Plan(sl.lora_xs(2), KINDS)
    found = plan.frozen(weights, like=numpy.float64)
    parts = {"experts": weights["experts"]}
    parts |= {name: weights[name].reshape(1, 6, 12) for name in ("conv", "series")}
    flat = [matrix for name in KINDS for matrix in parts[name]]
    apart = sl.Plan(sl.lora_xs(2), {str(i): matrix.shape for i, matrix in enumerate(flat)})
    expected = apart.frozen({str(i): matrix for i, matrix in enumerate(flat)}, like=numpy.float64)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        numpy.testing.assert_array_equal(value, expected[name])
    with pytest.raises(ValueError, match=r"weights\['experts'\] must have shape \(3, 6, 4\)"):
        plan.frozen({**weights, "experts": weights["experts"].reshape(18, 4)})
