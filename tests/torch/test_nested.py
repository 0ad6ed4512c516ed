"""Nested inputs, rows of unequal lengths: each row's output and gradients are its own."""

import pytest
import torch
from torch import nn

import superlora as sl
import superlora.torch as slt
from superlora.errors import AdapterError
from superlora.torch.row_wise import rows
from tests.torch.helpers import SPECS, WIDTH, assert_near, fill, make_layer, seeded

LENGTHS = (3, 1, 5)


def make_rows():
    with seeded(1):
        return [torch.randn(n, WIDTH, dtype=torch.float64, requires_grad=True) for n in LENGTHS]


def nested(rows, layout=torch.jagged):
    return torch.nested.as_nested_tensor(rows, layout=layout)


class One(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.q = layer.double()

    def forward(self, x):
        return self.q(x)


def outcome(model, adapter, call):
    """Return the output of each row, and all gradients."""
    inputs = make_rows()
    found = call(inputs)
    sum(own.square().sum() for own in found).backward()
    gradients = [row.grad for row in inputs] + [p.grad for p in adapter.parameters()]
    model.zero_grad()
    return [*found, *(own for own in gradients if own is not None)]


def assert_same(model, adapter, layout=torch.jagged):
    one = outcome(model, adapter, lambda rows: [model(row) for row in rows])
    all_rows = outcome(model, adapter, lambda rows: model(nested(rows, layout)).unbind())
    assert len(one) == len(all_rows)
    for found, expected in zip(all_rows, one, strict=True):
        assert_near(found, expected)


# Factored, formed, one whose factors layers share, mapped, and all other operations.
KEYS = ["lora", "dense", "lokr", "fourierft", "one-group"]


@pytest.mark.parametrize("layer", ["bias", "no-bias"])
@pytest.mark.parametrize("key", [*KEYS, "glora"])
def test_rows_of_unequal_lengths(key, layer):
    with seeded(0):
        model = One(make_layer(layer, WIDTH, 8))
    spec = sl.glora(2) if key == "glora" else SPECS[key]
    adapter = fill(slt.attach(model, spec, ["q"]))
    assert_same(model, adapter)
    y = model(nested(make_rows()))
    assert y.layout is torch.jagged
    assert torch.equal(y.offsets(), nested(make_rows()).offsets())
    adapter.merge()
    assert_near(model(nested(make_rows())).values(), y.values())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("key", ["lora", "dense"])
def test_strided_rows(key):
    with seeded(0):
        model = One(nn.Linear(WIDTH, 8))
    assert_same(model, fill(slt.attach(model, SPECS[key], ["q"])), torch.strided)


def test_a_norm_takes_them():
    model = One(nn.LayerNorm(WIDTH))
    adapter = fill(slt.attach(model, sl.dense(scale=0.7), ["q"]))
    assert_same(model, adapter)


@pytest.mark.parametrize("key", ["lora", "dense"])
def test_an_embedding_takes_them(key):
    with seeded(0):
        model = One(nn.Embedding(9, WIDTH))
    fill(slt.attach(model, SPECS[key], ["q"]))
    words = [torch.arange(n) % 9 for n in LENGTHS]
    for found, own in zip(model(nested(words)).unbind(), words, strict=True):
        assert_near(found, model(own))


def test_two_adapters_and_one_that_is_disabled():
    with seeded(0):
        model = One(nn.Linear(WIDTH, 8))
    first = fill(slt.attach(model, SPECS["lora"], ["q"]))
    second = fill(slt.attach(model, SPECS["dense"], ["q"], name="second"), seed=3)
    assert_same(model, first)
    with first.disabled():
        assert_same(model, second)
        with second.disabled():
            inputs = make_rows()
            y = model(nested(inputs)).unbind()
            for one, own in zip(y, inputs, strict=True):
                assert_near(one, nn.functional.linear(own, model.q.weight, model.q.bias))


def test_rows_of_a_batch_are_refused():
    with seeded(0):
        model = One(nn.Linear(WIDTH, 8))
    fill(slt.attach(model, SPECS["lora"], ["q"]))
    with rows(model, ["superlora"] * 3), pytest.raises(AdapterError, match="plain tensors"):
        model(nested(make_rows()))


def test_a_whole_model():
    """Of layers that take them: a transformer's feed-forward part."""

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)
            self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

        def forward(self, x):
            return x + self.down(nn.functional.gelu(self.up(self.norm(x))))

    with seeded(0):
        model = Part().double()
    adapter = fill(slt.attach(model, sl.Spec(rank=2, groups=1, fold="balanced", scale=0.3)))
    assert_same(model, adapter)
