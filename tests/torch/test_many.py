"""Several adapters on the same layers, on a model and on its parts, on shared layers."""

import contextlib
import itertools
import pickle
import random

import pytest
import torch

import superlora as sl
import superlora.torch as slt
from tests.torch.helpers import (
    SPECS,
    Net,
    assert_near,
    attach_filled,
    base_bits,
    fill,
    gradients,
    layers_of,
    loss_of,
    make_input,
    make_net,
    make_outer,
    plain_forward,
    targets_of,
    unchanged,
)

KEYS = ("lora", "dense", "cut")
orders = pytest.mark.parametrize("order", list(itertools.permutations(KEYS)), ids="-".join)


def attach_all(model, order=KEYS):
    return {key: attach_filled(model, key, name=key, seed=KEYS.index(key)) for key in order}


@orders
def test_outputs_add_in_any_order_of_attachment(order):
    model = make_net(dtype=torch.float64)
    alone = {}
    x = make_input(dtype=torch.float64)
    for key in KEYS:
        adapter = attach_filled(model, key, name=key, seed=KEYS.index(key))
        alone[key] = {
            name: layer(x)
            for name, layer in layers_of(model, adapter).items()
            if layer.weight.shape[1] == 16
        }
        adapter.detach()
    adapters = attach_all(model, order)
    for name in alone["lora"]:
        layer = model.get_submodule(name)
        base = torch.nn.functional.linear(x, layer.weight, layer.bias)
        assert_near(layer(x), base + sum(found[name] - base for found in alone.values()))
    with adapters["lora"].disabled(), adapters["cut"].disabled():
        for name, expected in alone["dense"].items():
            assert torch.equal(model.get_submodule(name)(x), expected)


