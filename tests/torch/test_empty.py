"""Attach on the meta device, then load the weights: the adapter is that of a loaded model."""

import gc
import sys

import pytest
import torch

import superlora.torch as slt
from tests.pairs import in_turn
from tests.torch.helpers import (
    SPECS,
    bits,
    fill,
    loss_of,
    make_input,
    make_net,
    slow_but,
    targets_of,
)

# Singular vectors are refused where there are no weights yet.
DRAWN = [
    key
    for key, spec in SPECS.items()
    if not any(source.startswith("singular") for source in dict(spec.frozen).values())
]
every_drawn = pytest.mark.parametrize("key", DRAWN)


def empty_net(**options):
    with torch.device("meta"):
        return make_net(**options)


def attached(model, key):
    return slt.attach(model, SPECS[key], targets_of(key), seed=4)


def steps(model, adapter):
    """Train a little and return the output."""
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model(make_input())).backward()
        optimizer.step()
    return model(make_input())


def with_memory(model, source):
    model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict(), strict=False)


def copied_onto(model, source):
    model.load_state_dict(source.state_dict(), strict=False, assign=True)


def one_by_one(model, source):
    """As libraries load large models: each weight is put in its place by itself."""
    for name, value in source.state_dict().items():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        if leaf in owner._parameters:
            owner._parameters[leaf] = torch.nn.Parameter(value.clone(), requires_grad=False)
        else:
            owner._buffers[leaf] = value.clone()
    model.superlora.to_empty(device="cpu")


WAYS = [with_memory, copied_onto, one_by_one]
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


@in_turn("key", DRAWN, "way", WAYS)
def test_equals_the_same_adapter_attached_after_loading(key, way):
    expected, source = make_net(), make_net()
    late = attached(expected, key)
    model = empty_net()
    early = attached(model, key)
    assert all(block.is_meta for block in early.factors().values())
    way(model, source)
    for name, block in late.factors().items():
        assert bits(early.factors()[name]) == bits(block)
        assert early.factors()[name].requires_grad == block.requires_grad
    assert torch.equal(steps(model, early), steps(expected, late))


@in_turn("key", DRAWN, "assign", [False, True])
def test_a_state_dict_with_the_adapter(key, assign):
    source = make_net()
    fill(attached(source, key))
    model = empty_net()
    attached(model, key)
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict(), assign=assign)
    assert torch.equal(model(make_input()), source(make_input()))


@pytest.mark.parametrize("key", ["lora", "vera", "unilora"])
def test_a_state_dict_of_half_precision_brings_its_dtype(key):
    source = make_net()
    fill(attached(source, key))
    source.bfloat16()
    model = empty_net()
    adapter = attached(model, key)
    model.load_state_dict(source.state_dict(), assign=True)
    assert {block.dtype for block in adapter.factors().values()} == {torch.bfloat16}
    x = make_input(dtype=torch.bfloat16)
    assert torch.equal(model(x), source(x))


def test_what_has_memory_is_not_drawn_anew():
    model = make_net()
    adapter = fill(attached(model, "lora"))
    before = [bits(parameter) for parameter in adapter.parameters()]
    model.load_state_dict(make_net(seed=3).state_dict(), strict=False, assign=True)
    assert [bits(parameter) for parameter in adapter.parameters()] == before


def test_weights_that_are_still_empty_leave_their_blocks_so():
    model = empty_net()
    adapter = attached(model, "lora")
    state = {name: t for name, t in make_net().state_dict().items() if "blocks.0" in name}
    model.load_state_dict(state, strict=False, assign=True)
    empty = {name for name, block in adapter.factors().items() if block.is_meta}
    assert empty == {f"{group}.0.factor{mode}" for group in (3, 4, 5) for mode in (0, 1)}


def test_a_part_of_a_model():
    outer = torch.nn.Module()
    outer.part = empty_net()
    adapter = attached(outer.part, "vera")
    source = torch.nn.Module()
    source.part = make_net()
    outer.load_state_dict(source.state_dict(), strict=False, assign=True)
    assert not any(block.is_meta for block in adapter.factors().values())
    late = attached(source.part, "vera")
    assert torch.equal(steps(outer.part, adapter), steps(source.part, late))


def test_attaching_draws_nothing(monkeypatch):
    """Seventy billion parameters have factors of gigabytes."""
    from superlora.algebra import frozen, init

    def refuse(*arguments):
        raise AssertionError("drawn")

    monkeypatch.setattr(init, "normal", refuse)
    monkeypatch.setattr(frozen, "normal", refuse)
    for key in ("lora", "vera", "lora_fa", "unilora"):
        attached(empty_net(), key)


def test_a_seed_is_checked_all_the_same():
    with pytest.raises(ValueError, match="seed"):
        slt.attach(empty_net(), SPECS["lora"], targets_of("lora"), seed=-1)


def test_a_detached_adapter_leaves_no_hooks():
    model = make_net()
    adapters = [attached(model, "lora"), slt.attach(model, SPECS["dense"], ["q"], name="second")]
    for left, adapter in zip((2, 1), adapters, strict=True):
        assert len(model._load_state_dict_post_hooks) == left
        adapter.detach()
    assert not model._load_state_dict_post_hooks
    assert not model._load_state_dict_pre_hooks


@pytest.mark.parametrize(
    "key",
    slow_but(["lora", "unilora"], ["lora", "vera", "lorta", "unilora", "fastfood", "lokr"]),
)
def test_attaching_takes_as_many_calls_for_each_layer_of_a_deeper_model(key):
    def calls(depth):
        model = empty_net(depth=depth)
        count = 0

        def counted(frame, event, argument):
            nonlocal count
            count += event == "call"

        before = sys.getprofile()
        gc.collect()
        gc.disable()  # finalizers of other tests' objects are calls too
        sys.setprofile(counted)
        try:
            attached(model, key)
        finally:
            sys.setprofile(before)
            gc.enable()
        return count

    calls(1)  # what is worked out once
    assert calls(128) <= 4.2 * calls(32)
