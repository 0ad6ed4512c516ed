"""Merge operations against loops over plain numbers, and their adjoints by the dot test."""

from __future__ import annotations

import itertools

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import superlora as sl
from superlora.operations import GIVES_BIAS, OF_BIAS, adjoint, apply, change, changes, merge
from tests.conftest import LIBRARIES
from tests.pairs import pairwise
from tests.strategies import draw_factors

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
SHAPES = [(3, 5), (5, 3), (4, 4), (1, 3), (3, 1), (1, 1)]
every_operation = pytest.mark.parametrize("operation", sl.OPERATIONS)
PARAMETERS = {
    "operation": sl.OPERATIONS,
    "shape": SHAPES,
    "with_bias": {"bias": True, "no-bias": False},
    "xp": LIBRARIES,
}
every_pair = pairwise(PARAMETERS, indirect=["xp"])


def draw(shape, seed=0):
    """Draw a weight, a bias and a support for every operation."""
    generator = numpy.random.default_rng(seed)
    supports = {
        operation: generator.standard_normal(sl.support_shape(operation, shape))
        for operation in sl.OPERATIONS
    }
    return generator.standard_normal(shape), generator.standard_normal(shape[0]), supports


def by_loops(operation, s, weight, bias):
    """Return what one operation adds, entry by entry."""
    rows, columns = weight.shape
    if operation in OF_BIAS:
        found = numpy.zeros(rows)
        for o in range(rows):
            if operation == "weight_to_bias":
                found[o] = sum(weight[o, i] * s[i, 0] for i in range(columns))
            elif operation == "scale_bias":
                found[o] = 0.0 if bias is None else bias[o] * s[o, 0]
            else:
                found[o] = s[o, 0]
        return found
    found = numpy.zeros((rows, columns))
    for o, i in itertools.product(range(rows), range(columns)):
        if operation == "add_weight":
            found[o, i] = s[o, i]
        elif operation == "scale_weight":
            found[o, i] = weight[o, i] * s[o, i]
        elif operation == "right_weight":
            found[o, i] = sum(weight[o, j] * s[j, i] for j in range(columns))
        else:
            found[o, i] = sum(s[o, p] * weight[p, i] for p in range(rows))
    return found


def test_the_loops_know_every_operation():
    assert set(sl.OPERATIONS) == {
        "add_weight",
        "scale_weight",
        "right_weight",
        "left_weight",
        "weight_to_bias",
        "scale_bias",
        "add_bias",
    }
    assert GIVES_BIAS < OF_BIAS < set(sl.OPERATIONS)


@every_pair
def test_change_is_the_loop(xp, operation, shape, with_bias):
    weight, bias, supports = draw(shape)
    bias = bias if with_bias else None
    given_bias = None if bias is None else xp.array(bias)
    found = change(operation, xp.array(supports[operation]), xp.array(weight), given_bias)
    assert xp.owns(found)
    expected = by_loops(operation, supports[operation], weight, bias)
    assert found.shape == expected.shape
    assert_allclose(xp.to_numpy(found), expected, **CLOSE)


@pairwise({**PARAMETERS, "leading": [(), (2,), (2, 3)]}, indirect=["xp"])
def test_apply_is_the_product_with_the_change(xp, operation, shape, with_bias, leading):
    weight, bias, supports = draw(shape, 4)
    bias = bias if with_bias else None
    x = numpy.random.default_rng(5).standard_normal((*leading, shape[1]))
    arrays = [xp.array(each) for each in (x, supports[operation], weight)]
    found = apply(operation, *arrays, None if bias is None else xp.array(bias))
    assert xp.owns(found)
    moved = by_loops(operation, supports[operation], weight, bias)
    expected = moved if operation in OF_BIAS else x @ moved.T
    assert found.shape == expected.shape
    assert_allclose(xp.to_numpy(found), expected, **CLOSE)


def test_the_outputs_of_all_operations_are_those_of_the_merged_layer():
    weight, bias, supports = draw((3, 5))
    x = numpy.random.default_rng(6).standard_normal((4, 5))
    merged, shifted = merge(weight, bias, supports)
    parts = [apply(operation, x, own, weight, bias) for operation, own in supports.items()]
    assert_allclose(x @ weight.T + bias + sum(parts), x @ merged.T + shifted, **CLOSE)


@every_operation
def test_apply_refuses_what_does_not_fit(operation):
    weight, bias, supports = draw((3, 5))
    good = supports[operation]
    with pytest.raises(ValueError, match=f"the support of '{operation}' must have shape"):
        apply(operation, numpy.ones(5), numpy.ones((7, 7)), weight, bias)
    with pytest.raises(ValueError, match="x must have 5 entries in its last axis"):
        apply(operation, numpy.ones((2, 3)), good, weight, bias)
    with pytest.raises(TypeError):
        apply(operation, [1.0], good, weight, bias)


