"""Gradients of every spec equal plain autograd through x @ (W + ΔW)ᵀ, and every factor learns."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import superlora as sl
import superlora.torch as slt
from tests.pairs import in_turn
from tests.torch.helpers import (
    LAYERS,
    SPECS,
    WIDTH,
    assert_near,
    attach_filled,
    every_layer,
    every_spec,
    fill,
    gradients,
    loss_of,
    make_input,
    make_layer,
    make_net,
    plain_forward,
    seeded,
    some_specs,
    targets_of,
)


def make_pair(key, layer="bias"):
    model = make_net(layer, dtype=torch.float64)
    adapter = attach_filled(model, key)
    return model, adapter, make_input(dtype=torch.float64)


def assert_gradients_equal(found, expected):
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-12 * largest, name


@in_turn("key", SPECS, "layer", LAYERS)
def test_gradients_equal_plain_autograd(key, layer):
    model, adapter, x = make_pair(key, layer)
    y = model(x)
    plain = plain_forward(model, adapter, lambda: model(x))
    assert_near(y, plain)
    expected = gradients(adapter, loss_of(plain))
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    assert_gradients_equal(gradients(adapter, loss_of(y)), expected)


@some_specs
@every_layer
def test_gradients_with_unfrozen_base_and_frozen_factor(key, layer):
    """The user may unfreeze the base, want the input's gradient, and freeze a factor."""
    model, adapter, x = make_pair(key, layer)
    model.blocks.requires_grad_(True)
    x.requires_grad_(True)
    frozen, *_ = adapter.parameters()
    if len(list(adapter.parameters())) > 1:
        frozen.requires_grad_(False)
    wanted = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    wanted["x"] = x
    expected = torch.autograd.grad(
        loss_of(plain_forward(model, adapter, lambda: model(x))), list(wanted.values())
    )
    found = torch.autograd.grad(loss_of(model(x)), list(wanted.values()))
    assert_gradients_equal(
        dict(zip(wanted, found, strict=True)), dict(zip(wanted, expected, strict=True))
    )


@pytest.mark.parametrize("key", ["dense", "krona", "lorta", "cut", "lora", "aligned-3"])
@every_layer
def test_gradcheck(key, layer):
    """Against finite differences: input, weight, bias and factors at once."""
    with seeded(0):
        model = nn.Module()
        model.q, model.v = (make_layer(layer, 4, outputs).double() for outputs in (4, 6))
        x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    fill(slt.attach(model, SPECS[key]))
    model.requires_grad_(True)
    leaves = [x, *model.parameters()]
    assert torch.autograd.gradcheck(lambda x, *_: model.q(x).sum(1) + model.v(x).sum(1), leaves)


@every_spec
def test_every_factor_learns_within_two_steps(key):
    model = make_net(dtype=torch.float64)
    adapter = slt.attach(model, SPECS[key], targets_of(key))
    x = make_input(dtype=torch.float64)
    seen = {name: False for name, _ in adapter.named_parameters()}
    optimizer = torch.optim.SGD(adapter.parameters(), 0.02)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(model(x))
        loss.backward()
        losses.append(loss.item())
        for name, factor in adapter.named_parameters():
            assert torch.isfinite(factor.grad).all()
            seen[name] |= bool(factor.grad.abs().max() > 0)
        if len(losses) < 3:
            optimizer.step()
    assert all(seen.values()), seen
    assert losses[1] < losses[0]
    assert all(tensor.grad is None for tensor in model.head.parameters())


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@every_spec
def test_gradient_checkpointing(key, reentrant):
    model, adapter, x = make_pair(key)
    x.requires_grad_(True)
    expected = gradients(adapter, loss_of(model(x)))
    y = x + model.shift
    for block in model.blocks:
        y = checkpoint(block, y, use_reentrant=reentrant)
    loss_of(model.head(y)).backward()
    found = {name: factor.grad for name, factor in adapter.named_parameters()}
    assert_gradients_equal(found, expected)


@every_spec
def test_layer_used_twice_in_one_forward(key):
    model, adapter, x = make_pair(key)

    def twice():
        block = model.blocks[0]
        return block(block(x)) + block.q(x).sum()

    found = gradients(adapter, loss_of(twice()))
    expected = gradients(adapter, loss_of(plain_forward(model, adapter, twice)))
    assert_gradients_equal(found, expected)


