"""Frozen blocks of a module: never trained, made anew, copied and moved along."""

import copy
import pickle

import pytest
import torch

import superlora as sl
import superlora.torch as slt
from tests.torch.helpers import (
    SPECS,
    assert_near,
    attach_filled,
    bits,
    fill,
    loss_of,
    make_input,
    make_net,
    targets_of,
    unchanged,
)

FROZEN = ("lora_fa", "vera", "lora_xs", "tinylora", "tinylora-tied")
SINGULAR = ("lora_xs", "tinylora", "tinylora-tied")
frozen_specs = pytest.mark.parametrize("key", FROZEN)
singular_specs = pytest.mark.parametrize("key", SINGULAR)


def frozen_bits(adapter):
    return {name: bits(adapter.factors()[name]) for name in adapter.plan.frozen_shapes}


def train(model, adapter, steps=3, kind=torch.optim.AdamW):
    optimizer = kind(model.parameters(), 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model(make_input(dtype=adapter.dtype))).backward()
        optimizer.step()


@frozen_specs
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_training_changes_the_trainable_blocks_alone(key, kind):
    model = make_net()
    adapter = slt.attach(model, SPECS[key], targets_of(key))
    parameters = dict(adapter.named_parameters())
    assert parameters.keys() == adapter.plan.factor_shapes.keys()
    assert dict(adapter.named_buffers()).keys() == adapter.plan.frozen_shapes.keys()
    before = frozen_bits(adapter)
    trained = {name: bits(block) for name, block in parameters.items()}
    train(model, adapter, kind=kind)
    assert frozen_bits(adapter) == before
    assert all(bits(block) != trained[name] for name, block in parameters.items())
    for name in adapter.plan.frozen_shapes:
        block = adapter.factors()[name]
        assert not block.requires_grad
        assert block.grad is None
    adapter.reset(3)
    assert frozen_bits(adapter) == before
    assert not any(delta.any() for delta in adapter.deltas().values())


@frozen_specs
def test_frozen_blocks_of_all_dtypes_are_those_of_the_plan(key):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = make_net(dtype=dtype)
        adapter = slt.attach(model, SPECS[key], targets_of(key), dtype=dtype)
        weights = {n: model.get_submodule(n).weight.detach() for n in adapter.plan.shapes}
        weights = {n: w.to(torch.promote_types(w.dtype, torch.float32)) for n, w in weights.items()}
        for name, block in adapter.plan.frozen(weights, like=torch.float64).items():
            assert bits(adapter.factors()[name]) == bits(block.to(dtype))


@singular_specs
def test_singular_vectors_are_of_the_weight_before_any_update(key):
    model = make_net(dtype=torch.float64)
    expected = frozen_bits(slt.attach(make_net(dtype=torch.float64), SPECS[key], targets_of(key)))
    first = slt.attach(model, SPECS[key], targets_of(key), name="first")
    fill(first)
    second = slt.attach(model, SPECS[key], targets_of(key), name="second")
    assert frozen_bits(second) == frozen_bits(first) == expected
    first.merge()
    assert frozen_bits(first) == expected


@singular_specs
def test_singular_vectors_of_conv1d_are_of_its_transpose(key):
    plain, other = make_net(dtype=torch.float64), make_net("conv1d", dtype=torch.float64)
    with torch.no_grad():
        for block, twin in zip(plain.blocks, other.blocks, strict=True):
            for part in "qvo":
                getattr(twin, part).weight.copy_(getattr(block, part).weight.t())
    first, second = (slt.attach(m, SPECS[key], targets_of(key)) for m in (plain, other))
    for name, block in first.factors().items():
        assert_near(second.factors()[name], block)


