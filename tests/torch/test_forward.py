"""forward == base + x @ ΔWᵀ == merged forward, for every spec, layer and dtype."""

import numpy
import pytest
import torch
from torch import nn

import superlora as sl
import superlora.torch as slt
from tests import oracles
from tests.pairs import in_turn, pairwise
from tests.strategies import Mixing
from tests.torch.helpers import (
    INNER,
    LAYERS,
    SPECS,
    WIDTH,
    assert_near,
    attach_filled,
    base_bits,
    every_layer,
    every_spec,
    fill,
    gradients,
    kept_blocks,
    layers_of,
    make_input,
    make_layer,
    make_net,
    seeded,
    targets_of,
    unchanged,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def input_of(layer, *shape, **to):
    width = INNER if layer.weight.shape[isinstance(layer, nn.Linear)] == INNER else WIDTH
    with seeded(3):
        return torch.randn(*shape, width).to(**to)


@pairwise({"key": list(SPECS), "layer": LAYERS, "dtype": DTYPES})
def test_forward_equals_base_plus_update_equals_merged(key, layer, dtype, device):
    if device == "mps" and dtype == torch.float64:
        pytest.skip("there are no float64 numbers on mps")
    model = make_net(layer, device=device, dtype=dtype)
    adapter = attach_filled(model, key)
    before = base_bits(model)
    inputs, expected = {}, {}
    with torch.no_grad():
        for name, module in layers_of(model, adapter).items():
            x = inputs[name] = input_of(module, 2, 5, device=device, dtype=dtype)
            with adapter.disabled():
                base = module(x)
            update = x.to(adapter.delta(name).dtype) @ adapter.delta(name).t()
            assert update.abs().max() > base.abs().max() / 20, "the update must be seen in the sum"
            expected[name] = base.to(update.dtype) + update
            assert_near(module(x), expected[name], dtype)
            assert module(x).dtype == dtype
        adapter.merge()
        for name, module in layers_of(model, adapter).items():
            assert_near(module(inputs[name]), expected[name], dtype)
        adapter.unmerge()
    assert base_bits(model) == before


@in_turn("key", SPECS, "layer", LAYERS)
def test_output_starts_bit_equal_and_base_is_untouched(key, layer):
    model = make_net(layer, dtype=torch.float32)
    x = make_input()
    expected, bits = model(x), base_bits(model)
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    keys = list(model.state_dict())
    adapter = slt.attach(model, SPECS[key], targets_of(key))
    # One vector for all blocks cannot be zero and have a gradient.
    assert torch.equal(model(x), expected) or key == "unilora"
    assert base_bits(model) == bits
    own = [name for name in model.state_dict() if name.startswith("superlora.")]
    assert [name for name in model.state_dict() if name not in own] == keys
    assert own == [f"superlora.{name}" for name in kept_blocks(adapter.plan)]
    assert [
        (name, type(module))
        for name, module in model.named_modules()
        if name.partition(".")[0] != "superlora"
    ] == kinds
    frozen = [name for name, tensor in model.named_parameters() if not tensor.requires_grad]
    assert set(frozen) == set(bits) - {"shift"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_output_starts_bit_equal_in_other_dtypes(dtype):
    model = make_net(dtype=dtype)
    expected = model(make_input(dtype=dtype))
    slt.attach(model, sl.dense())
    assert torch.equal(model(make_input(dtype=dtype)), expected)


@pytest.mark.parametrize("shape", [(96, 200, 7), (64, 64, 33), (2304, 768, 3)], ids=str)
@every_layer
def test_output_of_wide_layer_starts_bit_equal(shape, layer):
    """The matrix product of W₀ + 0 must round as that of W₀ does, whatever its memory layout."""
    outputs, width, rows = shape
    with seeded(0):
        model = nn.Sequential(make_layer(layer, width, outputs))
        inputs = [torch.randn(2, rows, width), torch.randn(rows, width), torch.randn(width)]
    expected = [model(x) for x in inputs]
    slt.attach(model, sl.dense())
    assert [torch.equal(model(x), y) for x, y in zip(inputs, expected, strict=True)] == [True] * 3


@every_spec
def test_updates_equal_plain_loops(key):
    """The oracle's nested loops over numpy floats give the same updates."""
    model = make_net(dtype=torch.float64)
    adapter = attach_filled(model, key)
    factors = {name: factor.detach().numpy() for name, factor in adapter.factors().items()}
    expected = oracles.deltas(adapter.plan, factors)
    found = adapter.deltas()
    assert list(found) == list(expected)
    for name, delta in found.items():
        numpy.testing.assert_allclose(delta.detach().numpy(), expected[name], rtol=0, atol=1e-13)


def test_mapped_spec_trains_and_merges():
    """A map of one's own that mixes all entries goes the same way."""
    spec = sl.Spec(rank=2, groups=1, fold="balanced", ratio=0.5, map=Mixing(3), scale=0.02)
    model = make_net(dtype=torch.float64)
    adapter = fill(slt.attach(model, spec, ["q", "o"]))
    x = make_input(dtype=torch.float64)
    y = model(x)
    assert all(found.abs().sum() > 0 for found in gradients(adapter, y.sum()).values())
    adapter.merge()
    assert_near(model(x), y)
    with adapter.disabled():
        base = model(x)
    adapter.unmerge()
    adapter.detach()
    assert torch.equal(model(x), base)
    assert not torch.allclose(base, y)


@every_spec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_disabled_is_the_base_bit_for_bit(key, dtype):
    model = make_net(dtype=dtype)
    x = make_input(dtype=dtype)
    expected = model(x)
    adapter = attach_filled(model, key)
    adapted = model(x)
    assert not torch.equal(adapted, expected)
    with adapter.disabled(), adapter.disabled():
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), adapted)
    adapter.merge()
    merged = model(x)
    with adapter.disabled():
        assert torch.equal(model(x), expected)
        with adapter.disabled():
            assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), merged)
    assert not torch.equal(merged, expected)