@every_spec
def test_backward_twice_accumulates(key):
    model, adapter, x = make_pair(key)
    loss = loss_of(model(x))
    loss.backward(retain_graph=True)
    once = {name: factor.grad.clone() for name, factor in adapter.named_parameters()}
    loss.backward()
    twice = {name: factor.grad / 2 for name, factor in adapter.named_parameters()}
    assert_gradients_equal(twice, once)


@every_spec
def test_autocast(key):
    model = make_net()
    adapter = attach_filled(model, key)
    x = make_input()
    expected = model(x)
    exact = gradients(adapter, loss_of(expected))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        loss = loss_of(y.float())
    assert y.dtype == torch.bfloat16
    assert (y - expected).norm() < 0.1 * expected.norm()
    for name, gradient in gradients(adapter, loss).items():
        assert gradient.dtype == torch.float32
        assert (gradient - exact[name]).norm() < 0.35 * exact[name].norm(), name


@some_specs
def test_backward_within_autocast(key):
    model = make_net()
    adapter = attach_filled(model, key)
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model(make_input()).float()).backward()
    assert all(torch.isfinite(factor.grad).all() for factor in adapter.parameters())


@every_spec
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_gives_the_same_output(key, mode):
    model, adapter, x = make_pair(key)
    for way in ("factored", "formed"):  # which of them is taken depends on gradients
        try:
            adapter.applied = way
        except ValueError:
            continue
        expected = model(x)
        with mode():
            y = model(x)
        assert not y.requires_grad
        assert torch.equal(y, expected)


@pytest.mark.parametrize("key", ["lora", "dense", "lorta", "cut", "aligned-3", "splits-2"])
def test_no_formed_weight_is_kept_for_backward(key):
    """Saved are activations, factors and the base weights themselves, nothing of ΔW's size."""
    model = nn.Module()
    model.q, model.v = nn.Linear(40, 48), nn.Linear(40, 48)
    adapter = fill(slt.attach(model, SPECS[key]))
    if key == "dense":
        adapter.scale = 1.0  # its one block is of ΔW's size, and so is a scaled copy
    own = {tensor.data_ptr() for tensor in model.parameters()}
    kept = []
    x = torch.randn(2, 40, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda saved: kept.append(saved) or saved, lambda saved: saved
    ):
        y = model.q(x) + model.v(x)
    assert kept
    large = [t.shape for t in kept if t.data_ptr() not in own and t.numel() >= 40 * 48]
    assert large == []
    assert y.shape == (2, 48)
    assert adapter.active


@pytest.mark.parametrize("key", ["lora", "dense", "cut"])
def test_scale_set_between_forward_and_backward_changes_nothing(key):
    """The gradient is that of the forward pass which was computed."""
    model, adapter, x = make_pair(key)
    expected = gradients(adapter, loss_of(model(x)))
    loss = loss_of(model(x))
    adapter.scale = 10 * adapter.scale
    assert_gradients_equal(gradients(adapter, loss), expected)


@some_specs
def test_disabling_between_forward_and_backward_changes_nothing(key):
    model, adapter, x = make_pair(key)
    expected = gradients(adapter, loss_of(model(x)))
    loss = loss_of(model(x))
    with adapter.disabled():
        assert_gradients_equal(gradients(adapter, loss), expected)


@some_specs
def test_gradients_per_sample(key):
    """torch.func: a gradient for each sample, by vmap over functional_call."""
    model, adapter, _ = make_pair(key)
    x = make_input(4, dtype=torch.float64)
    factors = {f"{adapter.name}.{name}": p.detach() for name, p in adapter.named_parameters()}

    def loss(factors, sample):
        return torch.func.functional_call(model, factors, (sample,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(factors, x)
    for row in range(4):
        single = torch.func.grad(loss)(factors, x[row])
        for name, gradient in single.items():
            assert_near(found[name][row], gradient)


def test_training_converges_to_a_target_in_the_span():
    """A LoRA of the right rank learns a low-rank change of the weight."""
    with seeded(0):
        model = nn.Sequential(nn.Linear(WIDTH, 8, dtype=torch.float64))
        change = torch.randn(8, 2, dtype=torch.float64) @ torch.randn(2, WIDTH, dtype=torch.float64)
        x = torch.randn(64, WIDTH, dtype=torch.float64)
        target = model(x).detach() + x @ change.t()
    adapter = slt.attach(model, sl.lora(2))
    optimizer = torch.optim.Adam(adapter.parameters(), 0.05)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert_near(adapter.delta("0"), change, torch.bfloat16)
