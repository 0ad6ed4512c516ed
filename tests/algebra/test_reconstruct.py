"""The equation: every spec, every way to evaluate it, against loops."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

import superlora as sl
from superlora.algebra.form import apply_factored, group_tensor, joint_entries
from superlora.design.cost_rule import application
from superlora.design.network import row_slice
from tests import oracles
from tests.strategies import Mixing, Permuting, draw_factors, make_plan, problems

CLOSE = {"rtol": 1e-10, "atol": 1e-10}

ONE = {"q": (6, 4)}
SAME = {"0.q": (6, 4), "0.v": (6, 4), "1.q": (6, 4)}
MIXED = {"0.q": (6, 4), "0.v": (2, 4), "1.q": (5, 8)}
PRIME = {"0.q": (7, 5), "1.q": (3, 11)}

# Every kind of fold, of grouping, of rank and of split, for the libraries that
# are too slow to be asked hundreds of random questions.
ROWS = {
    "dense": (sl.dense(), PRIME),
    "lora": (sl.lora(rank=2, alpha=3), PRIME),
    "lora capped": (sl.lora(rank=5), ONE),
    "lokr": (sl.lokr(rank=2), SAME),
    "lokr of two": (sl.lokr(rank=1, decompose_both=True), SAME),
    "krona": (sl.krona(scale=-2), ONE),
    "lonkr": (sl.lonkr(rank=1, splits=3), {"q": (8, 12)}),
    "lotr": (sl.lotr(rank=2), SAME),
    "fact_tk": (sl.fact_tk(rank=2), SAME),
    "lorta 3": (sl.lorta(rank=2), MIXED),
    "lorta 5, by layer": (sl.lorta(rank=2, order=5, groups="layer"), MIXED),
    "cp, cut anywhere": (
        sl.Spec(rank=3, order=3, core="identity", groups=5, fold="balanced"),
        MIXED,
    ),
    "padded": (sl.lora(rank=2, groups=4, fold="balanced", cut="pad"), PRIME),
    "stack of rows": (sl.lora(rank=2, groups=3, fold="stack"), SAME),
    "aligned": (sl.Spec(rank=2, order=3, groups=1, fold="aligned"), MIXED),
    "aligned cp of two splits": (
        sl.Spec(rank=2, order=3, splits=2, core="identity", groups=1, fold="aligned"),
        {"q": (6, 8), "v": (4, 8)},
    ),
    "explicit": (sl.Spec(rank=(2, "full", 1), order=3, groups=1, fold=(4, 4, 5)), SAME),
    "mixing": (
        sl.lorta(rank=2, map=Mixing(4), ratio=0.5, scale=0.25),
        MIXED,
    ),
    "permuting": (sl.lora(rank=2, fold="balanced", map=Permuting(4), groups=2), PRIME),
    "lokr of a bounded split": (sl.lokr(rank=1, factor=2), SAME),
    "loha": (sl.loha(rank=2), {"q": (6, 5), "v": (9, 7)}),
    "vera": (sl.vera(rank=2), MIXED),
    "tinylora, one for all": (sl.tinylora(2, 3, tied=["0.factor0"]), SAME),
    "terms, tied and cut anywhere": (
        sl.Spec(rank=2, groups=3, fold="balanced", terms=2, tied=["0.factor0"], scale=0.3),
        PRIME,
    ),
    "splits of two orders": (
        sl.Spec(rank=(1, 2), order=(2, 3), splits=2, groups=1, fold=((3, 2, 2), (1, 2, 3))),
        SAME,
    ),
    "diagonal, hadamard, aligned": (
        sl.Spec(
            rank=2,
            order=3,
            splits=2,
            combine="hadamard",
            core=("diagonal", "full"),
            groups=1,
            fold="aligned",
        ),
        MIXED,
    ),
    "overrides": (
        sl.lora(
            rank=2, alpha=3, overrides={"v": {"rank": "full", "scale": -1}, "1.q": {"rank": 1}}
        ),
        MIXED,
    ),
}
FEW = ("lora", "lokr", "lotr", "aligned cp of two splits", "padded", "mixing", "loha", "overrides")

rows = pytest.mark.parametrize(("spec", "shapes"), ROWS.values(), ids=ROWS)
few_rows = pytest.mark.parametrize(("spec", "shapes"), [ROWS[key] for key in FEW], ids=FEW)


def examples(xp, base=100):
    """Ask jax, which compiles for every new shape, fewer questions."""
    share = {"numpy": 3.0, "jax": 0.02}.get(xp.name, 1.0)
    thorough = settings().max_examples / 60
    return settings(max_examples=max(1, round(base * share * thorough)))


def check_deltas(xp, plan, factors, expected):
    arrays = xp.arrays(factors)
    deltas = plan.deltas(arrays)
    assert list(deltas) == list(plan.shapes)
    for name, shape in plan.shapes.items():
        alone = plan.delta({block: arrays[block] for block in plan.blocks_of(name)}, name)
        for delta in (deltas[name], alone):
            assert xp.owns(delta)
            assert tuple(delta.shape) == shape
            assert_allclose(xp.to_numpy(delta), expected[name], **CLOSE)


def check_apply(xp, plan, factors, expected, leading=(2, 3)):
    arrays = xp.arrays(factors)
    generator = numpy.random.default_rng(5)
    for name, (outputs, inputs) in plan.shapes.items():
        x = generator.standard_normal((*leading, inputs))
        results = [plan.apply(arrays, name, xp.array(x), apply=how) for how in ("auto", "formed")]
        scale = plan.layout.scaling(name)
        for layout in both_orders(plan, name):
            results.append(apply_factored(layout, arrays, name, xp.array(x), scale))
        for result in results:
            assert xp.owns(result)
            assert tuple(result.shape) == (*leading, outputs)
            assert_allclose(xp.to_numpy(result), x @ expected[name].T, **CLOSE)


def both_orders(plan, name):
    """Yield a layout with each order of a factored weight, also the one that would cost more."""
    found = application(plan.layout, name)
    if found.factored is None:
        return
    for switch in (0, 1 << 40):
        own = replace(found, factored=replace(found.factored))
        vars(own.factored)["switch"] = switch
        layout = copy.copy(plan.layout)
        layout.kept = {**layout.kept, ("application", name): own}
        yield layout


def inner_width(layout, name):
    """Return q of ``left @ rightᵀ``: the open ranks of the last mode, for every part of a row."""
    group = layout.grouping.pieces[name][0].group
    ranks = sum(math.prod(map(last_rank, splits)) for splits in layout.terms(group))
    return layout.shapes[name][1] // layout.groups[group].fold[-1] * ranks


def last_rank(split):
    """Return the rank of a split's last mode, its size where nothing stands between."""
    factored = split.factored[-1] and not split.joined
    return split.ranks[-1] if factored else split.shape[-1]