@every_spec
def test_scale_changes_forward_and_merge_alike(key):
    model = make_net(dtype=torch.float64)
    adapter = attach_filled(model, key)
    deltas = adapter.deltas()
    x = make_input(dtype=torch.float64)
    y = model(x)
    adapter.scale = 3 * adapter.scale
    for name, delta in adapter.deltas().items():
        assert_near(delta, 3 * deltas[name])
    tripled = model(x)
    assert not torch.allclose(tripled, y)
    adapter.merge()
    assert_near(model(x), tripled)
    with pytest.raises(sl.AdapterError, match="unmerge"):
        adapter.scale = 1.0
    adapter.unmerge()
    adapter.scale = 0
    with adapter.disabled():
        expected = model(x)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("value", ["1", None, True, float("nan"), float("inf"), 1j])
def test_bad_scale_is_refused(value):
    model = make_net()
    adapter = attach_filled(model, "lora")
    with unchanged(model), pytest.raises((TypeError, ValueError), match="scale must be"):
        adapter.scale = value


def test_factors_of_half_precision_model_are_float32():
    model = make_net(dtype=torch.bfloat16)
    adapter = slt.attach(model, sl.lora(2), ["q"])
    assert {factor.dtype for factor in adapter.parameters()} == {torch.float32}
    half = slt.attach(model, sl.lora(2), ["q"], name="other", dtype=torch.bfloat16)
    assert {factor.dtype for factor in half.parameters()} == {torch.bfloat16}
    fill(half)
    x = make_input(dtype=torch.bfloat16)
    y = model(x)
    half.merge()
    assert_near(model(x), y)


def test_small_update_is_not_rounded_away_in_half_precision():
    """In bfloat16 W₀ + ΔW would be W₀ here, while x @ ΔWᵀ is far from nothing."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False, dtype=torch.bfloat16))
    nn.init.ones_(model[0].weight)
    adapter = slt.attach(model, sl.dense())
    with torch.no_grad():
        next(adapter.parameters()).copy_(torch.tensor([1e-3, -1e-3]))
    x = torch.tensor([[4.0, -4.0]], dtype=torch.bfloat16)
    assert_near(model(x), torch.tensor([[8e-3]]), torch.bfloat16)
