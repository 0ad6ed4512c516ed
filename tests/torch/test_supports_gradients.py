"""Gradients of merge operations: those of plain autograd through the merged matrices."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import superlora as sl
import superlora.torch as slt
from tests.torch.helpers import assert_near, fill, gradients, loss_of, make_input, seeded
from tests.torch.support_cases import (
    DESIGNS,
    attach_small,
    every_design,
    every_pair,
    make_model,
    plain_call,
    some_designs,
    vector,
)

F64 = {"dtype": torch.float64}
# Every operation alone, low rank and dense or repeated, and all of them.
CHECKED = [key for key in DESIGNS if not key.startswith(("ia3", "bitfit", "prompt", "rep"))]


def small(bias=True):
    with seeded(0):
        return nn.Linear(4, 6, bias=bias).double()


@pytest.mark.parametrize("key", CHECKED)
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(key, bias):
    """Of the factors, the inputs and the base itself, by differences."""
    if not bias and key.startswith("scale_bias"):
        pytest.skip("refused: there is nothing to scale")
    layer = small(bias)
    adapter = fill(slt.attach(layer, DESIGNS[key]))
    adapter.scale = -0.7
    with seeded(1):
        x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    layer.weight.requires_grad_()
    if bias:
        layer.bias.requires_grad_()
    factors = list(adapter.parameters())

    def call(x, *_):
        return layer(x)

    base = [layer.weight, layer.bias] if bias else [layer.weight]
    assert torch.autograd.gradcheck(call, (x, *factors, *base))


@every_pair
def test_gradients_are_those_of_plain_autograd(key, layer):
    model = make_model(layer, **F64)
    adapter = attach_small(model, key)
    x = make_input(**F64).requires_grad_()

    def step():
        loss = loss_of(model(x))
        return gradients(adapter, loss) | {"x": torch.autograd.grad(loss_of(model(x)), x)[0]}

    found, expected = step(), plain_call(model, [adapter], step)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert expected[name].any(), name
        assert_near(gradient, expected[name])


@every_pair
def test_the_base_stays_frozen(key, layer):
    model = make_model(layer)
    adapter = attach_small(model, key)
    loss_of(model(make_input())).backward()
    own = {id(factor) for factor in adapter.parameters()}
    for parameter in model.parameters():
        assert parameter.requires_grad == (id(parameter) in own)
        assert (parameter.grad is not None) == (id(parameter) in own)


@every_design
@pytest.mark.parametrize("way", ["auto", "formed"])
def test_a_base_that_is_trained_too(key, way):
    """What scales or multiplies the weight passes a gradient of its own to it."""
    model = make_model(**F64)
    adapter = attach_small(model, key, apply=way)
    base = []
    for module in adapter.layers().values():
        base += [module.weight.requires_grad_(), module.bias.requires_grad_()]
    x = make_input(**F64)

    def step():
        wanted = [*base, *adapter.parameters()]
        return torch.autograd.grad(loss_of(model(x)), wanted)

    for found, expected in zip(step(), plain_call(model, [adapter], step), strict=True):
        assert_near(found, expected)


@some_designs
def test_the_inputs_alone(key):
    model = make_model(**F64)
    adapter = attach_small(model, key)
    for factor in adapter.parameters():
        factor.requires_grad_(False)
    x = make_input(**F64).requires_grad_()

    def step():
        return torch.autograd.grad(loss_of(model(x)), x)[0]

    assert_near(step(), plain_call(model, [adapter], step))


@some_designs
def test_a_layer_that_is_used_twice(key):
    model = make_model(**F64)
    adapter = attach_small(model, key)
    x = make_input(**F64)

    def step():
        return gradients(adapter, loss_of(model(model.blocks[0](x))))

    found, expected = step(), plain_call(model, [adapter], step)
    for name, gradient in found.items():
        assert_near(gradient, expected[name])


@some_designs
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(key, reentrant):
    model = make_model(**F64)
    adapter = attach_small(model, key)
    x = make_input(**F64).requires_grad_()

    def called(call):
        y = call(x)
        return y, gradients(adapter, loss_of(y)) if not reentrant else backward_of(y)

    def backward_of(y):
        adapter.zero_grad()
        loss_of(y).backward()
        return {n: p.grad.clone() for n, p in adapter.named_parameters()}

    y, expected = called(model)
    again, found = called(lambda x: checkpoint(model, x, use_reentrant=reentrant))
    assert torch.equal(again, y)
    for name, gradient in found.items():
        assert_near(gradient, expected[name])


@every_design
def test_every_factor_learns_from_the_start(key):
    """Exactly one block of a product is zero at the start, so that after one step all move."""
    model = make_model(**F64)
    adapter = slt.attach(model, DESIGNS[key], ["q", "v", "o"])
    before = {name: factor.detach().clone() for name, factor in adapter.named_parameters()}
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model(make_input(**F64))).backward()
        optimizer.step()
    still = [n for n, factor in adapter.named_parameters() if torch.equal(factor, before[n])]
    assert still == []


def test_a_shared_vector_sums_what_weight_and_bias_say():
    layer = small()
    adapter = fill(slt.attach(layer, sl.ssf()))
    (name,) = {adapter.plan.blocks_of(f"{op}.")[0] for op in ("scale_weight", "scale_bias")}
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (found,) = torch.autograd.grad(layer(x).square().sum() / 2, adapter.factors()[name])
    y = layer(x)
    assert_near(found, (y * (x @ layer.weight.T + layer.bias)).sum(0))


def test_gradients_of_a_merged_layer_are_of_the_others_alone():
    """An adapter that scales W0 sees W0, also in the gradient, whatever is merged."""
    model, apart = make_model(**F64), make_model(**F64)
    design = {"scale_weight": sl.lora(2), "scale_bias": vector("all"), "left_weight": sl.lora(1)}
    both = [(m, attach_small(m, "glora", "below", 3)) for m in (model, apart)]
    one, other = (attach_small(m, design, "above", 4) for m in (model, apart))
    both[0][1].merge()
    x = make_input(**F64)
    expected = gradients(other, loss_of(apart(x)))
    for name, gradient in gradients(one, loss_of(model(x))).items():
        assert_near(gradient, expected[name])
