"""Methods that GLoRA contains, each against its own formula, and at how many parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import superlora as sl
import superlora.torch as slt
from superlora import maps
from tests.reductions.glora_cases import SHAPES, attach_with, draw, linear, same
from tests.torch.helpers import seeded

BARE = {"weight_to_bias": "none", "scale_bias": "none", "add_bias": "none"}
RANK = 2
every_shape = pytest.mark.parametrize(("rows", "columns"), SHAPES)
both = pytest.mark.parametrize("bias", [True, False])


def merged_too(layer, adapter, x, expected):
    same(layer(x), expected)
    adapter.merge()
    same(layer(x), expected)


@every_shape
@both
def test_ssf_after_a_linear_layer(rows, columns, bias):
    layer, x = linear(rows, columns, bias=bias), draw(3, columns)
    gamma, beta = draw(rows, seed=2), draw(rows, seed=3)
    expected = gamma * layer(x).detach() + beta
    blocks = {"scale_weight": gamma - 1, "add_bias": beta}
    adapter = attach_with(layer, sl.ssf(), blocks)
    merged_too(layer, adapter, x, expected)
    assert adapter.num_parameters == gamma.numel() + beta.numel()


@every_shape
@both
def test_ssf_as_options_of_glora(rows, columns, bias):
    """Exact; weight and bias have a vector each, so that the parameters are half as many more."""
    layer, x = linear(rows, columns, bias=bias), draw(3, columns)
    gamma, beta = draw(rows, seed=2), draw(rows, seed=3)
    expected = gamma * layer(x).detach() + beta
    design = sl.glora(scale_weight="vector", add_weight="none", weight_to_bias="none")
    blocks = {"scale_weight": gamma - 1, "add_bias": beta}
    adapter = attach_with(layer, design, blocks | ({"scale_bias": gamma - 1} if bias else {}))
    merged_too(layer, adapter, x, expected)
    assert adapter.num_parameters == (3 if bias else 2) * rows


@every_shape
@pytest.mark.parametrize("thin", [True, False])
def test_ssf_after_layer_norm_is_the_next_layers_glora(rows, columns, thin):
    """A is 1 (γ - 1)ᵀ, C is β; with A as a repeated vector at the same number of parameters."""
    layer, x = linear(rows, columns), draw(3, columns)
    norm = nn.LayerNorm(columns).double()
    gamma, beta = draw(columns, seed=2), draw(columns, seed=3)
    expected = layer(gamma * norm(x) + beta).detach()
    ones = torch.ones(rows, 1).double()
    if thin:
        design = sl.glora(
            1, add_weight="none", weight_to_bias="vector", scale_bias="none", add_bias="none"
        )
        blocks = {"scale_weight": (ones, (gamma - 1)[:, None]), "weight_to_bias": beta}
        count = (rows + columns) + columns
    else:
        repeated = sl.dense(map=maps.Broadcast(along="outputs"))
        design = {"scale_weight": repeated, "weight_to_bias": sl.dense()}
        blocks = {"scale_weight": gamma - 1, "weight_to_bias": beta}
        count = gamma.numel() + beta.numel()
    adapter = attach_with(layer, design, blocks)
    merged_too(nn.Sequential(norm, layer), adapter, x, expected)
    assert adapter.num_parameters == count


@every_shape
@both
def test_repadapter_is_a_matrix_product_and_a_vector(rows, columns, bias):
    layer, x = linear(rows, columns, bias=bias), draw(3, columns)
    up, down = draw(columns, RANK, seed=2), draw(RANK, columns, seed=3)
    c, d = draw(RANK, seed=4), draw(columns, seed=5)
    adapted = x + (x @ down.T + c) @ up.T + d
    expected = layer(adapted).detach()
    blocks = {"right_weight": (up, down.T), "weight_to_bias": up @ c + d}
    adapter = attach_with(layer, sl.repadapter(RANK), blocks)
    merged_too(layer, adapter, x, expected)
    own = up.numel() + down.numel() + c.numel() + d.numel()
    assert adapter.num_parameters == own - RANK  # U c + d is one vector


@every_shape
def test_repadapter_as_an_added_update(rows, columns):
    """As a function it is (W0 U) V too, whose first factor is another number of parameters."""
    layer, x = linear(rows, columns), draw(3, columns)
    up, down, shift = draw(columns, RANK, seed=2), draw(RANK, columns, seed=3), draw(columns)
    expected = layer(x + x @ down.T @ up.T + shift).detach()
    start = layer.weight.detach().clone()
    blocks = {"add_weight": (start @ up, down.T), "weight_to_bias": shift}
    design = {"add_weight": sl.lora(RANK), "weight_to_bias": sl.dense()}
    adapter = attach_with(layer, design, blocks)
    merged_too(layer, adapter, x, expected)
    assert adapter.num_parameters == RANK * (rows + columns) + columns


@every_shape
@both
def test_bitfit_is_a_bias_that_is_trained(rows, columns, bias):
    layer, x = linear(rows, columns, bias=bias), draw(3, columns)
    own = linear(rows, columns, bias=bias)
    if not bias:
        own.bias = nn.Parameter(torch.zeros(rows).double())
    own.weight.requires_grad_(False)
    moved = draw(rows, seed=2)
    with torch.no_grad():
        own.bias += moved
    adapter = attach_with(layer, sl.bitfit(), {"add_bias": moved})
    for whole in (own, layer):
        whole(x).square().sum().backward()
    (factor,) = adapter.parameters()
    same(factor.grad, own.bias.grad)
    merged_too(layer, adapter, x, own(x))
    assert adapter.num_parameters == own.bias.numel()


def test_bitfit_leaves_out_the_biases_of_other_layers():
    """Of a ViT-B it trains 82,944 of 102,912 biases: LayerNorm's and the embedding's are not."""
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    biases = sum(p.numel() for name, p in model.named_parameters() if name.endswith("bias"))
    adapter = slt.attach(model, sl.bitfit())
    assert (adapter.num_parameters, biases) == (9, 15)


@every_shape
@pytest.mark.parametrize("alpha", [2.0, 5.0])
def test_lora_is_glora_with_b_alone(rows, columns, alpha):
    one, other, x = linear(rows, columns), linear(rows, columns), draw(3, columns)
    up, down = draw(rows, RANK, seed=2), draw(columns, RANK, seed=3)
    design = sl.glora(RANK, scale_weight="none", **BARE)
    adapter = attach_with(one, design, {"add_weight": (up, down)})
    adapter.scale = alpha / RANK  # GLoRA has none of its own
    lora = attach_with(other, sl.lora(RANK, alpha=alpha), {"add_weight": (up, down)})
    same(one(x), other(x))
    merged_too(one, adapter, x, x @ (other.weight + alpha / RANK * up @ down.T).T + other.bias)
    assert adapter.num_parameters == lora.num_parameters


@every_shape
def test_full_tuning_is_glora_with_a_dense_b(rows, columns):
    layer, own, x = linear(rows, columns), linear(rows, columns, 4), draw(3, columns)
    blocks = {
        "add_weight": (own.weight - layer.weight).detach().reshape(-1),
        "add_bias": (own.bias - layer.bias).detach(),
    }
    adapter = attach_with(layer, {"add_weight": sl.dense(), "add_bias": sl.dense()}, blocks)
    merged_too(layer, adapter, x, own(x))
    assert adapter.num_parameters == own.weight.numel() + own.bias.numel()


@every_shape
@both
def test_prompts_that_are_added(rows, columns, bias):
    layer, x, prompt = linear(rows, columns, bias=bias), draw(3, columns), draw(columns, seed=2)
    expected = layer(x + prompt).detach()
    adapter = attach_with(layer, sl.prompt_add(), {"weight_to_bias": prompt})
    merged_too(layer, adapter, x, expected)
    assert adapter.num_parameters == prompt.numel()
    other = linear(rows, columns, bias=bias)
    thin = sl.glora(
        RANK, scale_weight="none", add_weight="none", scale_bias="none", add_bias="none"
    )
    factors = (draw(columns, RANK, seed=3), draw(1, RANK, seed=4))
    adapter = attach_with(other, thin, {"weight_to_bias": factors})
    expected = linear(rows, columns, bias=bias)(x + (factors[0] @ factors[1].T)[:, 0]).detach()
    merged_too(other, adapter, x, expected)
    assert adapter.num_parameters == RANK * (columns + 1)  # of a vector of so many columns


class Stack(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        with seeded(0):
            self.layers = nn.ModuleList(
                nn.ModuleDict({"q": nn.Linear(8, 6), "v": nn.Linear(8, 6)}) for _ in range(depth)
            ).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for block in self.layers for layer in block.values()], -1)


@pytest.mark.parametrize("preset", [sl.fact_tt, sl.fact_tk, sl.lotr])
def test_fact_is_glora_whose_b_is_one_group(preset):
    """Layer by layer B holds FacT's updates too, at more parameters and with nothing tied."""
    one, other, each = Stack(), Stack(), Stack()
    x = draw(3, 8)
    plain = slt.attach(one, preset(RANK), ["q", "v"])
    mapped = slt.attach(other, {"add_weight": preset(RANK)}, ["q", "v"])
    assert mapped.num_parameters == plain.num_parameters
    assert mapped.plan.factor_shapes == plain.plan.factor_shapes
    for index, (name, factor) in enumerate(plain.factors().items()):
        for adapter in (plain, mapped):
            with torch.no_grad():
                adapter.factors()[name].copy_(draw(*factor.shape, seed=index))
    y = one(x)
    assert torch.equal(other(x), y)
    loose = slt.attach(each, sl.glora(RANK, scale_weight="none", **BARE), ["q", "v"])
    for name in loose.layers():
        left, singular, right = torch.linalg.svd(plain.delta(name).detach())
        assert (singular[RANK:] < 1e-12 * singular[0]).all()
        blocks = loose.plan.blocks_of(f"add_weight.{name}")
        with torch.no_grad():
            loose.factors()[blocks[0]].copy_(left[:, :RANK] * singular[:RANK])
            loose.factors()[blocks[1]].copy_(right[:RANK].T)
    same(each(x), y, 1e-11)
    assert loose.num_parameters == 6 * RANK * (8 + 6) > plain.num_parameters


