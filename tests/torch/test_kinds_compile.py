"""Weights of every kind under compilers, torch.export and torch.func."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import superlora.torch as slt
from tests.torch.helpers import fill
from tests.torch.test_kinds import CASES, build

# Recurrent layers and complex numbers are not the compiler's.
COMPILED = {name: case for name, case in CASES.items() if name not in ("LSTM", "complex")}


@pytest.mark.parametrize("case", COMPILED.values(), ids=COMPILED)
def test_compiled_as_eager(case):
    make, call, spec, targets = case
    model, output = build(make, call)
    adapter = slt.attach(model, spec, targets)
    fill(adapter)
    y = output()
    y.square().sum().backward()
    expected = {name: factor.grad.clone() for name, factor in adapter.named_parameters()}
    adapter.zero_grad()
    torch.compiler.reset()
    model.compile(backend="aot_eager", fullgraph=True)
    z = output()
    torch.testing.assert_close(z, y)
    z.square().sum().backward()
    for name, factor in adapter.named_parameters():
        torch.testing.assert_close(factor.grad, expected[name])
    assert not [m for m in model.modules() if "weight" in vars(m)]


@pytest.mark.parametrize("case", COMPILED.values(), ids=COMPILED)
def test_exported_as_eager(case):
    make, call, spec, targets = case
    model, output = build(make, call)
    fill(slt.attach(model, spec, targets))
    with torch.no_grad():
        y = output()
        x = tuple(
            each.to(next(model.parameters()).dtype) if each.is_floating_point() else each
            for each in call()
        )
        exported = torch.export.export(model, x).module()
        expected = model(*x)
        torch.testing.assert_close(exported(*x), expected)
    assert y.shape == output().shape


def test_vmap_and_functional_calls_go_through_a_convolution():
    model = nn.Sequential(nn.Conv2d(4, 6, 3)).double()
    adapter = fill(slt.attach(model, CASES["Conv2d"][2], ["0"]))
    x = torch.randn(3, 2, 4, 7, 7).double()
    found = torch.func.vmap(model)(x)
    torch.testing.assert_close(found, torch.stack([model(each) for each in x]))

    def loss(factors):
        return torch.func.functional_call(model, factors, (x[0],)).square().sum()

    factors = {n: p for n, p in model.named_parameters() if "superlora" in n}
    gradients = torch.func.grad(loss)(factors)
    model(x[0]).square().sum().backward()
    for name, factor in adapter.named_parameters():
        found = next(own for key, own in gradients.items() if key.endswith(name))
        torch.testing.assert_close(found, factor.grad)
