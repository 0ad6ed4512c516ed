"""Quantised bases: the update goes around the layer's own forward; nothing is added to codes."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import superlora as sl
import superlora.torch as slt
from tests.torch.helpers import fill, seeded


def make_base():
    with seeded(0):
        return nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 32))


class Cast(nn.Linear):
    """As libraries store weights in eight bits and cast them in the forward pass."""

    def forward(self, input):
        return nn.functional.linear(input, self.weight.to(input.dtype), self.bias)


def make_cast():
    model = make_base()
    for layer in (model[0], model[2]):
        layer.__class__ = Cast
        codes = layer.weight.data.to(torch.float8_e4m3fn)
        layer.weight = nn.Parameter(codes, requires_grad=False)
    return model


def make_torchao(config):
    pytest.importorskip("torchao")
    quantization = pytest.importorskip("torchao.quantization")
    model = make_base()
    quantization.quantize_(model, getattr(quantization, config)())
    return model


def make_bitsandbytes(bits):
    library = pytest.importorskip("bitsandbytes")
    model = make_base()
    for index in (0, 2):
        old = model[index]
        sizes = old.in_features, old.out_features
        if bits == 8:
            new = library.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
            codes = library.nn.Int8Params(
                old.weight.data, requires_grad=False, has_fp16_weights=False
            )
            new.weight, new.bias = codes, old.bias
        else:
            new = library.nn.Linear4bit(*sizes, quant_type="nf4", compute_dtype=torch.float32)
            new.load_state_dict(old.state_dict())
        model[index] = new
    return model.to("cpu")


class Packed(nn.Module):
    """A layer without a weight, as of a library that packs its codes under other names."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scale = layer.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (layer.weight / scale).round().to(torch.int8))
        self.register_buffer("scales", scale.detach())

    def forward(self, x):
        return x @ (self.qweight * self.scales).t()


def make_packed():
    base = make_base()
    return nn.Sequential(Packed(base[0]), base[1], Packed(base[2]))


MAKERS = {
    "float8": make_cast,
    "packed": make_packed,
    "torchao int8": lambda: make_torchao("Int8WeightOnlyConfig"),
    "torchao float8": lambda: make_torchao("Float8WeightOnlyConfig"),
    "torchao int8 activations": lambda: make_torchao("Int8DynamicActivationInt8WeightConfig"),
    "bitsandbytes 8": lambda: make_bitsandbytes(8),
    "bitsandbytes NF4": lambda: make_bitsandbytes(4),
}


@pytest.fixture(params=MAKERS.values(), ids=MAKERS)
def make(request):
    def quietly():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return request.param()

    return quietly


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spec", [sl.lora(2, scale=0.7), sl.lokr(2, scale=0.7), sl.loha(2)])
def test_update_is_added_around_the_layer(make, spec, tmp_path):
    model = make()
    x = torch.randn(3, 64)
    base = model(x)
    adapter = slt.attach(model, spec)
    assert adapter.dtype is torch.float32
    assert torch.equal(model(x), base)
    fill(adapter)
    deltas = {name: own.detach() for name, own in adapter.deltas().items()}
    y = model(x)
    with adapter.disabled():
        hidden = nn.functional.silu(model[0](x) + x @ deltas["0"].t())
        expected = model[2](hidden) + hidden @ deltas["2"].t()
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
    y.sum().backward()
    assert all(factor.grad is not None for factor in adapter.parameters())
    adapter.save(tmp_path / "a.safetensors")
    other = make()
    slt.load(other, tmp_path / "a.safetensors")
    torch.testing.assert_close(other(x), y, rtol=1e-4, atol=1e-4)
    with pytest.raises(sl.AdapterError, match=r"must not be quantised to be merged.*'0'"):
        adapter.merge()
    adapter.detach()
    assert torch.equal(model(x), base)


@pytest.mark.filterwarnings("ignore")
def test_what_reads_or_forms_the_weight_is_refused(make):
    model, x = make(), torch.randn(3, 64)
    base = model(x)
    for spec, message in (
        (sl.glora(2), "no other operation"),
        (sl.Spec(rank=2, groups=1, fold="balanced"), "applied factored"),
        (sl.lora_xs(2), "singular vectors"),
    ):
        with pytest.raises(ValueError, match=message):
            slt.attach(model, spec, ["0", "2"])
    with pytest.raises(ValueError, match="applied factored"):
        slt.attach(model, sl.lora(2), ["0"], apply="formed")
    assert not [module for module in model.modules() if "forward" in vars(module)]
    assert torch.equal(model(x), base)