@every_shape
def test_with_e_the_vectors_c_and_d_express_nothing_more(rows, columns):
    layer, other, x = linear(rows, columns), linear(rows, columns), draw(3, columns)
    c, d, e = draw(columns, seed=2), draw(rows, seed=3), draw(rows, seed=4)
    design = {"weight_to_bias": sl.dense(), "scale_bias": sl.dense(), "add_bias": sl.dense()}
    attach_with(layer, design, {"weight_to_bias": c, "scale_bias": d, "add_bias": e})
    alone = (e + other.weight @ c + d * other.bias).detach()
    attach_with(other, sl.bitfit(), {"add_bias": alone})
    same(layer(x), other(x))


# What maths says of parameters, for a layer of o outputs and i inputs and rank r: our design, the
# method's own number, and how many more we train.
COUNTS = {
    "LoRA": (
        sl.glora(RANK, scale_weight="none", **BARE),
        lambda o, i: RANK * (o + i),
        lambda o, i: 0,
    ),
    "BitFit": (sl.bitfit(), lambda o, i: o, lambda o, i: 0),
    "SSF": (sl.ssf(), lambda o, i: 2 * o, lambda o, i: 0),
    "SSF by GLoRA's options": (
        sl.glora(scale_weight="vector", add_weight="none", weight_to_bias="none"),
        lambda o, i: 2 * o,
        lambda o, i: o,
    ),
    "IA3": (sl.ia3(), lambda o, i: o, lambda o, i: 0),
    "IA3 by GLoRA's options": (
        sl.glora(scale_weight="vector", add_weight="none", weight_to_bias="none", add_bias="none"),
        lambda o, i: o,
        lambda o, i: o,
    ),
    "RepAdapter": (
        sl.repadapter(RANK),
        lambda o, i: 2 * RANK * i + RANK + i,
        lambda o, i: -RANK,
    ),
    "added prompts": (sl.prompt_add(), lambda o, i: i, lambda o, i: 0),
    "added prompts by a rank": (
        sl.glora(RANK, scale_weight="none", add_weight="none", scale_bias="none", add_bias="none"),
        lambda o, i: i,
        lambda o, i: RANK * (i + 1) - i,
    ),
}


@pytest.mark.parametrize("key", COUNTS)
def test_parameters_beside_those_of_the_method(key):
    design, own, more = COUNTS[key]
    for rows, columns in SHAPES:
        plan = sl.Plan(design, {"layer": (rows, columns)})
        assert plan.num_parameters == own(rows, columns) + more(rows, columns)