def check_low_rank(xp, plan, factors, expected):
    arrays = xp.arrays(factors)
    for name, (outputs, inputs) in plan.shapes.items():
        pair = plan.low_rank(arrays, name)
        aligned = row_slice(plan.layout, name) is not None
        inner = inner_width(plan.layout, name)
        assert (pair is not None) == (aligned and inner < min(outputs, inputs))
        if pair is None:
            continue
        left, right = pair
        assert xp.owns(left)
        assert xp.owns(right)
        assert tuple(left.shape) == (outputs, inner)
        assert tuple(right.shape) == (inputs, inner)
        assert_allclose(xp.to_numpy(left) @ xp.to_numpy(right).T, expected[name], **CLOSE)


@rows
def test_deltas_are_those_of_the_loops(xp, spec, shapes):
    plan = make_plan(spec, shapes)
    factors = draw_factors(plan)
    check_deltas(xp, plan, factors, oracles.deltas(plan, factors))


@few_rows
def test_apply_is_the_product_with_the_loops_delta(xp, spec, shapes):
    plan = make_plan(spec, shapes)
    factors = draw_factors(plan)
    expected = oracles.deltas(plan, factors)
    check_apply(xp, plan, factors, expected)
    check_low_rank(xp, plan, factors, expected)


@pytest.mark.parametrize("kind", ["plain", "mapped", "extended"])
def test_any_update_and_its_product_are_those_of_the_loops(xp, kind):
    @examples(xp, 40 if kind == "extended" else 100)
    @given(problems(kind), st.sampled_from([(), (3,), (2, 2), (0,)]))
    def check(problem, leading):
        plan, factors = problem
        expected = oracles.deltas(plan, factors)
        check_deltas(xp, plan, factors, expected)
        check_apply(xp, plan, factors, expected, leading)
        check_low_rank(xp, plan, factors, expected)

    check()


@few_rows
def test_a_group_is_made_whole_as_it_is_in_slices(xp, spec, shapes):
    plan = make_plan(spec, shapes)
    factors = xp.arrays(draw_factors(plan))
    vectors = []
    for group, fixed in enumerate(plan.layout.maps):
        x = joint_entries(plan.layout, factors, group)
        before, size = plan.layout.joint_sizes(group)
        assert tuple(x.shape) == (before,)
        vectors.append(xp.to_numpy(fixed.apply(x, size)))
    for index, group in enumerate(plan.layout.groups):
        assert tuple(group_tensor(plan.layout, factors, index).shape) == group.fold
        assert vectors[index].shape == (group.size,)
    for name, delta in plan.deltas(factors).items():
        runs = [vectors[p.group][p.start : p.stop] for p in plan.layout.grouping.pieces[name]]
        expected = plan.layout.scaling(name) * numpy.concatenate(runs)
        assert_allclose(xp.to_numpy(delta).ravel(), expected, **CLOSE)


