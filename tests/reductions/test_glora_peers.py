"""GLoRA and IA3 of PEFT, and GLoRA of LyCORIS, as they are installed, in our words."""

from __future__ import annotations

import copy
import itertools

import peft
import pytest
import torch
from lycoris.modules.glora import GLoRAModule

import superlora as sl
import superlora.torch as slt
from tests.reductions.cases import fill, make_net
from tests.reductions.glora_cases import attach_with, draw, drawn, linear, put, same
from tests.reductions.peft_rows import adapt

pytestmark = pytest.mark.filterwarnings("ignore:Unmerge result can be inaccurate")

A_B, C, D_E = (
    ["lora", "vector", "constant", "none"],
    ["lora", "vector", "none"],
    ["vector", "constant", "none"],
)
COMBINATIONS = [c for c in itertools.product(A_B, C, D_E) if set(c) != {"none"}]
OPERATIONS = {
    "glora_A": "scale_weight",
    "glora_B": "add_weight",
    "glora_C": "weight_to_bias",
    "glora_D": "scale_bias",
    "glora_E": "add_bias",
}
RANK = 2


def config(a_b, c, d_e, rank=RANK):
    return peft.GloraConfig(r=rank, config_A_B=a_b, config_C=c, config_D_E=d_e)


def design(a_b, c, d_e, rank=RANK):
    """Say the same with our names: PEFT has one option for A and B, and one for D and E."""
    options = {"lora": rank}
    a_b, c, d_e = (options.get(option, option) for option in (a_b, c, d_e))
    return sl.glora(
        rank, scale_weight=a_b, add_weight=a_b, weight_to_bias=c, scale_bias=d_e, add_bias=d_e
    )


def take(adapter, model, name="default"):
    """Copy PEFT's parameters into our blocks, path by path."""
    for layer, own in adapter.plan.layout.supports.items():
        peer = model.base_model.model.get_submodule(layer)
        for kind, operation in OPERATIONS.items():
            path = getattr(peer, kind)[name]
            if not list(path.parameters()):
                assert operation not in own
            elif hasattr(path, "Xd"):
                put(adapter, operation, layer, path.Xd.detach(), path.Xu.detach().T)
            else:
                put(adapter, operation, layer, path.X.detach().reshape(-1))


def trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_glora_of_peft(combination, seed):
    options = drawn(RANK, seed)
    net, model = adapt(options, config(*combination))
    adapter = slt.attach(net, design(*combination), options.keys)
    take(adapter, model)
    assert adapter.num_parameters == trained(model)
    x = draw(3, 8, seed=seed)
    expected = model(x)
    same(net(x), expected)
    assert not torch.allclose(expected, make_net(options)(x))
    model.merge_adapter()
    adapter.merge()
    same(net(x), expected)
    for layer, own in adapter.layers().items():
        peer = model.base_model.model.get_submodule(layer).base_layer
        same(own.weight, peer.weight)
        same(own.bias, peer.bias)


@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
def test_gradients_of_glora_of_peft(combination):
    options = drawn(RANK, 3)
    net, model = adapt(options, config(*combination))
    adapter = slt.attach(net, design(*combination), options.keys)
    take(adapter, model)
    x = draw(3, 8)
    for whole in (net, model):
        whole(x).square().sum().backward()
    for layer, own in adapter.plan.layout.supports.items():
        peer = model.base_model.model.get_submodule(layer)
        for kind, operation in OPERATIONS.items():
            path = getattr(peer, kind)["default"]
            if operation not in own:
                continue
            found = [adapter.factors()[b].grad for b in adapter.plan.blocks_of(own[operation])]
            if hasattr(path, "Xd"):
                expected = [path.Xd.grad, path.Xu.grad.T]
            else:
                expected = [path.X.grad.reshape(-1)]
            for one, other in zip(found, expected, strict=True):
                same(one, other, 1e-11)


@pytest.mark.parametrize("seed", [0, 1])
def test_two_adapters_of_peft(seed):
    """Both add their updates of the base, which neither has changed for the other."""
    options = drawn(RANK, seed)
    net, model = adapt(options, config("lora", "lora", "vector"))
    second = config("vector", "vector", "constant")
    second.target_modules = set(options.keys)
    model.add_adapter("second", second)
    model.double()
    model.base_model.set_adapter(["default", "second"])
    fill((p for n, p in model.named_parameters() if ".second." in n), seed + 7)
    one = slt.attach(net, design("lora", "lora", "vector"), options.keys, name="one")
    two = slt.attach(net, design("vector", "vector", "constant"), options.keys, name="two")
    take(one, model)
    take(two, model, "second")
    x = draw(3, 8)
    expected = model(x)
    same(net(x), expected)
    model.merge_adapter(["default", "second"])
    two.merge()
    one.merge()
    same(net(x), expected)
    same(model(x), expected)
    for layer, own in one.layers().items():
        peer = model.base_model.model.get_submodule(layer).base_layer
        same(own.weight, peer.weight)
        same(own.bias, peer.bias)


def test_the_defaults_of_peft_differ_in_d_and_e_alone():
    options = drawn(8)
    _, model = adapt(options, peft.GloraConfig())
    ours = sl.glora(scale_bias="constant", add_bias="constant")
    assert sl.Plan(ours, options.widths).num_parameters == trained(model)
    outputs = sum(rows for rows, _ in options.shapes)
    vectors = sl.Plan(sl.glora(), options.widths).num_parameters
    assert vectors - trained(model) == 2 * (outputs - len(options.shapes))