@every_pair
def test_adjoint_passes_the_dot_test(xp, operation, shape, with_bias):
    """<change(S), G> == <S, adjoint(G)> for random S and G."""
    weight, bias, supports = draw(shape, 1)
    bias = bias if with_bias else None
    support = supports[operation]
    moved = by_loops(operation, support, weight, bias)
    gradient = numpy.random.default_rng(2).standard_normal(moved.shape)
    arrays = [xp.array(gradient), xp.array(weight), None if bias is None else xp.array(bias)]
    back = adjoint(operation, *arrays)
    assert xp.owns(back)
    assert back.shape == support.shape
    forth = change(operation, xp.array(support), *arrays[1:])
    one = float((xp.to_numpy(forth) * gradient).sum())
    assert one == pytest.approx(float((support * xp.to_numpy(back)).sum()), rel=1e-12, abs=1e-12)
    assert (one != 0) == (operation != "scale_bias" or with_bias)


def test_adjoint_is_the_transpose_of_the_matrix_of_change():
    weight, bias, supports = draw((3, 2))
    for operation, support in supports.items():
        matrix = numpy.stack(
            [
                change(operation, unit.reshape(support.shape), weight, bias).ravel()
                for unit in numpy.eye(support.size)
            ],
            axis=1,
        )
        shape = change(operation, support, weight, bias).shape
        found = [
            adjoint(operation, unit.reshape(shape), weight, bias).ravel()
            for unit in numpy.eye(matrix.shape[0])
        ]
        assert_allclose(matrix, numpy.stack(found), **CLOSE)


chosen = st.lists(st.sampled_from(sl.OPERATIONS), unique=True)


@given(chosen, st.sampled_from(SHAPES), st.booleans(), st.integers(0, 9))
def test_merge_of_any_subset_is_the_sum_of_changes_of_the_base(operations, shape, biased, seed):
    weight, bias, supports = draw(shape, seed)
    bias = bias if biased else None
    kept = (weight.copy(), None if bias is None else bias.copy())
    taken = {operation: supports[operation] for operation in operations}
    found, found_bias = merge(weight, bias, taken)
    of_weight = [o for o in operations if o not in OF_BIAS]
    of_bias = [o for o in operations if o in OF_BIAS]
    expected = weight + sum(by_loops(o, supports[o], weight, bias) for o in of_weight)
    assert_allclose(found, expected, **CLOSE)
    if bias is None and not GIVES_BIAS.intersection(operations):
        assert found_bias is None
    else:
        start = numpy.zeros(shape[0]) if bias is None else bias
        total = start + sum(by_loops(o, supports[o], weight, bias) for o in of_bias)
        assert_allclose(found_bias, total, **CLOSE)
    assert_array_equal(weight, kept[0])
    assert bias is None or (bias == kept[1]).all()
    alone = changes(weight, bias, taken)
    assert (alone[0] is None) == (not of_weight)
    assert (alone[1] is None) == (found_bias is None or not of_bias)


def test_merge_on_every_library(xp):
    weight, bias, supports = draw((3, 4))
    arrays = {operation: xp.array(support) for operation, support in supports.items()}
    found = merge(xp.array(weight), xp.array(bias), arrays)
    for own, expected in zip(found, merge(weight, bias, supports), strict=True):
        assert xp.owns(own)
        assert_allclose(xp.to_numpy(own), expected, **CLOSE)


def test_any_order_of_the_mapping_gives_the_same_bits():
    weight, bias, supports = draw((3, 4))
    expected = merge(weight, bias, supports)
    generator = numpy.random.default_rng(0)
    for _ in range(20):
        keys = generator.permutation(list(supports)).tolist()
        found = merge(weight, bias, {key: supports[key] for key in keys})
        assert_array_equal(found[0], expected[0])
        assert_array_equal(found[1], expected[1])


def test_changes_are_linear_in_the_support_and_none_sees_another():
    weight, bias, supports = draw((3, 4))
    for operation, support in supports.items():
        once = change(operation, support, weight, bias)
        assert_allclose(change(operation, -2.5 * support, weight, bias), -2.5 * once, **CLOSE)
    pair = {operation: supports[operation] for operation in ("right_weight", "add_weight")}
    both = merge(weight, bias, pair)[0]
    parts = [merge(weight, bias, {key: support})[0] for key, support in pair.items()]
    assert_allclose(both - weight, sum(part - weight for part in parts), **CLOSE)