@pytest.mark.parametrize("removal", list(itertools.permutations(KEYS)), ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_merge_unmerge_and_detach_in_any_order(removal, dtype):
    model = make_net(dtype=dtype)
    bits, x = base_bits(model), make_input(dtype=dtype)
    with unchanged(model):
        adapters = attach_all(model)
        expected = model(x)
        for key in ("cut", "lora", "dense"):
            adapters[key].merge()
            # Through two blocks the rounding of merged weights grows.
            assert (model(x) - expected).norm() <= {torch.float64: 1e-12}.get(
                dtype, 0.1
            ) * expected.norm()
        for key in removal:
            adapters[key].unmerge()
        assert base_bits(model) == bits
        assert torch.equal(model(x), expected)
        for key in removal:
            adapters[key].detach()


@pytest.mark.parametrize("seed", range(12))
def test_any_walk_of_merges_over_overlapping_targets(seed):
    """Adapters that share some layers and not others; the base is there bit for bit at the end."""
    model = make_net(dtype=torch.float64)
    bits, x = base_bits(model), make_input(dtype=torch.float64)
    parts = {"qv": ["q", "v"], "v": ["v"], "vo": ["v", "o"], "o": ["o"], "all": ["q", "v", "o"]}
    adapters = [
        fill(slt.attach(model, sl.lora(1, scale=0.2), targets, name=f"on_{name}"), number)
        for number, (name, targets) in enumerate(parts.items())
    ]
    expected = model(x)
    alone = {}
    for adapter in adapters:
        with adapter.disabled():
            alone[adapter.name] = model(x)
    draw = random.Random(seed)
    for _ in range(20):
        adapter = draw.choice(adapters)
        if draw.random() < 0.3:
            with adapter.disabled():
                assert_near(model(x), alone[adapter.name])
        elif adapter.merged:
            adapter.unmerge()
        else:
            adapter.merge()
        assert_near(model(x), expected)
    draw.shuffle(adapters)
    for adapter in adapters:
        if adapter.merged:
            adapter.unmerge()
    assert base_bits(model) == bits
    assert torch.equal(model(x), expected)


def test_unmerge_below_an_update_that_is_no_longer_finite_leaves_it_merged_or_says_so():
    """It must be merged again on top, which its factors no longer allow."""
    model = make_net(dtype=torch.float64)
    lower, upper = (attach_filled(model, key, name=key) for key in ("lora", "dense"))
    lower.merge()
    upper.merge()
    with torch.no_grad():
        next(upper.parameters()).fill_(float("nan"))
    with contextlib.suppress(ValueError):
        lower.unmerge()
    for adapter in (lower, upper):
        if adapter.merged:
            adapter.unmerge()
    assert base_bits(model) == base_bits(make_net(dtype=torch.float64))


@orders
def test_disabling_one_leaves_the_others(order):
    model = make_net(dtype=torch.float64)
    x = make_input(dtype=torch.float64)
    base = model(x)
    adapters = attach_all(model)
    first, second, third = (adapters[key] for key in order)
    with first.disabled():
        expected = model(x)
    first.merge()
    second.merge()
    with first.disabled():
        assert_near(model(x), expected)
        with second.disabled(), third.disabled():
            assert torch.equal(model(x), base)
    second.unmerge()
    with first.disabled():
        assert torch.equal(model(x), expected)


def test_detach_keeping_one_merged_on_another_is_refused():
    """The lower one's bits are those of a weight without the upper one."""
    model = make_net()
    lower, upper = (attach_filled(model, key, name=key) for key in ("lora", "dense"))
    lower.merge()
    upper.merge()
    with unchanged(model), pytest.raises(sl.AdapterError, match="'lora' first"):
        upper.detach(keep_merged=True)


def test_detach_keeping_one_of_two_merged():
    """What it merged becomes the base; the other still unmerges to just that."""
    gone = 0
    model = make_net(dtype=torch.float64)
    x = make_input(dtype=torch.float64)
    adapters = [attach_filled(model, key, name=key) for key in ("lora", "dense")]
    with adapters[1 - gone].disabled():
        expected = model(x)
    both = model(x)
    for adapter in adapters:
        adapter.merge()
    adapters[gone].detach(keep_merged=True)
    assert_near(model(x), both)
    adapters[1 - gone].unmerge()
    assert_near(model(x), both)
    with adapters[1 - gone].disabled():
        assert_near(model(x), expected)
    adapters[1 - gone].detach()
    assert_near(model(x), expected)


def test_unmerge_of_one_does_not_read_the_factors_of_another():
    """The other's may have changed since it was merged, even to nonsense."""
    model = make_net(dtype=torch.float64)
    adapters = attach_all(model)
    adapters["lora"].merge()
    x = make_input(dtype=torch.float64)
    adapters["cut"].merge()
    expected = model(x)
    with torch.no_grad():
        next(adapters["lora"].parameters()).fill_(float("nan"))
    adapters["cut"].unmerge()
    assert_near(model(x), expected)
    adapters["lora"].unmerge()
    assert base_bits(model) == base_bits(make_net(dtype=torch.float64))


def test_failed_merge_leaves_the_other_merged():
    model = make_net()
    adapters = attach_all(model)
    adapters["lora"].merge()
    bits = base_bits(model)
    with torch.no_grad():
        list(adapters["dense"].parameters())[-1].fill_(float("inf"))
    with pytest.raises(ValueError, match="finite"):
        adapters["dense"].merge()
    assert base_bits(model) == bits
    adapters["lora"].unmerge()
    assert base_bits(model) == base_bits(make_net())


def test_factors_of_one_stay_trainable_when_another_comes():
    model = make_net()
    adapters = attach_all(model)
    trainable = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert trainable == {f"{key}.{block}" for key in KEYS for block in adapters[key].factors()}
    found = loss_of(model(make_input()))
    found.backward()
    assert all(p.grad.abs().sum() > 0 for key in KEYS for p in adapters[key].parameters())


@pytest.mark.parametrize("keys", list(itertools.permutations(KEYS, 2)), ids="-".join)
def test_gradients_of_two_adapters_equal_plain_autograd(keys):
    model = make_net(dtype=torch.float64)
    x = make_input(dtype=torch.float64)
    first, second = (attach_filled(model, key, name=key) for key in keys)
    found = gradients(first, loss_of(model(x)))
    total = dict(second.deltas())
    second.detach()
    with torch.no_grad():
        for name, delta in total.items():
            model.get_submodule(name).weight += delta
    expected = gradients(first, loss_of(plain_forward(model, first, lambda: model(x))))
    for name, gradient in expected.items():
        assert_near(found[name], gradient)


@pytest.mark.parametrize("outer_first", [True, False], ids=["model-then-part", "part-then-model"])
@pytest.mark.parametrize("key", KEYS)
def test_adapters_on_a_model_and_on_its_part(key, outer_first):
    """The layers have another dotted name for each of them."""
    model = make_outer(dtype=torch.float64)
    x = make_input(dtype=torch.float64)
    base = model(x)
    hosts = [(model, "whole"), (model.inner, "part")]
    with unchanged(model):
        adapters = [
            slt.attach(host, SPECS[key], ["q", "v", "o"], name=name)
            for host, name in (hosts if outer_first else hosts[::-1])
        ]
        assert torch.equal(model(x), base)
        for seed, adapter in enumerate(adapters):
            fill(adapter, seed)
        both = model(x)
        for adapter in adapters:
            adapter.merge()
        assert_near(model(x), both)
        for adapter in adapters:
            adapter.unmerge()
        assert torch.equal(model(x), both)
        with adapters[0].disabled(), adapters[1].disabled():
            assert torch.equal(model(x), base)
        for adapter in adapters:
            adapter.detach()


@pytest.mark.parametrize("part_first", [True, False], ids=["part-first", "model-first"])
def test_base_stays_frozen_until_the_last_adapter_is_gone(part_first):
    """Also when the adapters lie on a model and on its part."""
    model = make_outer()
    part = slt.attach(model.inner, sl.lora(2), ["q"], name="part")
    whole = slt.attach(model, sl.lora(2), ["v"], name="whole")
    first, second = (part, whole) if part_first else (whole, part)
    first.detach()
    left = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    prefix = "whole" if part_first else "inner.part"
    expected = {f"{prefix}.{block}" for block in second.factors()}
    if not part_first:
        left -= {"extra.weight", "extra.bias"}
    assert left == expected
    second.detach()
    assert all(tensor.requires_grad for tensor in model.parameters())


def test_detach_gives_back_what_was_trainable_before_its_own_attach():
    """The user trains the head beside the first adapter; the second comes and goes."""
    model = make_net()
    first = slt.attach(model, sl.lora(2), ["q"], name="first")
    model.head.requires_grad_(True)
    with unchanged(model):
        slt.attach(model, sl.lora(2), ["q"], name="second").detach()
    first.detach()
    assert all(tensor.requires_grad for tensor in model.parameters())


def test_base_stays_frozen_under_an_adapter_of_a_later_process(monkeypatch):
    """A pickled adapter of one process, and a new one of the next, whose count starts again."""
    model = make_net()
    for name in ("first", "second", "third"):
        old = slt.attach(model, sl.lora(2), ["q"], name=name)
        if name != "third":
            old.detach()
    model = pickle.loads(pickle.dumps(model))
    monkeypatch.setattr("superlora.torch.adapter._attached", itertools.count(), raising=False)
    new = slt.attach(model, sl.lora(2), ["q"], name="new")
    model.third.detach()
    trainable = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert trainable == {f"new.{block}" for block in new.factors()}
    new.detach()
    assert all(tensor.requires_grad for tensor in model.parameters())


def test_layer_shared_by_two_models():
    one, two = make_net(), make_net(seed=1)
    two.blocks[1].q = one.blocks[0].q
    x = make_input()
    base = two(x)
    first = slt.attach(one, sl.lora(2), ["q"], name="first")
    second = slt.attach(two, sl.lora(2), ["q"], name="second")
    assert torch.equal(two(x), base)
    fill(first)
    fill(second)
    expected = one(x), two(x)
    second.detach()
    with first.disabled():
        assert torch.equal(two(x), base)
    assert not torch.equal(one(x), expected[0])
    first.detach()
    assert torch.equal(two(x), base)


def test_second_adapter_with_the_same_targets_on_a_sequential():
    """The first adapter's own modules, named 0, 1, ..., must not match the targets."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    for name in ("first", "second"):
        adapter = slt.attach(model, sl.lora(2), ["0", "1"], name=name)
        assert list(adapter.plan.shapes) == ["0", "1"]


@pytest.mark.parametrize("targets", [".*[qvo]", "all-linear"])
def test_patterns_pass_over_adapters(targets):
    model = make_net()
    expected = list(slt.attach(model, sl.lora(2), targets, name="first").plan.shapes)
    assert list(slt.attach(model, sl.lora(2), targets, name="second").plan.shapes) == expected
    seen = []
    slt.attach(model, sl.lora(2), lambda name, _: seen.append(name) or name == "head", name="third")
    assert not [name for name in seen if name.startswith(("first", "second"))]


def test_same_name_on_two_models():
    one, two = make_net(), make_net(seed=1)
    first, second = attach_filled(one, "lora"), attach_filled(two, "lora", seed=4)
    assert isinstance(one, Net)
    first.merge()
    assert not second.merged
    assert base_bits(two) == base_bits(make_net(seed=1))


def test_load_a_second_copy_of_an_adapter_doubles_its_update(tmp_path):
    model = make_net(dtype=torch.float64)
    adapter = attach_filled(model, "cut")
    adapter.save(tmp_path / "a.safetensors")
    x = make_input(dtype=torch.float64)
    adapter.scale = 2 * adapter.scale
    expected = model(x)
    adapter.scale = adapter.scale / 2
    again = slt.load(model, tmp_path / "a.safetensors", name="again")
    assert_near(model(x), expected)
    assert targets_of("cut") == ["q", "v", "o"]
    assert list(again.plan.shapes) == list(adapter.plan.shapes)
