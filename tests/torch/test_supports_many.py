"""Merge operations beside others: several adapters, rows, copies, blocks that are disabled."""

import copy
import itertools
import pickle

import pytest
import torch

import superlora as sl
import superlora.torch as slt
from tests.torch.helpers import assert_near, base_bits, every_layer, make_input, unchanged
from tests.torch.support_cases import (
    attach_small,
    every_pair,
    make_model,
    merged_by_hand,
    plain_call,
    some_designs,
    vector,
)

F64 = {"dtype": torch.float64}
# Of different operations on one weight: each sees the base alone.
THREE = {
    "glora": sl.glora(2),
    "matrix": {"right_weight": sl.lora(2), "left_weight": sl.lora(1), "scale_bias": sl.dense()},
    "vectors": {
        "scale_weight": vector("outputs"),
        "add_weight": sl.lora(1),
        "add_bias": sl.dense(),
    },
}


def attach_three(model, order=tuple(THREE)):
    seeds = {name: seed for seed, name in enumerate(THREE)}
    return {name: attach_small(model, THREE[name], name, seeds[name]) for name in order}


@every_layer
def test_updates_of_several_adapters_are_of_the_base_and_add_up(layer):
    x = make_input(**F64)
    outputs = []
    for order in itertools.permutations(THREE):
        model = make_model(layer, **F64)
        adapters = attach_three(model, order)
        outputs.append(model(x))
        assert_near(outputs[-1], plain_call(model, list(adapters.values()), lambda m=model: m(x)))
    for y in outputs[1:]:
        assert_near(y, outputs[0])


@every_layer
@pytest.mark.parametrize("merged", list(itertools.permutations(THREE, 2)), ids="-".join)
def test_merged_ones_beside_active_ones(layer, merged):
    model = make_model(layer, **F64)
    x = make_input(**F64)
    before = base_bits(model)
    adapters = attach_three(model)
    y = model(x)
    expected = {
        name: merged_by_hand(module, list(adapters.values()), name)
        for name, module in adapters["glora"].layers().items()
    }
    for name in merged:
        adapters[name].merge()
        assert_near(model(x), y)
    (last,) = set(THREE) - set(merged)
    adapters[last].merge()
    for name, module in adapters["glora"].layers().items():
        weight, bias = expected[name]
        held = module.weight if layer != "conv1d" else module.weight.t()
        assert_near(held, weight)
        assert_near(module.bias, bias)
    for name in merged:  # not in the order of merging
        adapters[name].unmerge()
        assert_near(model(x), y)
    adapters[last].unmerge()
    assert base_bits(model) == before
    assert torch.equal(model(x), y)


def test_a_bias_is_given_by_the_first_that_has_one_and_taken_with_the_last():
    model = make_model("no-bias", **F64)
    x = make_input(**F64)
    names = ("one", "two", "three")
    designs = (sl.lora(2), sl.bitfit(), sl.glora(1))
    adapters = [attach_small(model, d, n) for n, d in zip(names, designs, strict=True)]
    q, y, before = model.blocks[0].q, model(x), base_bits(model)
    for first, second in itertools.permutations(adapters, 2):
        first.merge()
        second.merge()
        assert_near(model(x), y)
        assert (q.bias is not None) == any(adapter.gains_bias for adapter in (first, second))
        first.unmerge()
        assert_near(model(x), y)
        assert (q.bias is not None) == bool(second.gains_bias)
        second.unmerge()
        assert base_bits(model) == before
        assert q.bias is None


def test_a_merged_one_keeps_its_bias_when_one_above_goes():
    model = make_model("no-bias", **F64)
    below, above = attach_small(model, sl.bitfit(), "below"), attach_small(model, "glora", "above")
    below.merge()
    above.merge()
    y = model(make_input(**F64))
    with unchanged(model), pytest.raises(sl.AdapterError, match="must not lie on another merged"):
        above.detach(keep_merged=True)
    below.detach(keep_merged=True)
    above.detach(keep_merged=True)
    assert torch.equal(model(make_input(**F64)), y)
    assert model.blocks[0].q.bias is not None