def test_peft_gives_layers_without_a_bias_none():
    """The method's authors add E and W0 C there too, as we do."""
    options = drawn(RANK, layer="no-bias")
    net, model = adapt(options, config("lora", "lora", "vector"))
    weights_only = sl.glora(RANK, weight_to_bias="none", scale_bias="none", add_bias="none")
    adapter = slt.attach(net, weights_only, options.keys)
    take(adapter, model)
    x = draw(3, 8)
    same(net(x), model(x))
    assert adapter.num_parameters == trained(model)


def test_peft_cannot_unmerge_what_is_scaled_away():
    """It divides by 1 + A: at A = -1 nothing of the weight comes back. Ours keeps its bits."""
    options = drawn(RANK)
    net, model = adapt(options, config("vector", "none", "vector"))
    adapter = slt.attach(net, design("vector", "none", "vector"), options.keys)
    before = {name: layer.weight.detach().clone() for name, layer in adapter.layers().items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "glora_A" in name:
                parameter.fill_(-1.0)
    take(adapter, model)
    model.merge_adapter()
    adapter.merge()
    model.unmerge_adapter()
    adapter.unmerge()
    for name, layer in adapter.layers().items():
        peer = model.base_model.model.get_submodule(name).base_layer
        assert not peer.weight.isfinite().any(), "PEFT unmerges GLoRA in another way now"
        assert torch.equal(layer.weight, before[name])


ALPHA = 5.0
BARE = {"weight_to_bias": "none", "scale_bias": "none", "add_bias": "none"}


def lycoris_module(rank, seed, bias=True):
    layer = linear(6, 8, seed, bias)
    base = copy.deepcopy(layer)
    module = GLoRAModule("peer", layer, 1.0, rank, ALPHA)
    module.apply_to()
    module.double()
    fill(module.parameters(), seed + 3)
    return base, layer, module


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_glora_of_lycoris_multiplies_matrices(rank, seed, bias):
    base, layer, module = lycoris_module(rank, seed, bias)
    a1, a2, b1, b2 = (getattr(module, name).weight.detach() for name in ("a1", "a2", "b1", "b2"))
    blocks = {"right_weight": (a1, a2.T), "add_weight": (b1, b2.T)}
    adapter = attach_with(base, sl.glora(rank, product="matrix", **BARE), blocks)
    adapter.scale = ALPHA / rank
    x = draw(3, 8, seed=seed)
    same(base(x), layer(x).detach())
    start = base.weight.detach().clone()
    adapter.merge()
    same(base.weight - start, module.make_weight().detach())
    same(base.weight, module.get_merged_weight()[0].detach())
    numbers = [module.a1, module.a2, module.b1, module.b2]
    assert adapter.num_parameters == sum(n.weight.numel() for n in numbers)


def test_the_two_products_of_the_same_numbers_are_different_updates():
    """For A = 1 1ᵀ the one is W0 itself, the other the sums of its rows."""
    ones = (torch.ones(8, 1).double(), torch.ones(8, 1).double())
    merged = {}
    for product, operation in (("hadamard", "scale_weight"), ("matrix", "right_weight")):
        layer = linear(8, 8)
        start = layer.weight.detach().clone()
        only = sl.glora(1, product=product, add_weight="none", **BARE)
        attach_with(layer, only, {operation: ones}).merge()
        merged[product] = layer.weight - start
    same(merged["hadamard"], start)
    same(merged["matrix"], start.sum(1, keepdim=True).expand(8, 8))


def test_the_bypass_of_lycoris_adds_the_bias_to_what_should_be_the_update_alone():
    """``bypass_forward_diff`` says that it returns ``W0 A x + B x``."""
    base, _, module = lycoris_module(2, 0)
    x = draw(3, 8)
    update = x @ module.make_weight().detach().T
    message = "LyCORIS has changed GLoRA's bypass; see whether it is the update alone now"
    found = module.bypass_forward_diff(x).detach()
    assert torch.allclose(found, update + base.bias.detach()), message
    assert torch.allclose(module.bypass_forward(x).detach(), base(x).detach() + update), message


@pytest.mark.parametrize("layer", ["bias", "no-bias", "conv1d"])
@pytest.mark.parametrize("feedforward", [[], ["b"], ["a", "b", "c"]], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_ia3_of_peft(layer, feedforward, seed):
    options = drawn(seed=seed, layer=layer)
    fields = {"target_modules": options.keys, "feedforward_modules": feedforward}
    config = peft.IA3Config(**fields, fan_in_fan_out=layer == "conv1d")
    net, model = adapt(options, config)
    adapter = slt.attach(net, sl.ia3(inputs=feedforward), options.keys)
    for name in adapter.layers():
        scales = model.base_model.model.get_submodule(name).ia3_l["default"].detach()
        put(adapter, "scale_weight", name, scales.reshape(-1) - 1)
    assert adapter.num_parameters == trained(model)
    x = draw(3, 8, seed=seed)
    expected = model(x).detach()
    same(net(x), expected)
    assert not torch.allclose(expected, make_net(options)(x))
    model.merge_adapter()
    adapter.merge()
    same(net(x), expected)
    for name, own in adapter.layers().items():
        peer = model.base_model.model.get_submodule(name).base_layer
        same(own.weight, peer.weight)
        assert (own.bias is None) == (peer.bias is None)
        if own.bias is not None:
            same(own.bias, peer.bias)
