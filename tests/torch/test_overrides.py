"""Overrides on a model: other ranks and scales for some layers, kept by setter, file and copy."""

import copy
import json

import pytest
import torch
from safetensors import safe_open

import superlora as sl
import superlora.torch as slt
from tests.torch.helpers import (
    SPECS,
    assert_near,
    attach_filled,
    bits,
    fill,
    make_input,
    make_net,
    unchanged,
)

SCALES = {"q": 2.5, "v": 5 / 3, "o": -0.5}  # of SPECS["overrides"]


def attach_overridden(model, **changes):
    return fill(slt.attach(model, SPECS["overrides"].replace(**changes), ["q", "v", "o"]))


def unscaled(adapter):
    """Return the updates with every scale 1."""
    factors = {name: block.detach() for name, block in adapter.factors().items()}
    return adapter.plan.deltas(factors, scale=1.0)


@pytest.mark.parametrize("factor", [None, 3.0, -0.1])
def test_the_setter_keeps_proportions(factor, tmp_path):
    model = make_net(dtype=torch.float64)
    adapter = attach_overridden(model)
    if factor is not None:
        adapter.scale = factor * adapter.scale
    path = tmp_path / "a.safetensors"
    adapter.save(path)
    twin = slt.load(make_net(dtype=torch.float64), path)
    again = copy.deepcopy(model).superlora
    for name, delta in unscaled(adapter).items():
        expected = SCALES[name[-1]] * (factor or 1.0) * delta
        for found in (adapter, twin, again):
            assert_near(found.delta(name), expected)
    assert twin.scale == again.scale == adapter.scale
    assert [bits(b) for b in twin.deltas().values()] == [bits(b) for b in adapter.deltas().values()]
    x = make_input(dtype=torch.float64)
    y = model(x)
    adapter.merge()
    assert_near(model(x), y)


def test_the_setter_to_zero_and_back():
    adapter = attach_overridden(make_net(dtype=torch.float64))
    deltas = adapter.deltas()
    adapter.scale = 0
    assert not any(delta.any() for delta in adapter.deltas().values())
    adapter.scale = adapter.plan.scale
    for name, delta in adapter.deltas().items():
        assert torch.equal(delta, deltas[name])


def test_the_file_says_a_changed_scale_only(tmp_path):
    adapter = attach_overridden(make_net())
    for scale in (None, 0.3):
        if scale is not None:
            adapter.scale = scale
        adapter.save(tmp_path / "a.safetensors")
        with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
            header = json.loads(file.metadata()["superlora"])
        assert header.get("scale") == scale
        assert sl.Spec.from_dict(header["spec"]) == SPECS["overrides"]


def test_a_scale_of_zero_lets_some_layers_be():
    model = make_net(dtype=torch.float64)
    adapter = attach_overridden(model, overrides={"v": {"scale": 0}, "o": {"scale": -0.5}})
    assert not adapter.delta("blocks.0.v").any()
    assert adapter.delta("blocks.0.q").any()
    x = make_input(dtype=torch.float64)
    module = model.blocks[0].v
    with adapter.disabled():
        base = module(x)
    assert torch.equal(module(x), base)


def test_scales_far_apart_are_finite():
    spec = sl.lora(2, scale=1e-200, overrides={"v": {"scale": 1e150}})
    adapter = fill(slt.attach(make_net(dtype=torch.float64), spec, ["q", "v"]))
    for name, delta in unscaled(adapter).items():
        scale = 1e150 if name.endswith("v") else 1e-200
        assert torch.isfinite(adapter.delta(name)).all()
        assert_near(adapter.delta(name), scale * delta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_scale_of_a_layer_is_exact(dtype):
    """alpha by rank, not what is left of it after a division and a multiplication."""
    for alpha in range(1, 40):
        spec = sl.lora(7, alpha=alpha, overrides={"v": {"rank": 3}})
        adapter = fill(slt.attach(make_net(dtype=dtype), spec, ["q", "v"]))
        factors = {name: block.detach() for name, block in adapter.factors().items()}
        for name in adapter.plan.shapes:
            assert_near(adapter.delta(name), adapter.plan.delta(factors, name))


def test_designs_may_differ_in_all_they_have():
    spec = sl.lora(
        2,
        scale=0.7,
        overrides={
            "0.q": {"splits": 2, "combine": "hadamard"},
            "1.q": {"frozen": {"0.factor1": "random"}, "seed": 9},
            "v": {"groups": 1, "fold": "stack", "order": 3, "core": "diagonal", "terms": 2},
            "0.o": {"core": "full", "frozen": {"0.factor0": "singular_scaled"}, "scale": 2.0},
            "1.o": {"rank": "full", "order": 1},
        },
    )
    model = make_net(dtype=torch.float64)
    x = make_input(dtype=torch.float64)
    base = model(x)
    adapter = slt.attach(model, spec, ["q", "v", "o"])
    assert torch.equal(model(x), base)
    fill(adapter)
    factors = {name: block.detach() for name, block in adapter.factors().items()}
    for name, delta in adapter.plan.deltas(factors).items():
        assert_near(adapter.delta(name), delta)
    y = model(x)
    adapter.merge()
    assert_near(model(x), y)
    adapter.unmerge()
    assert torch.equal(model(x), y)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"k": {"rank": 3}}, "overrides must match weights of their own: 'k' matched none"),
        ({"v": {"rank": 3}, "0.v": {"rank": 1}}, "weights of their own: '0.v' matched none"),
        ({"v": {"fold": (4, 4)}}, "fold must cover the group"),
        ({"v": {"frozen": {"0.factor0": "stored"}}}, "'stored' in a file"),
        ({"v": {"tied": ["0.core"]}}, r"tied must name blocks that every group has: group \d has"),
    ],
)
def test_overrides_that_do_not_fit_leave_the_model_as_it_was(overrides, message):
    model = make_net()
    with unchanged(model), pytest.raises(ValueError, match=message):
        slt.attach(model, sl.lora(2, overrides=overrides), ["q", "v"])


def test_a_state_dict_goes_from_one_overridden_adapter_to_another():
    model, other = make_net(dtype=torch.float64), make_net(seed=3, dtype=torch.float64)
    attach_overridden(model)
    attach_filled(other, "overrides", seed=8)
    other.load_state_dict(model.state_dict())
    x = make_input(dtype=torch.float64)
    assert torch.equal(other(x), model(x))
