"""What the peers do besides their formula; where one of these fails, the docs must change."""

from __future__ import annotations

import copy
import dataclasses

import numpy
import peft
import pytest
import torch
from lycoris import LycorisNetwork
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from peft.optimizers import create_lorafa_optimizer
from torch import nn

import superlora as sl
import superlora.torch as slt
from superlora import maps
from tests.reductions.cases import Options, fill, make_net
from tests.reductions.peft_map_rows import fourier_config, unilora_config
from tests.reductions.peft_rows import UNEQUAL, adapt
from tests.reductions.rows import ROWS

RANK, ALPHA = 2, 5.0
UPDATE = "LyCORIS has changed which of its paths scale; say so in the docs, where they say this: "
every_scaled = pytest.mark.parametrize("kind", [LoConModule, LohaModule, LokrModule])


def lycoris_module(kind, **fields):
    layer = nn.Linear(32, 18).double()
    module = kind("peer", layer, 1.0, RANK, ALPHA, **fields)
    module.apply_to()
    module.double()
    fill(module.parameters(), 3)
    return layer, module


def trained(layer, module):
    """Return the update that the training forward applies."""
    eye = torch.eye(layer.in_features).double()
    return (layer(eye) - module.org_forward(eye)).T.detach()


@every_scaled
def test_lycoris_scales_what_it_merges_twice_but_for_locon(kind):
    layer, module = lycoris_module(kind)
    update = trained(layer, module)
    twice = update if kind is LoConModule else update * ALPHA / RANK
    merged = module.get_merged_weight()[0].detach() - layer.weight.detach()
    message = UPDATE + "get_diff_weight and get_merged_weight of LoHa and LoKr scale twice"
    assert torch.allclose(module.get_diff_weight()[0].detach(), twice), message
    assert torch.allclose(merged, twice), message


@every_scaled
def test_lycoris_bypass_is_its_training_forward(kind):
    layer, module = lycoris_module(kind)
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0)).double()
    bypassed = module.bypass_forward_diff(x).detach()
    message = UPDATE + "the bypass scales once, as training does (LyCORIS 3 did not scale LoKr's)"
    assert torch.allclose(bypassed, x @ trained(layer, module).T), message


@pytest.mark.parametrize("fields", [{"full_matrix": True}, {"lora_dim": 99}], ids=str)
def test_lycoris_ignores_alpha_where_both_splits_are_dense_and_peft_does_not(fields):
    rank = fields.pop("lora_dim", RANK)
    module = LokrModule("peer", nn.Linear(32, 18), 1.0, rank, ALPHA, **fields)
    assert module.use_w1
    assert module.use_w2
    assert module.scale == 1
    drawn = Options(((18, 32),), 99, ALPHA)
    _, model = adapt(drawn, peft.LoKrConfig(r=99, alpha=ALPHA))
    (layer,) = model.base_model.model.layers.values()
    assert layer.scaling["default"] == sl.lokr(99, alpha=ALPHA).scaling == ALPHA / 99


def test_lycoris_class_is_as_it_was():
    before = {key: copy.copy(value) for key, value in vars(LycorisNetwork).items() if key.isupper()}
    row = ROWS["lokr-lycoris"]
    row.build(row.example)
    assert before == {k: v for k, v in vars(LycorisNetwork).items() if k.isupper()}


def test_lycoris_full_trains_the_bias_too():
    row = ROWS["dense-lycoris-full"]
    case = row.build(dataclasses.replace(row.example, layer="bias"))
    parameters = sum(p.numel() for p in case.peer.parameters)
    biases = sum(rows for rows, _ in row.example.shapes)
    assert parameters == case.ours().plan.num_parameters + biases


def test_a_lora_beyond_the_smaller_width_is_dense_and_not_in_peft():
    drawn = Options(((3, 8),), 5)
    _, model = adapt(drawn, peft.LoraConfig(r=5, lora_alpha=ALPHA))
    (layer,) = model.base_model.model.layers.values()
    plan = sl.Plan(sl.lora(5, alpha=ALPHA), drawn.widths)
    assert plan.factor_shapes == {"0.0.core": (3, 8)}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 5 * (3 + 8)
    factors = layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach()
    delta = plan.delta({"0.0.core": factors.numpy()}, "layers.a")
    assert numpy.allclose(delta, layer.get_delta_weight("default").detach())


