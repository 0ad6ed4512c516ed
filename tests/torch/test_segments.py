"""Low-rank updates of several adapters in `rows`: one product for all, equal to one by one."""

import pytest
import torch
from torch import nn

import superlora as sl
import superlora.torch as slt
from superlora.torch import site
from superlora.torch.segments import Segments
from tests.torch.helpers import (
    assert_near,
    every_layer,
    fill,
    loss_of,
    make_input,
    make_net,
)
from tests.torch.test_rows import one_by_one

NAMES = ["b", "a", None, "b", "c", "b"]
ALL = ["b", "a", "a", "b", "c", "b"]


def adapters_of(model, targets="all-linear"):
    """Adapters of different ranks and scales; the last is never named."""
    specs = {
        "a": sl.lora(1, alpha=3),
        "b": sl.lora(3, alpha=2),
        "c": sl.lora(2, alpha=5),
        "d": sl.lora(1),
    }
    return {
        name: fill(slt.attach(model, spec, targets, name=name), seed)
        for seed, (name, spec) in enumerate(specs.items())
    }


@pytest.fixture
def counted(monkeypatch):
    """What was stacked, and how many products there were."""
    counts = {"stacked": 0, "updates": 0}
    stacked, update = site.stacked, Segments.update

    def count_stacked(*args):
        counts["stacked"] += 1
        return stacked(*args)

    def count_updates(*args):
        counts["updates"] += 1
        return update(*args)

    monkeypatch.setattr(site, "stacked", count_stacked)
    monkeypatch.setattr(Segments, "update", count_updates)
    return counts


@pytest.mark.parametrize("names", [NAMES, ALL], ids=["some of the base", "none of the base"])
@pytest.mark.parametrize("shape", [(), (1,), (2,), (9,), (3, 4)], ids=str)
def test_equals_one_by_one(names, shape, counted):
    """Few tokens are copied to their adapters; the factors to many tokens."""
    model = make_net(dtype=torch.float64)
    adapters = adapters_of(model)
    x = make_input(6, *shape, dtype=torch.float64)
    with slt.rows(model, names):
        y = model(x)
    assert counted["updates"] > 0
    assert_near(y, one_by_one(model, adapters, x, names))


def test_no_tokens():
    model = make_net(dtype=torch.float64)
    adapters_of(model)
    x = make_input(6, 0, dtype=torch.float64)
    expected = model(x)
    with slt.rows(model, NAMES):
        assert model(x).shape == expected.shape


@every_layer
def test_layers(layer):
    model = make_net(layer, dtype=torch.float64)
    adapters = adapters_of(model)
    x = make_input(6, 2, dtype=torch.float64)
    with slt.rows(model, NAMES):
        y = model(x)
    assert_near(y, one_by_one(model, adapters, x, NAMES))


@pytest.mark.parametrize("tokens", [1, 9])
def test_gradients(tokens, counted):
    model = make_net(dtype=torch.float64)
    adapters = adapters_of(model)
    x = make_input(6, tokens, dtype=torch.float64, seed=6).requires_grad_()
    wanted = [x, *(p for adapter in adapters.values() for p in adapter.parameters())]

    def gradients_of(y):
        return torch.autograd.grad(loss_of(y), wanted, materialize_grads=True, allow_unused=True)

    with slt.rows(model, NAMES):
        y = model(x)
    assert counted["updates"] > 0
    expected = gradients_of(one_by_one(model, adapters, x, NAMES))
    for found, gradient in zip(gradients_of(y), expected, strict=True):
        assert_near(found, gradient)


