"""`Adapter.swap`: values of other dtypes, and parameters of the model itself."""

import pytest
import torch

import superlora.torch as slt
from tests.torch.helpers import (
    SPECS,
    attach_filled,
    bits,
    make_input,
    make_net,
    targets_of,
)
from tests.torch.test_swap import assert_refused, parts_of, saved, write

# Dtypes.


@pytest.mark.parametrize("key", ["lora", "vera", "lora_xs"])
@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_values_are_rounded_to_the_dtype_of_the_adapter(key, kind, tmp_path):
    """As `load_state_dict` does, so that what holds the parameters holds them still."""
    path = saved(tmp_path, key)
    model = make_net()
    adapter = attach_filled(model, key)
    model.to(kind)
    adapter.swap(path)
    other = make_net()
    loaded = slt.load(other, path)
    other.to(kind)
    for name, block in loaded.factors().items():
        assert bits(adapter.factors()[name]) == bits(block)


@pytest.mark.parametrize("key", ["lora", "vera", "lora_xs"])
def test_a_file_of_half_precision(key, tmp_path):
    source = make_net()
    adapter = attach_filled(source, key)
    adapter.to(torch.bfloat16)
    path = tmp_path / "half.safetensors"
    adapter.save(path)
    model = make_net()
    own = attach_filled(model, key, seed=8)
    own.swap(path)
    for name in own.plan.factor_shapes:
        assert bits(own.factors()[name]) == bits(adapter.factors()[name].float())


def test_values_too_large_for_the_dtype_are_refused(tmp_path):
    path = saved(tmp_path, "lora")
    tensors, header = parts_of(path)
    tensors["1.0.factor1"][0, 0] = 1e6
    write(path, tensors, header)
    model = make_net(dtype=torch.float16)
    adapter = slt.attach(model, SPECS["lora"], targets_of("lora"), dtype=torch.float16)
    assert_refused(model, adapter, path, r"'1.0.factor1' .* must fit .*float16")


# Parameters of the model itself.


@pytest.fixture
def with_head(tmp_path):
    """Two files that bring a head along."""
    paths = []
    for seed in (5, 6):
        path = saved(tmp_path, "lora", seed=seed, name=f"head{seed}")
        tensors, header = parts_of(path)
        tensors["model.head.weight"] = torch.full((3, 16), float(seed))
        tensors["model.head.bias"] = torch.full((3,), float(-seed))
        write(path, tensors, header)
        paths.append(path)
    return paths


def test_the_head_comes_along(with_head):
    model, other = make_net(), make_net()
    base = model(make_input())
    adapter = slt.load(model, with_head[0])
    kept = model.head.weight
    adapter.swap(with_head[1])
    slt.load(other, with_head[1])
    assert model.head.weight is kept
    assert torch.equal(model(make_input()), other(make_input()))
    adapter.detach()
    assert torch.equal(model(make_input()), base)


def test_the_head_comes_along_while_it_is_put_aside(with_head):
    model = make_net()
    adapter = slt.load(model, with_head[0])
    own = make_net().head.weight
    with adapter.disabled():
        adapter.swap(with_head[1])
        assert torch.equal(model.head.weight, own)
    assert (model.head.weight == 6).all()


def test_a_file_with_or_without_a_head_is_refused(with_head, tmp_path):
    model = make_net()
    adapter = slt.load(model, with_head[0])
    path = saved(tmp_path, "lora", name="plain")
    assert_refused(model, adapter, path, r"missing 'model\.head\.\w+'")
    model = make_net()
    adapter = attach_filled(model, "lora")
    assert_refused(model, adapter, with_head[0], r"extra 'model\.head\.\w+'")


def test_a_head_of_another_shape_is_refused(with_head):
    model = make_net()
    adapter = slt.load(model, with_head[0])
    tensors, header = parts_of(with_head[1])
    tensors["model.head.bias"] = torch.ones(4)
    write(with_head[1], tensors, header)
    assert_refused(model, adapter, with_head[1], r"'model.head.bias' of shape \(4,\) instead of")