def test_lora_fa_trains_b_alone():
    drawn = Options(UNEQUAL, 3, ALPHA)
    net, model = adapt(drawn, peft.LoraConfig(r=3, lora_alpha=ALPHA))
    optimizer = create_lorafa_optimizer(model, 3, ALPHA, lr=0.1)
    adapter = slt.attach(net, sl.lora_fa(3, alpha=ALPHA), drawn.keys)
    own = torch.optim.SGD(adapter.parameters(), lr=0.1)
    sides = [(model, optimizer, dict(model.named_parameters())), (net, own, adapter.factors())]
    for whole, stepper, tensors in sides:
        before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        whole(torch.ones(2, 12).double()).square().sum().backward()
        stepper.step()
        moved = {name for name, old in before.items() if not torch.equal(old, tensors[name])}
        assert moved == {name for name in before if "lora_B" in name or name.endswith("factor0")}


@pytest.mark.parametrize("layer", ["bias", "conv1d"])
def test_fourierft_of_peft_computes_in_single_precision_and_forms_outputs_by_inputs(layer):
    drawn = Options(UNEQUAL, layer=layer, extra=7, seed=3)
    _, model = adapt(drawn, fourier_config(drawn))
    for name, shape in drawn.widths.items():
        peer = model.base_model.model.get_submodule(name)
        delta = peer.get_delta_weight("default")
        assert delta.dtype == torch.float64
        assert torch.equal(delta, delta.float().double())
        assert delta.shape == shape  # of a Conv1D too, whose weight is (inputs, outputs)


@pytest.mark.parametrize("size", [1, 5, 20])
def test_unilora_of_peft_deals_numbers_out_evenly_as_one_hot_does(size):
    drawn = Options(UNEQUAL, 3, extra=size)
    _, model = adapt(drawn, unilora_config(drawn))
    theirs: list[int] = []
    for name in drawn.widths:
        layer = model.base_model.model.get_submodule(name)
        for indices in (layer.unilora_indices_A, layer.unilora_indices_B):
            theirs += indices["default"].ravel().tolist()
    total = 3 * sum(map(sum, drawn.shapes))
    fixed = maps.OneHot(seed=3, tiled=False, signed=False, normalize=None)
    ours = fixed.adjoint(numpy.ones(total), size)
    for counts in (numpy.bincount(theirs, minlength=size), ours):
        assert counts.sum() == len(theirs) == total
        assert set(counts) <= {total // size, -(-total // size)}


@pytest.mark.parametrize("rank", [1, 3])
def test_unilora_of_peft_has_no_scale(rank):
    drawn = Options(UNEQUAL, rank, extra=9)
    _, model = adapt(drawn, unilora_config(drawn))
    layer = model.base_model.model.get_submodule("layers.a")
    theta = layer.unilora_theta_d["default"].detach()
    factors = [
        theta[indices["default"]] * scales["default"]
        for indices, scales in (
            (layer.unilora_indices_B, layer.unilora_scales_B),
            (layer.unilora_indices_A, layer.unilora_scales_A),
        )
    ]
    assert torch.allclose(layer.get_delta_weight("default"), factors[0] @ factors[1])
    assert sl.unilora(9, rank).scaling == 1


@pytest.mark.skipif(not hasattr(peft, "TinyLoraConfig"), reason="this PEFT has no TinyLoRA")
@pytest.mark.parametrize("layer", ["bias", "conv1d"])
def test_tinylora_singular_vectors_are_pefts_up_to_signs(layer):
    drawn = Options(UNEQUAL, 3, layer=layer)
    config = peft.TinyLoraConfig(r=3, u=4, fan_in_fan_out=layer == "conv1d")
    _, model = adapt(drawn, config)
    adapter = slt.attach(make_net(drawn), sl.tinylora(3, 4), drawn.keys)
    own = adapter.factors()
    for name in drawn.widths:
        theirs = model.base_model.model.get_submodule(name)
        left, right = theirs.tinylora_B["default"], theirs.tinylora_A["default"].T
        *_, own_left, own_right = (own[block] for block in adapter.plan.blocks_of(name))
        signs = torch.sign((own_left * left).sum(0))
        # PEFT decomposes in float32, which tells near singular values apart less well.
        assert torch.allclose(own_left * signs, left, atol=1e-4)
        assert torch.allclose(own_right * signs, right, atol=1e-4)
