"""Copies, pickles, state dicts and moves of an adapted model."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import superlora as sl
import superlora.torch as slt
from tests.pairs import in_turn
from tests.torch.helpers import (
    SPECS,
    assert_near,
    attach_filled,
    base_bits,
    every_spec,
    fill,
    gradients,
    kept_blocks,
    loss_of,
    make_input,
    make_net,
    some_specs,
    targets_of,
    unchanged,
)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIERS = (copy.deepcopy, through_pickle, through_torch)
copiers = pytest.mark.parametrize("copier", COPIERS)


@in_turn("key", SPECS, "copier", COPIERS)
def test_copy_computes_the_same_and_is_independent(key, copier):
    model = make_net(dtype=torch.float64)
    adapter = attach_filled(model, key)
    x = make_input(dtype=torch.float64)
    y = model(x)
    other = copier(model)
    twin = other.superlora
    assert torch.equal(other(x), y)
    found, expected = gradients(twin, loss_of(other(x))), gradients(adapter, loss_of(y))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with unchanged(model):
        fill(twin, 7)
        assert not torch.allclose(other(x), y)
        twin.scale = 3.0
        twin.merge()
        assert torch.equal(model(x), y)
        twin.unmerge()
        twin.detach()
    with adapter.disabled():
        assert torch.equal(other(x), model(x))
    assert all("forward" not in vars(module) for module in other.modules())
    assert all(tensor.requires_grad for tensor in other.parameters())
    assert not any(tensor.requires_grad for tensor in model.head.parameters())


@some_specs
@copiers
def test_copy_of_merged_model_unmerges_bit_for_bit(key, copier):
    model = make_net(dtype=torch.bfloat16)
    bits = base_bits(model)
    adapter = attach_filled(model, key)
    adapter.merge()
    other = copier(model)
    adapter.unmerge()
    assert other.superlora.merged
    other.superlora.unmerge()
    assert base_bits(other) == base_bits(model) == bits


@copiers
def test_copy_of_two_adapters(copier):
    model = make_net(dtype=torch.float64)
    attach_filled(model, "lora", name="first")
    attach_filled(model, "dense", name="second")
    x = make_input(dtype=torch.float64)
    other = copier(model)
    assert torch.equal(other(x), model(x))
    with other.second.disabled(), model.second.disabled():
        assert torch.equal(other(x), model(x))
    other.first.detach()
    other.second.detach()
    assert base_bits(other) == base_bits(make_net(dtype=torch.float64))


def test_adapter_of_a_copied_part_is_independent():
    """Copying one layer takes along what it needs, and nothing of the original."""
    model = make_net(dtype=torch.float64)
    adapter = attach_filled(model, "lora")
    layer = copy.deepcopy(model.blocks[0].q)
    x = make_input(dtype=torch.float64)
    expected = model.blocks[0].q(x)
    assert torch.equal(layer(x), expected)
    fill(adapter, seed=8)
    assert torch.equal(layer(x), expected)


@every_spec
def test_state_dict_round_trip(key):
    model = make_net(dtype=torch.float64)
    attach_filled(model, key)
    x = make_input(dtype=torch.float64)
    other = make_net(seed=5, dtype=torch.float64)
    slt.attach(other, SPECS[key], targets_of(key), seed=6)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    plain = make_net(seed=5, dtype=torch.float64)
    missing, extra = plain.load_state_dict(model.state_dict(), strict=False)
    assert missing == []
    assert extra == [f"superlora.{name}" for name in kept_blocks(model.superlora.plan)]


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_detach_after_state_was_loaded(assign):
    """Assigning replaces the parameters by new objects, which are unfrozen none the less."""
    model = make_net()
    model.head.requires_grad_(False)
    adapter = attach_filled(model, "cut")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)
    y = model(make_input())
    adapter.merge()
    assert_near(model(make_input()), y)
    adapter.unmerge()
    adapter.detach()
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
        "head.weight",
        "head.bias",
    ]


@every_spec
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_change_of_dtype_after_attach(key, dtype):
    model = make_net()
    adapter = attach_filled(model, key)
    expected = model(make_input())
    model.to(dtype)
    assert {tensor.dtype for tensor in model.parameters()} == {dtype}
    y = model(make_input(dtype=dtype))
    assert y.dtype == dtype
    assert (y - expected).norm() <= (0.1 if dtype == torch.bfloat16 else 1e-5) * expected.norm()
    gradients(adapter, loss_of(y))
    adapter.merge()
    assert (model(make_input(dtype=dtype)) - y).norm() <= 0.1 * y.norm()
    adapter.unmerge()
    assert torch.equal(model(make_input(dtype=dtype)), y)


@some_specs
def test_change_of_dtype_while_merged(key):
    model = make_net()
    adapter = attach_filled(model, key)
    adapter.merge()
    model.double()
    adapter.unmerge()
    assert base_bits(model) == base_bits(make_net().double())


@some_specs
def test_change_of_device_after_attach(key, device):
    model = make_net()
    adapter = attach_filled(model, key)
    x = make_input()
    expected = model(x)
    model.to(device)
    assert {tensor.device.type for tensor in model.parameters()} == {device}
    y = model(x.to(device))
    assert_near(y.cpu(), expected)
    adapter.merge()
    model.cpu()
    assert_near(model(x), expected)
    model.to(device)
    adapter.unmerge()
    assert torch.equal(model(x.to(device)), y)
    model.cpu()
    assert base_bits(model) == base_bits(make_net())


def test_meta_model_given_memory_after_attach():
    """The usual way to load a large model: attach, then materialise and load the weights."""
    with torch.device("meta"):
        model = make_net()
    adapter = slt.attach(model, sl.lora(2), ["q", "v"])
    model.to_empty(device="cpu")
    source = make_net()
    expected = attach_filled(source, "lora")
    state = source.state_dict()
    state = {name: value for name, value in state.items() if "superlora" not in name}
    expected.detach()
    model.load_state_dict(state, strict=False)
    assert not any(delta.any() for delta in adapter.deltas().values())
    fresh = slt.attach(make_net(), sl.lora(2), ["q", "v"])
    for name, factor in fresh.factors().items():
        assert torch.equal(adapter.factors()[name], factor)
    fill(adapter)
    y = model(make_input())
    adapter.merge()
    assert_near(model(make_input()), y)
    adapter.unmerge()
    adapter.detach()
    assert torch.equal(model(make_input()), source(make_input()))
    assert all(tensor.requires_grad for tensor in model.parameters())


def test_optimizer_state_survives_a_round_trip():
    def steps(model, adapter, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            loss_of(model(make_input(dtype=torch.float64))).backward()
            optimizer.step()
        return [factor.detach().clone() for factor in adapter.parameters()]

    model = make_net(dtype=torch.float64)
    adapter = attach_filled(model, "cut")
    optimizer = torch.optim.Adam(adapter.parameters(), 1e-2)
    steps(model, adapter, optimizer, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = steps(model, adapter, optimizer, 2)
    other = make_net(seed=3, dtype=torch.float64)
    twin = slt.attach(other, SPECS["cut"], targets_of("cut"))
    again = torch.optim.Adam(twin.parameters(), 1e-2)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    found = steps(other, twin, again, 2)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_train_and_eval_reach_the_adapter():
    model = make_net().eval()
    adapter = slt.attach(model, sl.lora(2))
    assert not adapter.training
    model.train()
    assert all(module.training for module in adapter.modules())
    with unchanged(make_net().train()):
        assert "Adapter" in repr(model)


@pytest.mark.parametrize("container", [nn.Sequential, nn.ModuleList], ids=["Sequential", "List"])
def test_container_as_root_stays_what_it_was(container):
    """Its children are counted, indexed and called one after the other."""
    layers = [nn.Linear(4, 4), nn.Linear(4, 4)]
    model = container(layers) if container is nn.ModuleList else container(*layers)
    children = list(model)
    x = torch.ones(2, 4)
    with unchanged(model):
        adapter = fill(slt.attach(model, sl.lora(2)))
        assert list(model) == children
        expected = y = x
        for name, layer in model.named_children():
            weight = layer.weight + adapter.delta(name)
            expected = nn.functional.linear(expected, weight, layer.bias)
        for layer in model:
            y = layer(y)
        assert_near(y, expected)
        adapter.detach()


class Chain(nn.Module):
    """A model that calls all its children one after the other."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


def test_model_that_calls_all_its_children():
    model = Chain()
    x = torch.ones(2, 4)
    expected = model(x)
    slt.attach(model, sl.lora(2))
    assert torch.equal(model(x), expected)


def test_linear_as_root(tmp_path):
    model = nn.Linear(4, 6)
    x = torch.ones(2, 4)
    with unchanged(model):
        adapter = fill(slt.attach(model, sl.lora(2)))
        y = model(x)
        adapter.save(tmp_path / "a.safetensors")
        adapter.detach()
        assert torch.equal(slt.load(model, tmp_path / "a.safetensors").delta(""), adapter.delta(""))
        assert torch.equal(model(x), y)
        model.superlora.detach()
