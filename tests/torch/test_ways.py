"""Every way to the update of a layer gives the same: forward, factors, merge, file, plan."""

import json

import numpy
import pytest
import torch
from safetensors.torch import load_file, safe_open

import superlora as sl
import superlora.torch as slt
from tests import oracles
from tests.pairs import pairwise
from tests.torch.helpers import (
    SPECS,
    assert_near,
    attach_filled,
    bits,
    every_spec,
    fill,
    kept_blocks,
    layers_of,
    make_input,
    make_net,
    targets_of,
)


@pairwise(
    {"key": list(SPECS), "layer": ["bias", "no-bias"], "dtype": [torch.float32, torch.bfloat16]}
)
def test_every_way_gives_one_update(key, layer, dtype, tmp_path):
    model = make_net(layer, dtype=dtype)
    adapter = attach_filled(model, key)
    adapter.save(tmp_path / "a.safetensors")
    loaded = load_file(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["superlora"])
    plan = sl.Plan(sl.Spec.from_dict(header["spec"]), dict(header["weights"]))
    held = {
        name: module.weight.detach().float() for name, module in layers_of(model, adapter).items()
    }
    made = plan.frozen(held, like=torch.float32)
    exported = {name: (made | loaded)[name].numpy() for name in plan.layout.input_shapes}
    loops = oracles.deltas(plan, exported)
    with torch.no_grad():
        for name, module in layers_of(model, adapter).items():
            expected = torch.tensor(loops[name])
            delta = adapter.delta(name)
            assert_near(delta, expected, torch.float32)
            assert_near(torch.tensor(plan.delta(exported, name)), expected, torch.float32)
            x = torch.eye(expected.shape[1], dtype=dtype)
            with adapter.disabled():
                base = module(x).double()
            assert_near(module(x), base + expected.t(), dtype)
            support = adapter.supports[name]
            if support.way is not None:  # also where it would cost more
                assert_near(support.factored(x).t(), expected, torch.float32)
            assert_near(support.form(x.device), expected, torch.float32)
            pair = plan.low_rank(adapter.factors(), name, adapter.blocks.scales[name].value)
            if pair is not None:
                assert_near(pair[0] @ pair[1].t(), expected, torch.float32)
            weight = module.weight.double()
            adapter.merge()
            assert_near(module.weight, weight + expected, dtype)
            adapter.unmerge()


@every_spec
def test_gradients_against_finite_differences(key):
    model = make_net(dtype=torch.float64)
    adapter = attach_filled(model, key)
    block = model.blocks[1]
    x = make_input(2, dtype=torch.float64).requires_grad_()
    leaves = [x, *adapter.parameters()]

    def outputs(x, *_):
        q, v = block.q(x), block.v(x)
        return block.o(q * v)

    used = torch.autograd.grad(outputs(x).sum(), leaves, allow_unused=True)
    leaves = [leaf for leaf, slope in zip(leaves, used, strict=True) if slope is not None]
    assert len(leaves) > 1
    assert torch.autograd.gradcheck(outputs, leaves, fast_mode=True)


CUT = {
    "factor": sl.Spec(rank=2, groups=5, fold="balanced", tied=["0.factor0"], scale=0.7),
    "core": sl.Spec(rank=2, groups=5, fold="balanced", core="full", tied=["0.core"], scale=0.7),
    "padded": sl.Spec(
        rank=2, groups=3, fold="balanced", cut="pad", terms=2, tied=["0.factor1"], alpha=3
    ),
    "frozen": sl.Spec(
        rank=2,
        groups=5,
        fold="balanced",
        core="diagonal",
        tied=["0.core"],
        frozen={"0.core": "ones"},
        scale=0.7,
    ),
}


@pytest.mark.parametrize("spec", CUT.values(), ids=CUT)
def test_blocks_tied_over_the_groups_of_one_weight_are_scaled_once(spec):
    adapter = fill(slt.attach(make_net(dtype=torch.float64), spec, ["q", "v", "o"]))
    factors = {name: block.detach().numpy() for name, block in adapter.factors().items()}
    expected = oracles.deltas(adapter.plan, factors)
    for name, delta in adapter.deltas().items():
        numpy.testing.assert_allclose(delta.detach().numpy(), expected[name], rtol=0, atol=1e-13)
    adapter.scale = 3 * adapter.scale
    for name, delta in adapter.deltas().items():
        numpy.testing.assert_allclose(delta.detach().numpy(), 3 * expected[name], atol=1e-12)


@every_spec
def test_file_is_as_small_as_the_parameters(key, tmp_path):
    adapter = attach_filled(make_net(), key)
    adapter.save(tmp_path / "a.safetensors")
    assert list(load_file(tmp_path / "a.safetensors")) == sorted(dict(adapter.named_parameters()))
    names = sum(map(len, [*adapter.plan.shapes, *adapter.factors()]))
    size = (tmp_path / "a.safetensors").stat().st_size
    assert size <= 4 * adapter.num_parameters + 4000 + names


@every_spec
def test_adapters_of_two_designs_add_up_and_come_off_in_any_order(key):
    model = make_net(dtype=torch.float64)
    x = make_input(dtype=torch.float64)
    first = attach_filled(model, key, name="first")
    deltas = first.deltas()
    second = attach_filled(model, "vera", name="second", seed=4)
    for name, delta in second.deltas().items():
        if name in deltas:
            module = model.get_submodule(name)
            inputs = make_input(dtype=torch.float64)[..., : delta.shape[1]]
            weight = module.weight + deltas[name] + delta
            assert_near(module(inputs), torch.nn.functional.linear(inputs, weight, module.bias))
    y = model(x)
    before = {name: bits(module.weight) for name, module in layers_of(model, second).items()}
    first.merge()
    second.merge()
    assert_near(model(x), y)
    first.unmerge()
    assert_near(model(x), y)
    second.unmerge()
    assert torch.equal(model(x), y)
    after = {name: bits(module.weight) for name, module in layers_of(model, second).items()}
    assert after == before
    first.detach()
    second.detach()
    assert torch.equal(model(x), make_net(dtype=torch.float64)(x))


@every_spec
def test_what_a_state_dict_does_not_hold_the_spec_decides(key):
    """Nothing but the seed of the factors differs between two adapters of one spec."""
    one, two = (make_net() for _ in range(2))
    first = slt.attach(one, SPECS[key], targets_of(key), seed=1)
    second = slt.attach(two, SPECS[key], targets_of(key), seed=2)
    kept = set(kept_blocks(first.plan))
    assert kept == set(first.state_dict())
    for name, block in first.factors().items():
        alike = torch.equal(block, second.factors()[name])
        assert alike or name in dict(first.named_parameters())
        assert name in kept or alike
    if key != "unilora":  # which cannot start at zero
        assert torch.equal(one(make_input()), two(make_input()))