def test_plan_merge_is_the_merge_of_its_deltas(xp):
    shapes = {"q": (4, 3), "o": (3, 4)}
    plan = sl.Plan(sl.glora(2, product="matrix", scale_bias="constant"), shapes)
    factors = draw_factors(plan)
    for layer, shape in shapes.items():
        weight, bias, _ = draw(shape, 3)
        supports = {
            operation: plan.delta(factors, name)
            for operation, name in plan.layout.supports[layer].items()
        }
        own = plan.merge(xp.arrays(factors), layer, xp.array(weight), xp.array(bias))
        doubled = plan.merge(factors, layer, weight, bias, scale=2.0)
        start = (weight, bias)
        for found, twice, base, expected in zip(
            own, doubled, start, merge(weight, bias, supports), strict=True
        ):
            assert_allclose(xp.to_numpy(found), expected, **CLOSE)
            assert_allclose(twice - base, 2 * (expected - base), **CLOSE)
    with pytest.raises(KeyError, match="no layer is named 'k'"):
        plan.merge(factors, "k", weight, bias)


def test_plan_merge_of_a_single_spec_adds_its_update():
    plan = sl.Plan(sl.lora(2), {"q": (4, 3)})
    factors = draw_factors(plan)
    weight, bias, _ = draw((4, 3))
    merged, same = plan.merge(factors, "q", weight, bias)
    assert_allclose(merged, weight + plan.delta(factors, "q"), **CLOSE)
    assert_allclose(same, bias)
    assert same is not bias


def test_jax_traces_and_differentiates_a_merge():
    jax = pytest.importorskip("jax")
    from tests import conftest

    weight, bias, supports = draw((3, 4))
    with conftest.jax_x64():
        flat = {key: jax.numpy.asarray(support) for key, support in supports.items()}

        def total(found):
            merged, shift = merge(jax.numpy.asarray(weight), jax.numpy.asarray(bias), found)
            return (merged**3).sum() + (shift**3).sum()

        value, slopes = jax.jit(jax.value_and_grad(total))(flat)
        merged, shift = merge(weight, bias, supports)
        assert float(value) == pytest.approx((merged**3).sum() + (shift**3).sum())
        for operation, slope in slopes.items():
            gradient = 3 * (shift if operation in OF_BIAS else merged) ** 2
            assert_allclose(slope, adjoint(operation, gradient, weight, bias), rtol=1e-10)


@every_operation
def test_a_support_of_another_shape_is_refused(operation):
    weight, bias, supports = draw((3, 5))
    support = supports[operation]
    for wrong in (support[:-1], support.T if support.shape[0] != support.shape[1] else support[1:]):
        for call in (
            lambda wrong=wrong: change(operation, wrong, weight, bias),
            lambda wrong=wrong: merge(weight, bias, {operation: wrong}),
        ):
            with pytest.raises(ValueError, match=f"support of '{operation}' must have shape"):
                call()
    with pytest.raises(ValueError, match="must have shape"):
        change(operation, support.ravel(), weight, bias)


@every_operation
def test_a_weight_or_bias_of_another_shape_is_refused(operation):
    weight, bias, supports = draw((3, 5))
    support = supports[operation]
    moved = change(operation, support, weight, bias)
    for wrong in (bias[:1], bias[:, None], numpy.zeros(5)):
        for call in (
            lambda wrong=wrong: change(operation, support, weight, wrong),
            lambda wrong=wrong: adjoint(operation, moved, weight, wrong),
            lambda wrong=wrong: merge(weight, wrong, {operation: support}),
        ):
            with pytest.raises(ValueError, match=r"bias must have shape \(3,\): got"):
                call()
    with pytest.raises(ValueError, match="weight must have two axes"):
        change(operation, support, weight[None], bias)
    with pytest.raises(ValueError, match="gradient must have shape"):
        adjoint(operation, moved[..., :1], weight, bias)


def test_an_unknown_operation_is_refused_with_a_hint():
    weight, bias, supports = draw((3, 5))
    support = supports["scale_weight"]
    for call in (
        lambda: change("scale_weights", support, weight, bias),
        lambda: adjoint("scale_weights", weight, weight, bias),
        lambda: merge(weight, bias, {"scale_weights": support}),
        lambda: sl.support_shape("scale_weights", (3, 5)),
    ):
        with pytest.raises(ValueError, match="did you mean 'scale_weight'") as caught:
            call()
        assert "add_bias" in str(caught.value)


@every_operation
def test_arrays_of_two_libraries_are_refused(operation):
    torch = pytest.importorskip("torch")
    weight, bias, supports = draw((3, 5))
    with pytest.raises(TypeError):
        change(operation, torch.tensor(supports[operation]), weight, bias)
    with pytest.raises(TypeError):
        change(operation, supports[operation], weight, torch.tensor(bias))
    with pytest.raises(TypeError):
        merge(weight, torch.tensor(bias), {operation: supports[operation]})