@frozen_specs
def test_state_dict_brings_what_the_base_decides(key):
    """The base of the other model is its own: singular vectors must come along."""
    model, other = make_net(dtype=torch.float64), make_net(seed=5, dtype=torch.float64)
    adapter = attach_filled(model, key)
    twin = slt.attach(other, SPECS[key], targets_of(key), seed=6)
    twin.load_state_dict(adapter.state_dict())
    for name, delta in adapter.deltas().items():
        assert torch.equal(twin.delta(name), delta)
    assert frozen_bits(twin) == frozen_bits(adapter)


@frozen_specs
@pytest.mark.parametrize(
    "copier",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_has_frozen_blocks_of_its_own(key, copier):
    model = make_net(dtype=torch.float64)
    adapter = attach_filled(model, key)
    twin = copier(model).superlora
    assert frozen_bits(twin) == frozen_bits(adapter)
    for name in adapter.plan.frozen_shapes:
        assert twin.factors()[name].data_ptr() != adapter.factors()[name].data_ptr()
        twin.factors()[name].zero_()
    assert all(adapter.factors()[name].any() for name in adapter.plan.frozen_shapes)


@frozen_specs
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_to_another_dtype_takes_the_frozen_blocks_along(key, dtype):
    model = make_net()
    adapter = attach_filled(model, key)
    expected = {name: bits(block.detach().to(dtype)) for name, block in adapter.factors().items()}
    model.to(dtype)
    assert {name: bits(block) for name, block in adapter.factors().items()} == expected
    assert adapter.delta(next(iter(adapter.plan.shapes))).dtype == dtype


@pytest.mark.parametrize("key", ["lora_fa", "vera", "overrides"])
def test_random_blocks_are_drawn_anew_when_a_meta_model_gets_memory(key):
    with torch.device("meta"):
        model = make_net()
    adapter = slt.attach(model, SPECS[key], targets_of(key), seed=4)
    assert all(block.is_meta for block in adapter.factors().values())
    model.to_empty(device="cpu")
    fresh = slt.attach(make_net(), SPECS[key], targets_of(key), seed=4)
    for name, block in fresh.factors().items():
        assert torch.equal(adapter.factors()[name], block)


@singular_specs
def test_singular_vectors_of_a_meta_model_are_refused(key):
    with torch.device("meta"):
        model = make_net()
    message = "weights must be loaded where .* singular vectors: 6 lie on the meta device"
    with unchanged(model), pytest.raises(sl.AdapterError, match=message):
        slt.attach(model, SPECS[key], targets_of(key))


@singular_specs
def test_a_model_emptied_after_attach_is_no_wreck(key):
    """`to("meta")` drops the weights: what they decided cannot be made anew, but can be loaded."""
    model = make_net(dtype=torch.float64)
    attach_filled(model, key)
    x = make_input(dtype=torch.float64)
    y, state = model(x), copy.deepcopy(model.state_dict())
    model.to("meta")
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    assert torch.equal(model(x), y)


@singular_specs
def test_weights_that_are_not_finite_are_refused_and_nothing_is_changed(key):
    model = make_net()
    model.blocks[1].q.weight.data[0, 0] = float("nan")
    with unchanged(model), pytest.raises((ValueError, RuntimeError)):
        slt.attach(model, SPECS[key], targets_of(key))


def test_stored_blocks_cannot_be_attached():
    model = make_net()
    spec = sl.lora(2, frozen={"0.factor1": "stored"})
    message = (
        "must say how frozen blocks are made to be attached: 0.0.factor1, 1.0.factor1 are 'stored'"
    )
    with unchanged(model), pytest.raises(ValueError, match=message):
        slt.attach(model, spec, ["q"])


@frozen_specs
def test_frozen_blocks_take_no_room_in_the_optimizer_and_no_gradient_flows_to_them(key):
    model = make_net(dtype=torch.float64)
    adapter = attach_filled(model, key)
    total = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert total == adapter.num_parameters == sum(p.numel() for p in adapter.parameters())
    loss_of(model(make_input(dtype=torch.float64))).backward()
    assert all(buffer.grad is None for buffer in model.buffers())
