"""Merge operations from attach to detach: no bit is lost, and forward is what is merged."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import superlora as sl
import superlora.torch as slt
from superlora.operations import GIVES_BIAS
from tests.torch.helpers import (
    assert_near,
    base_bits,
    bits,
    every_layer,
    make_input,
    seeded,
    unchanged,
)
from tests.torch.support_cases import (
    DESIGNS,
    PAIRS,
    TARGETS,
    attach_small,
    every_design,
    every_pair,
    make_model,
    merged_by_hand,
    plain_call,
    some_designs,
)

F64 = {"dtype": torch.float64}
# The dtypes in turns: each design has both.
every_pair_and_dtype = pytest.mark.parametrize(
    ("key", "layer", "dtype"),
    [
        pytest.param(*pair.values, (torch.float32, torch.bfloat16)[place % 2], id=pair.id)
        for place, pair in enumerate(PAIRS)
    ],
)


def merged_names(adapter):
    """Return the parameters that merging changes."""
    found = set()
    for layer, own in adapter.plan.layout.supports.items():
        of_bias = own.keys() & {"weight_to_bias", "scale_bias", "add_bias"}
        module = adapter.layers()[layer]
        found |= {f"{layer}.weight"} if own.keys() - of_bias else set()
        if of_bias & GIVES_BIAS or (of_bias and module.bias is not None):
            found.add(f"{layer}.bias")
    return found


@every_pair_and_dtype
def test_attach_changes_no_bit_of_the_output(key, layer, dtype):
    model = make_model(layer, dtype=dtype)
    x = make_input(dtype=dtype)
    expected = model(x)
    slt.attach(model, DESIGNS[key], TARGETS)
    assert torch.equal(model(x), expected)


@every_design
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize(("width", "height", "tokens"), [(768, 768, 7), (4096, 32, 33)])
def test_attach_changes_no_bit_of_products_of_many_terms(key, dtype, width, height, tokens):
    """A product that begins with the bias rounds unlike one to which it is added."""
    with seeded(0):
        model = nn.ModuleDict({"q": nn.Linear(width, height)}).to(dtype)
        x = torch.randn(tokens, width).to(dtype)
    expected = model["q"](x)
    design = DESIGNS[key] if key != "ia3" else sl.ia3()
    slt.attach(model, design, ["q"])
    assert torch.equal(model["q"](x), expected)


@every_pair
def test_forward_is_merged_is_the_closed_form(key, layer):
    model = make_model(layer, **F64)
    x = make_input(**F64)
    before = model(x)
    keys = list(model.state_dict())
    bits_before = base_bits(model)
    adapter = attach_small(model, key)
    adapter.scale = 1.3
    y = model(x)
    assert (y - before).abs().max() > 1e-3
    assert_near(y, plain_call(model, [adapter], lambda: model(x)))
    expected = {name: merged_by_hand(m, [adapter], name) for name, m in adapter.layers().items()}
    adapter.merge()
    assert_near(model(x), y)
    for name, module in adapter.layers().items():
        weight, bias = expected[name]
        held = module.weight if isinstance(module, nn.Linear) else module.weight.t()
        assert_near(held, weight)
        assert (module.bias is None) == (bias is None)
        if bias is not None:
            assert_near(module.bias, bias)
    adapter.unmerge()
    assert base_bits(model) == bits_before
    assert torch.equal(model(x), y)
    adapter.detach()
    assert torch.equal(model(x), before)
    assert list(model.state_dict()) == keys


@every_design
def test_the_scale_multiplies_every_support(key):
    adapter = attach_small(make_model(**F64), key)
    names = list(adapter.plan.shapes)
    before = {name: adapter.delta(name).detach() for name in names}
    blocks = {name: factor.detach() for name, factor in adapter.factors().items()}
    for name, delta in adapter.plan.deltas(blocks).items():
        assert_near(before[name], delta)  # of which each has the scale of its own design
    adapter.scale = -1.3
    for name in names:
        assert_near(adapter.delta(name), -1.3 * before[name])


@pytest.mark.parametrize("scale", [None, -0.5])
def test_plan_merge_is_what_the_adapter_merges(scale):
    model = make_model("no-bias", **F64)
    adapter = attach_small(model, DESIGNS["glora"])  # every design has the scale 1
    adapter.scale = scale or 1.0
    found = {
        name: adapter.plan.merge(adapter.factors(), name, module.weight.clone(), scale=scale)
        for name, module in adapter.layers().items()
    }
    adapter.merge()
    for name, module in adapter.layers().items():
        assert_near(module.weight, found[name][0])
        assert_near(module.bias, found[name][1])


@every_pair_and_dtype
def test_unmerge_and_detach_restore_every_bit(key, layer, dtype):
    model = make_model(layer, dtype=dtype)
    before = base_bits(model)
    order = list(model.state_dict())
    with unchanged(model):
        adapter = attach_small(model, key)
        changing = merged_names(adapter)
        for _ in range(2):
            adapter.merge()
            after = base_bits(model)
            assert {name for name in after if before.get(name) != after[name]} == changing
            adapter.unmerge()
            assert base_bits(model) == before
        adapter.detach()
    assert list(model.state_dict()) == order


@every_layer
def test_a_layer_that_is_scaled_away_comes_back(layer):
    """At A = -1 the merged weight is zero: there is nothing to divide by."""
    model = make_model(layer)
    before = base_bits(model)
    adapter = slt.attach(model, {"scale_weight": sl.dense(), "add_bias": sl.dense()}, TARGETS)
    with torch.no_grad():
        for factor in adapter.parameters():
            factor.fill_(-1.0)
    adapter.merge()
    assert not any(module.weight.any() for module in adapter.layers().values())
    adapter.unmerge()
    assert base_bits(model) == before


GAINING = [key for key in DESIGNS if key.startswith(("glora", "bitfit", "ssf", "rep", "prompt"))]


@pytest.mark.parametrize("key", [*GAINING, "weight_to_bias", "add_bias", "all"])
def test_layers_without_a_bias_have_one_while_merged(key):
    model = make_model("no-bias", **F64)
    x = make_input(**F64)
    keys = list(model.state_dict())
    adapter = attach_small(model, key)
    layers = adapter.layers()
    assert adapter.gains_bias == list(layers)
    y = model(x)
    adapter.merge()
    assert adapter.gains_bias == list(layers)
    for module in layers.values():
        assert isinstance(module.bias, nn.Parameter)
        assert not module.bias.requires_grad
        assert module.bias.any()
    assert_near(model(x), y)
    adapter.unmerge()
    assert all(module.bias is None for module in layers.values())
    adapter.merge()
    merged = model(x)
    adapter.detach(keep_merged=True)
    assert torch.equal(model(x), merged)
    added = [f"{name}.bias" for name in layers]
    assert sorted(model.state_dict()) == sorted(keys + added)
    assert not hasattr(model, "superlora")


def test_a_bias_that_stays_is_as_trainable_as_the_weight():
    model = make_model("no-bias")
    frozen = model.blocks[0].q
    frozen.weight.requires_grad_(False)
    first = attach_small(model, sl.ssf(), "first")
    second = attach_small(model, sl.bitfit(), "second")
    second.merge()
    second.detach(keep_merged=True)
    biases = {name: module.bias for name, module in first.layers().items()}
    assert not any(bias.requires_grad for bias in biases.values())
    first.detach()
    trained = {name for name, bias in biases.items() if bias.requires_grad}
    assert trained == set(biases) - {"blocks.0.q"}
    assert not frozen.weight.requires_grad


def test_only_operations_of_the_weight_give_no_bias():
    model = make_model("no-bias")
    adapter = attach_small(model, sl.ia3())
    assert adapter.gains_bias == []
    adapter.merge()
    assert all(module.bias is None for module in adapter.layers().values())


def test_scaling_a_bias_that_is_not_there_is_left_out():
    model = make_model("no-bias")
    adapter = slt.attach(model, sl.glora(2), TARGETS)
    assert {op for own in adapter.plan.layout.supports.values() for op in own} == {
        "scale_weight",
        "add_weight",
        "weight_to_bias",
        "add_bias",
    }
    model.blocks[0].q.bias = nn.Parameter(torch.zeros(8))
    adapter.detach()
    adapter = slt.attach(model, sl.glora(2), TARGETS)
    scaled = [n for n, own in adapter.plan.layout.supports.items() if "scale_bias" in own]
    assert scaled == ["blocks.0.q"]
    alone = make_model("no-bias")
    with unchanged(alone), pytest.raises(ValueError, match="must have a layer that it changes"):
        slt.attach(alone, {"scale_bias": sl.dense()}, TARGETS)


@some_designs
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_merged(key, value):
    for layer in ("bias", "no-bias"):
        model = make_model(layer)
        adapter = attach_small(model, key)
        with torch.no_grad():
            list(adapter.parameters())[-1].view(-1)[-1] = value
        before = base_bits(model)
        with pytest.raises(ValueError, match="must be finite to be merged"):
            adapter.merge()
        assert base_bits(model) == before


def test_a_bias_that_is_not_finite_is_not_merged():
    model = make_model("no-bias")
    adapter = attach_small(model, sl.bitfit())
    with torch.no_grad():
        list(adapter.parameters())[-1][-1] = float("inf")
    with unchanged(model), pytest.raises(ValueError, match="must be finite"):
        adapter.merge()


FORMS = {
    "add_weight": ["2", "vector", "constant"],
    "scale_weight": ["2", "vector", "constant"],
    "right_weight": ["2"],
    "left_weight": ["1"],
    "weight_to_bias": ["2", "vector"],
    "scale_bias": ["vector", "constant"],
    "add_bias": ["vector", "constant"],
}


@st.composite
def subsets(draw):
    """Draw any operations in any order, each in one of the forms that GLoRA has for it."""
    chosen = draw(st.lists(st.sampled_from(sorted(FORMS)), unique=True, min_size=1))
    found = {}
    for operation in chosen:
        form = draw(st.sampled_from(FORMS[operation]))
        option = int(form) if form.isdigit() else form
        scale = draw(st.sampled_from([1.0, -0.5]))
        found[operation] = sl.presets.operations.support(operation, option, scale=scale)
    return found


@settings(max_examples=40)
@given(subsets(), st.sampled_from(["bias", "no-bias", "conv1d"]))
def test_any_subset_of_the_operations(design, layer):
    assume(layer != "no-bias" or set(design) != {"scale_bias"})  # refused, as tested above
    model = make_model(layer, depth=1, **F64)
    x = make_input(**F64)
    before, held = model(x), base_bits(model)
    adapter = slt.attach(model, design, TARGETS)
    assert torch.equal(model(x), before)
    adapter.detach()
    adapter = attach_small(model, design)
    y = model(x)
    assert_near(y, plain_call(model, [adapter], lambda: model(x)))
    adapter.merge()
    assert_near(model(x), y)
    adapter.unmerge()
    assert base_bits(model) == held


def test_the_order_of_the_mapping_changes_no_bit():
    design = DESIGNS["all"]
    x = make_input()
    outputs, merged = [], []
    for keys in (list(design), list(design)[::-1]):
        model = make_model()
        adapter = attach_small(model, {key: design[key] for key in keys})
        values = {op: i for i, op in enumerate(sl.OPERATIONS)}
        with torch.no_grad():
            for own in adapter.plan.layout.supports.values():
                for operation, name in own.items():
                    for block in adapter.plan.blocks_of(name):
                        factor = adapter.factors()[block]
                        steps = torch.linspace(0.1, 0.5, factor.numel()).reshape(factor.shape)
                        factor.copy_(steps / (1 + values[operation]))
        outputs.append(model(x))
        adapter.merge()
        merged.append([bits(m.weight) for m in adapter.layers().values()])
    assert torch.equal(*outputs)
    assert merged[0] == merged[1]
