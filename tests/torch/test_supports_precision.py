"""Merge operations in half precision, under autocast, on the meta device; integers are refused."""

import pytest
import torch
from torch import nn

import superlora as sl
import superlora.torch as slt
from tests.torch.helpers import (
    assert_near,
    base_bits,
    bits,
    fill,
    gradients,
    loss_of,
    make_input,
    make_net,
    seeded,
    unchanged,
)
from tests.torch.support_cases import (
    DESIGNS,
    TARGETS,
    attach_small,
    every_design,
    make_model,
    plain_call,
    some_designs,
)


def near(actual, expected, tolerance):
    error = (actual.detach().double() - expected.detach().double()).abs().max()
    return error <= tolerance * expected.detach().double().abs().max()


@every_design
def test_autocast_is_near_and_gives_the_dtype_of_the_base(key):
    model = make_model()
    x = make_input()
    adapter = attach_small(model, key)
    q = model.blocks[0].q
    with torch.autocast("cpu", torch.bfloat16):
        y = q(x)
        with adapter.disabled():
            base = q(x)
        loss = loss_of(model(x).float())
    assert y.dtype == base.dtype == torch.bfloat16
    assert near(y, q(x), 3e-2)
    expected = gradients(adapter, loss_of(model(x)))
    found = gradients(adapter, loss)
    scale = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected[name]).abs().max() <= 0.1 * scale


@pytest.mark.parametrize("option", ["vector", 2])
def test_autocast_rounds_the_bias_once(option):
    """W0 C is a vector, whatever the number of tokens: it is made in its own precision."""
    with seeded(0):
        layer = nn.Linear(256, 64)
    only = {"weight_to_bias": sl.presets.operations.support("weight_to_bias", option)}
    adapter = fill(slt.attach(layer, only))
    shift = layer.weight @ adapter.delta("weight_to_bias.")[:, 0]
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.zeros(1, 256))
    assert torch.equal(y[0], layer.bias.bfloat16() + shift.bfloat16())


@every_design
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_base_of_half_precision(key, dtype):
    model = make_model(dtype=dtype)
    before = base_bits(model)
    adapter = attach_small(model, key)
    assert adapter.dtype == torch.float32
    x = make_input(dtype=dtype)
    y = model.blocks[0].q(x)
    assert y.dtype == dtype
    wide = make_model(dtype=dtype).double()
    other = attach_small(wide, key)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 4e-3
    expected = wide.blocks[0].q(x.double())
    assert near(y, expected, tolerance)
    adapter.merge()
    assert near(model.blocks[0].q(x), expected, tolerance)
    adapter.unmerge()
    assert base_bits(model) == before
    loss_of(model(x).float()).backward()
    for own, factor in zip(other.parameters(), adapter.parameters(), strict=True):
        assert factor.grad.dtype == torch.float32
        assert factor.grad.isfinite().all()
        assert own.shape == factor.shape


@pytest.mark.parametrize("key", ["glora", "all", "ssf"])
def test_merged_half_precision_is_rounded_once(key):
    """Weight and bias are summed in the factors' precision."""
    model = make_model(dtype=torch.bfloat16)
    adapter = attach_small(model, key)
    expected = {}
    for name, module in adapter.layers().items():
        plan = adapter.plan.merge(
            {n: f.detach() for n, f in adapter.factors().items()},
            name,
            module.weight.detach().float(),
            module.bias.detach().float(),
        )
        expected[name] = [part.bfloat16() for part in plan]
    adapter.merge()
    for name, module in adapter.layers().items():
        assert near(module.weight, expected[name][0], 1e-6)
        assert near(module.bias, expected[name][1], 1e-6)


@some_designs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_factors_of_another_dtype(key, dtype):
    other = torch.float64 if dtype == torch.float32 else torch.float32
    model = make_model(dtype=dtype)
    x = make_input(dtype=dtype)
    start = model(x)
    slt.attach(model, DESIGNS[key], TARGETS, dtype=other)
    assert torch.equal(model(x), start)
    model.superlora.detach()
    adapter = attach_small(model, key, dtype=other)
    y = model(x)
    assert y.dtype == dtype
    expected = make_model(dtype=torch.float64)
    expected.load_state_dict({k: v for k, v in model.state_dict().items() if "superlora" not in k})
    own = attach_small(expected, key)
    wanted = plain_call(expected, [own], lambda: expected(x.double()))
    assert_near(y, wanted, torch.float32)
    adapter.merge()
    assert_near(model(x), wanted, torch.float32)


@every_design
@pytest.mark.parametrize("assign", [False, True])
def test_attached_on_the_meta_device_and_loaded_later(key, assign):
    expected, source = make_net(), make_net()
    late = slt.attach(expected, DESIGNS[key], TARGETS, seed=4)
    with torch.device("meta"):
        model = make_net()
    early = slt.attach(model, DESIGNS[key], TARGETS, seed=4)
    assert all(block.is_meta for block in early.factors().values())
    with (
        unchanged(model),
        pytest.raises(sl.AdapterError, match="must be loaded, and not offloaded, to be merged"),
    ):
        early.merge()
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict(), strict=False, assign=assign)
    for name, block in late.factors().items():
        assert bits(early.factors()[name]) == bits(block)
    for own, other in ((model, early), (expected, late)):
        loss_of(own(make_input())).backward()
        with torch.no_grad():
            for factor in other.parameters():
                factor -= 0.1 * factor.grad
    assert torch.equal(model(make_input()), expected(make_input()))


def test_a_meta_model_without_biases_leaves_out_what_scales_them():
    with torch.device("meta"):
        model = make_net("no-bias")
    adapter = slt.attach(model, sl.glora(2), TARGETS)
    assert adapter.gains_bias == list(adapter.layers())
    assert not any("scale_bias" in own for own in adapter.plan.layout.supports.values())


@pytest.mark.parametrize(
    "key",
    ["glora", "bitfit", "scale_weight", "right_weight", "left_weight", "repadapter", "all"],
)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32], ids=str)
def test_quantised_weights_are_refused(key, dtype):
    """Their numbers are not those of W0, which most operations take."""
    model = make_net()
    codes = torch.ones(8, 16).to(dtype)
    model.blocks[1].q.weight = nn.Parameter(codes, requires_grad=False)
    with (
        unchanged(model),
        pytest.raises(
            TypeError, match=r"'blocks\.1\.q' has no .* floating-point type: it is torch"
        ),
    ):
        slt.attach(model, DESIGNS[key], TARGETS)


@some_designs
def test_moving_and_casting_a_model_takes_the_adapter_with_it(key):
    model = make_model()
    adapter = attach_small(model, key)
    x = make_input()
    y = model(x)
    model.double()
    assert adapter.dtype == torch.float64
    assert_near(model(x.double()), y.double(), torch.float32)
    adapter.merge()
    assert_near(model(x.double()), y.double(), torch.float32)