def test_some_layers_and_other_structures_beside(counted):
    model = make_net(dtype=torch.float64)
    adapters = adapters_of(model, ["q", "v"])
    adapters["e"] = fill(slt.attach(model, sl.lora(2), ["blocks.1.q", "head"], name="e"), 7)
    adapters["f"] = fill(slt.attach(model, sl.dense(), ["q"], name="f"), 8)
    names = ["f", "b", "e", None, "a", "f", "e"]
    x = make_input(7, 2, dtype=torch.float64)
    with slt.rows(model, names):
        y = model(x)
    assert counted["updates"] > 0
    assert_near(y, one_by_one(model, adapters, x, names))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, counted):
    model = make_net(dtype=dtype)
    adapters = adapters_of(model)
    x = make_input(6, 2, dtype=dtype)
    with slt.rows(model, NAMES):
        y = model(x)
    assert counted["updates"] > 0
    assert y.dtype == dtype
    assert_near(y, one_by_one(model, adapters, x, NAMES), torch.bfloat16)


def test_autocast_and_factors_of_two_dtypes(counted):
    model = make_net()
    adapters = adapters_of(model)
    adapters["e"] = fill(slt.attach(model, sl.lora(2), "all-linear", name="e"), 7).to(
        torch.bfloat16
    )
    names = ["e", "a", "b", None, "e", "c"]
    x = make_input(6, 2)
    with slt.rows(model, names):
        y = model(x)
    assert counted["updates"] > 0
    assert_near(y, one_by_one(model, adapters, x, names), torch.bfloat16)
    exact = one_by_one(model, adapters, x, names)
    with torch.autocast("cpu", torch.bfloat16):
        with slt.rows(model, names):
            y = model(x)
        alone = one_by_one(model, adapters, x, names)
    assert y.dtype == torch.bfloat16
    # Rounded as often, at other places.
    assert (y - exact).abs().max() <= 3 * (alone - exact).abs().max()


@torch.no_grad()
def test_factors_are_stacked_once_a_block_without_gradients(counted):
    model = make_net(dtype=torch.float64)
    adapters = adapters_of(model)
    x = make_input(6, 2, dtype=torch.float64)
    with slt.rows(model, NAMES):
        model(x)
        once = counted["stacked"]
        model(x)
        assert counted["stacked"] == once
        assert counted["updates"] == 2 * once
        with torch.enable_grad():
            model(x)
        assert counted["stacked"] == 2 * once
        # What is changed is seen all the same.
        adapters["a"].scale = -2.0
        next(iter(adapters["b"].parameters())).mul_(3)
        with adapters["c"].disabled():
            without = model(x)
        y = model(x)
    names = [None if name == "c" else name for name in NAMES]
    assert_near(without, one_by_one(model, adapters, x, names))
    assert_near(y, one_by_one(model, adapters, x, NAMES))


def test_gradients_after_inference_in_one_block():
    model = make_net(dtype=torch.float64)
    adapters_of(model)
    fill(slt.attach(model, sl.dense(), "all-linear", name="f"), 8)
    x = make_input(6, 2, dtype=torch.float64)
    with slt.rows(model, ["f", *NAMES[1:]]):
        with torch.inference_mode():
            first = model(x).clone()
        y = model(x)
        loss_of(y).backward()
    assert_near(y, first)


def test_formed_updates_stay_formed(counted):
    model = make_net(dtype=torch.float64)
    adapters = adapters_of(model)
    for adapter in adapters.values():
        adapter.applied = "formed"
    x = make_input(6, 2, dtype=torch.float64)
    with slt.rows(model, NAMES):
        y = model(x)
    assert counted["updates"] == 0
    assert_near(y, one_by_one(model, adapters, x, NAMES))


def test_dropout_leaves_out_in_training_alone():
    model = nn.Sequential(nn.Linear(8, 8)).double()
    adapters = adapters_of(model)
    adapters["a"].dropout["module_dropout"] = 1 - 1e-12
    x = torch.randn(3, 8, dtype=torch.float64)
    names = ["a", "b", "c"]
    model.train()
    with slt.rows(model, names):
        y = model(x)
    assert_near(y, one_by_one(model, adapters, x, [None, "b", "c"]))
    model.eval()
    with slt.rows(model, names):
        y = model(x)
    assert_near(y, one_by_one(model, adapters, x, names))