@some_designs
@every_layer
def test_rows_of_a_batch(key, layer):
    model = make_model(layer, **F64)
    one = attach_small(model, key, "one", 3)
    two = attach_small(model, THREE["matrix"] if layer != "no-bias" else "ssf", "two", 4)
    x = make_input(4, 5, **F64)
    alone = {}
    for name in ("one", "two", None):
        others = [a for n, a in (("one", one), ("two", two)) if n != name]
        with others[0].disabled(), others[-1].disabled():
            alone[name] = model(x)
    names = ["two", None, "one", "two"]
    with slt.rows(model, names):
        y = model(x)
    for row, name in enumerate(names):
        assert_near(y[row], alone[name][row])
    with slt.rows(model, ["one"] * 4):
        assert_near(model(x), alone["one"])


def test_gradients_of_rows():
    model = make_model(**F64)
    adapter = attach_small(model, "all", "one")
    x = make_input(3, 5, **F64)
    factors = list(adapter.parameters())
    expected = torch.autograd.grad(model(x)[[0, 2]].square().sum(), factors)
    with slt.rows(model, ["one", None, "one"]):
        found = torch.autograd.grad(model(x)[[0, 2]].square().sum(), factors)
    for own, other in zip(found, expected, strict=True):
        assert_near(own, other)


@every_pair
def test_disabled_is_the_base(key, layer):
    model = make_model(layer)
    x = make_input()
    expected, before = model(x), base_bits(model)
    adapter = attach_small(model, key)
    y = model(x)
    with adapter.disabled():
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), y)
    adapter.merge()
    merged, held = model(x), base_bits(model)
    with adapter.disabled():
        assert torch.equal(model(x), expected)
        assert base_bits(model) == before
    assert torch.equal(model(x), merged)
    assert base_bits(model) == held


@some_designs
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("layer", ["bias", "no-bias"])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "file"]
)
def test_copies_stand_on_their_own(key, layer, merged, copied):
    model = make_model(layer)
    x = make_input()
    before = base_bits(model)
    adapter = attach_small(model, key)
    if merged:
        adapter.merge()
    y = model(x)
    twin = copied(model)
    assert torch.equal(twin(x), y)
    with torch.no_grad():
        for factor in twin.superlora.parameters():
            factor.zero_()
    assert torch.equal(model(x), y)
    if merged:
        twin.superlora.unmerge()
        assert base_bits(twin) == before
        assert torch.equal(model(x), y)
    twin.superlora.detach()
    assert base_bits(twin) == before
    assert torch.equal(model(x), y)


@some_designs
def test_a_forward_of_another_library_is_called_once_and_seen(key):
    """What scales the outputs scales those of the base, whatever its forward does."""
    model = make_model(**F64)
    layer = model.blocks[0].q
    x = make_input(**F64)
    own = attach_small(model, key)
    change = layer(x) - torch.nn.functional.linear(x, layer.weight, layer.bias)
    own.detach()
    calls = []

    def wrapped(input):
        calls.append(1)
        y = torch.nn.functional.linear(input, layer.weight, layer.bias)
        return y + torch.tanh(input.sum(-1, keepdim=True))

    layer.forward = wrapped
    before = wrapped(x)
    calls.clear()
    attach_small(model, key)
    assert_near(layer(x), before + change)
    assert len(calls) == 1


@some_designs
def test_a_layer_is_called_by_keyword(key):
    model = make_model(**F64)
    attach_small(model, key)
    x = make_input(**F64)
    assert_near(model.blocks[0].q(input=x), model.blocks[0].q(x))


@some_designs
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3, 4)], ids=str)
def test_any_batch_shape(key, shape):
    model = make_model(**F64)
    adapter = attach_small(model, key)
    q = model.blocks[0].q
    x = torch.randn(*shape, 16, dtype=torch.float64, requires_grad=True)
    y = q(x)
    weight, bias = merged_by_hand(q, [adapter], "blocks.0.q")
    assert y.shape == (*shape, 8)
    y.sum().backward()
    assert x.grad.shape == x.shape
    if y.numel():
        assert_near(y, x @ weight.T + bias)
