"""The scale of presets of several merge operations: in front of every support, wherever it goes."""

import pytest
import torch

import superlora as sl
import superlora.torch as slt
from tests.torch.helpers import assert_near, make_input
from tests.torch.support_cases import TARGETS, attach_small, make_model, plain_call

F64 = {"dtype": torch.float64}
PRESETS = {
    "glora": lambda **scale: sl.glora(2, **scale),
    "glora, matrix": lambda **scale: sl.glora(2, product="matrix", **scale),
    "glora, vectors": lambda **scale: sl.glora(
        scale_weight="vector", add_weight="constant", weight_to_bias="vector", **scale
    ),
    "bitfit": sl.bitfit,
    "ssf": sl.ssf,
    "ia3": lambda **scale: sl.ia3(["o"], **scale),
    "repadapter": lambda **scale: sl.repadapter(2, **scale),
    "prompt_add": sl.prompt_add,
}
every_preset = pytest.mark.parametrize("key", PRESETS)


def test_every_preset_is_here():
    kinds = {name: getattr(sl, name).__annotations__["return"] for name in sl.presets.__all__}
    several = {name for name, kind in kinds.items() if kind == "Supports"}
    assert {key.partition(",")[0] for key in PRESETS} == several


def changes(adapter):
    """Merge, which leaves the outputs near what they were; return what it adds to parameters."""
    model, x = adapter.model, make_input(**F64)
    before = {name: own.detach().clone() for name, own in model.named_parameters()}
    y = model(x)
    assert_near(y, plain_call(model, [adapter], lambda: model(x)))
    adapter.merge()
    assert_near(model(x), y)
    return {name: own - before.get(name, 0) for name, own in model.named_parameters()}


@every_preset
@pytest.mark.parametrize("layer", ["bias", "no-bias", "conv1d"])
def test_a_scale_of_two_makes_twice_the_change(key, layer):
    once, plain, twice = (
        attach_small(make_model(layer, **F64), PRESETS[key](**scale))
        for scale in ({"scale": 1}, {}, {"scale": 2})
    )
    assert once.plan.factor_shapes == twice.plan.factor_shapes
    for name in once.plan.shapes:
        assert torch.equal(once.delta(name), plain.delta(name))
        assert_near(twice.delta(name), 2 * once.delta(name))
    moved, ours = changes(once), changes(twice)
    assert any(change.any() for change in moved.values())
    for name, change in moved.items():
        assert_near(ours[name], 2 * change)


@every_preset
def test_a_file_keeps_the_scale(key, tmp_path):
    model, fresh = make_model(), make_model()
    adapter = attach_small(model, PRESETS[key](scale=2))
    adapter.save(tmp_path / "a.safetensors")
    loaded = slt.load(fresh, tmp_path / "a.safetensors")
    assert loaded.plan.spec == adapter.plan.spec == PRESETS[key](scale=2)
    for name in adapter.plan.shapes:
        assert torch.equal(loaded.delta(name), adapter.delta(name))
    x = make_input()
    assert torch.equal(fresh(x), model(x))
    assert slt.attach(make_model(), PRESETS[key](), TARGETS).plan.spec != loaded.plan.spec


@every_preset
def test_a_scale_is_a_number(key):
    with pytest.raises(TypeError, match=r"^scale must be a number: got '2'$"):
        PRESETS[key](scale="2")
    with pytest.raises(ValueError, match=r"^scale must be finite: got inf$"):
        PRESETS[key](scale=float("inf"))


@pytest.mark.parametrize("key", ["glora", "glora, matrix", "glora, vectors", "repadapter"])
def test_alpha_and_scale_exclude_each_other(key):
    with pytest.raises(ValueError, match=r"^alpha must not be given beside scale=2: got 3$"):
        PRESETS[key](alpha=3, scale=2)


def test_alpha_of_repadapter_is_over_the_rank_in_both_supports():
    assert sl.repadapter(2, alpha=3) == sl.repadapter(2, scale=1.5)


@pytest.mark.parametrize("preset", [sl.bitfit, sl.prompt_add])
def test_presets_of_one_operation_take_the_fields_of_a_spec(preset):
    (spec,) = preset(groups=1, seed=3).values()
    assert spec == sl.dense(groups=1, seed=3)
    with pytest.raises(TypeError, match=rf"{preset.__name__}\(\) must have no rank"):
        preset(rank=2)


def test_overrides_of_repadapter_scale_and_leave_out_both_supports():
    design = sl.repadapter(rank=2, overrides={"a": {"scale": 4}, "b": None, "c": {"rank": 1}})
    plan = sl.Plan(design, {name: (6, 4) for name in "abcd"})
    assert {name: plan.layout.scaling(name) for name in plan.shapes} == {
        **{f"{operation}.a": 4 for operation in ("right_weight", "weight_to_bias")},
        **{f"{o}.{name}": 1 for o in ("right_weight", "weight_to_bias") for name in "cd"},
    }