@few_rows
def test_a_scale_given_takes_the_place_of_the_specs(xp, spec, shapes):
    plan = make_plan(spec, shapes)
    plain = make_plan(spec.replace(scale=None, alpha=None), shapes)
    factors = xp.arrays(draw_factors(plan))
    name = list(shapes)[-1]
    x = xp.array(numpy.random.default_rng(6).standard_normal((3, shapes[name][1])))
    unit = xp.to_numpy(plain.delta(factors, name))
    product = xp.to_numpy(plain.apply(factors, name, x))
    for scale in (0.0, 1.0, -2.5):
        assert_allclose(xp.to_numpy(plan.delta(factors, name, scale=scale)), scale * unit, **CLOSE)
        assert_allclose(xp.to_numpy(plan.deltas(factors, scale=scale)[name]), scale * unit, **CLOSE)
        assert_allclose(
            xp.to_numpy(plan.apply(factors, name, x, scale=scale)), scale * product, **CLOSE
        )


@few_rows
def test_float32_stays_float32(xp, spec, shapes):
    plan = make_plan(spec, shapes)
    double = draw_factors(plan)
    single = xp.arrays({name: block.astype("float32") for name, block in double.items()})
    exact = oracles.deltas(plan, double)
    for name, delta in plan.deltas(single).items():
        size = numpy.abs(exact[name]).max()
        x = numpy.random.default_rng(7).standard_normal((3, shapes[name][1])).astype("float32")
        for result, expected in [
            (delta, exact[name]),
            (plan.delta(single, name), exact[name]),
            (plan.apply(single, name, xp.array(x)), x @ exact[name].T),
        ]:
            assert xp.owns(result)
            values = xp.to_numpy(result)
            assert values.dtype == numpy.float32
            assert_allclose(values, expected, rtol=1e-4, atol=1e-5 * size)


@few_rows
def test_factors_of_any_device_and_precision_of_torch_keep_both(device, spec, shapes):
    torch = pytest.importorskip("torch")
    plan = make_plan(spec, shapes)
    double = draw_factors(plan)
    exact = oracles.deltas(plan, double)
    for dtype, tolerance in [(torch.float32, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 0.1)]:
        factors = {name: torch.tensor(block).to(device, dtype) for name, block in double.items()}
        for name, delta in exact.items():
            x = torch.ones(3, delta.shape[1], device=device, dtype=dtype)
            for result, expected in [
                (plan.delta(factors, name), delta),
                (plan.apply(factors, name, x), numpy.ones((3, delta.shape[1])) @ delta.T),
            ]:
                assert result.dtype is dtype
                assert result.device == x.device
                error = result.double().cpu().numpy() - expected
                assert numpy.abs(error).max() <= tolerance * numpy.abs(expected).max()


def test_what_a_plan_returns_is_a_copy():
    plan = sl.Plan(sl.lora(rank=2), ONE)
    plan.shapes.clear()
    plan.factor_shapes.clear()
    assert plan.shapes == ONE
    assert len(plan.factor_shapes) == 2


def test_the_order_of_the_weights_decides_what_they_are():
    plan = sl.Plan(sl.lorta(rank=2), {"q": (6, 4), "v": (6, 4)})
    swapped = sl.Plan(sl.lorta(rank=2), {"v": (6, 4), "q": (6, 4)})
    factors = draw_factors(plan)
    first, second = plan.deltas(factors), swapped.deltas(factors)
    assert_allclose(first["q"], second["v"], **CLOSE)
    assert numpy.abs(first["q"] - second["q"]).max() > 0.1


def test_only_the_rows_that_a_weight_needs_are_read():
    plan = sl.Plan(sl.lora(rank=2, groups=1, fold="stack"), SAME)
    factors = draw_factors(plan)
    factors["0.0.factor0"][:6] = numpy.nan
    factors["0.0.factor0"][12:] = numpy.nan
    assert numpy.isfinite(plan.delta(factors, "0.v")).all()
    assert numpy.isnan(plan.delta(factors, "0.q")).all()


def test_inputs_may_be_a_transposed_view():
    plan = sl.Plan(sl.lora(rank=2), ONE)
    factors = draw_factors(plan)
    x = numpy.random.default_rng(8).standard_normal((4, 5)).T
    assert_allclose(plan.apply(factors, "q", x), x @ plan.delta(factors, "q").T, **CLOSE)
