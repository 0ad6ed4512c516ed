"""Supernets on models: what is registered, what is refused, and how they leave."""

import copy

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import superlora as sl  # noqa: E402
import superlora.torch as slt  # noqa: E402
from superlora.errors import AdapterError  # noqa: E402
from superlora.search import Supernet  # noqa: E402
from tests.search.supernets import RANKS, TARGETS, fill, make_supernet  # noqa: E402
from tests.torch.conftest import _one_thread  # noqa: E402, F401
from tests.torch.helpers import (  # noqa: E402
    assert_near,
    bits,
    every_layer,
    make_input,
    make_net,
    make_outer,
    seeded,
    snapshot,
)


@every_layer
def test_keys_and_classes_stay(layer):
    model = make_net(layer)
    before = {name: bits(tensor) for name, tensor in model.state_dict().items()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    Supernet(model, TARGETS, ranks=RANKS)
    after = {name: bits(tensor) for name, tensor in model.state_dict().items()}
    assert {name: own for name, own in after.items() if not name.startswith("supernet.")} == before
    now = {name: type(module) for name, module in model.named_modules()}
    assert {name: kind for name, kind in now.items() if not name.startswith("supernet")} == kinds
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        f"supernet.{name}" for name, _ in model.supernet.named_parameters()
    ]


@every_layer
def test_detaching_gives_the_model_back(layer):
    model = make_net(layer)
    before = snapshot(model)
    supernet = fill(Supernet(model, TARGETS, ranks=RANKS))
    supernet.draw(0)
    model(make_input()).sum().backward()
    supernet.detach()
    assert not supernet.attached
    assert snapshot(model) == before
    with pytest.raises(AdapterError, match="must be attached to be detached"):
        supernet.detach()
    with pytest.raises(AdapterError, match="must be attached to be extracted from"):
        supernet.extract(supernet.space.most)


def test_detaching_leaves_frozen_what_was():
    model = make_net()
    model.blocks[0].requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    Supernet(model, TARGETS, ranks=RANKS).detach()
    assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_containers_and_lone_layers():
    """Children that are called one after the other: the first adapted layer registers it."""
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    x = torch.ones(2, 6)
    y = model(x)
    supernet = fill(Supernet(model, ranks=(2,)))
    assert model[0].supernet is supernet
    assert len(model) == 3
    supernet.use(supernet.space.most)
    assert not torch.allclose(model(x), y)
    supernet.detach()
    assert torch.equal(model(x), y)

    layer = nn.Linear(6, 5)
    supernet = fill(Supernet(layer, lambda name, _: not name, ranks=(2,)))
    assert list(supernet.layers()) == [""]
    supernet.use(supernet.space.most)
    y = layer(x)
    supernet.detach()
    assert not torch.allclose(layer(x), y)


def test_a_model_in_a_model():
    """The layers have other names, and compute the same."""
    inner, outer = make_outer(), make_outer()
    one = fill(Supernet(inner.inner, TARGETS, ranks=RANKS))
    other = fill(Supernet(outer, TARGETS, ranks=RANKS))
    assert [f"inner.{name}" for name in one.layers()] == list(other.layers())
    one.use(one.space.most)
    other.use(other.space.most)
    assert torch.equal(inner(make_input()), outer(make_input()))


def test_training_mode_and_text():
    model = make_net().eval()
    supernet = Supernet(model, TARGETS, ranks=RANKS)
    assert not supernet.training
    assert model.train().supernet.training
    assert repr(supernet) == "Supernet(6 layers, ranks=(3, 2), 1,250 parameters)"
    assert supernet(make_input()) is not None


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def _wrapped():
    model = make_net()
    model.blocks[0].q.forward = model.blocks[0].q.forward
    return model


def _noisy():
    model = make_net()
    model.blocks[0].q = Noisy(16, 8)
    return model


def _adapted():
    model = make_net()
    slt.attach(model, sl.lora(2), ["o"])
    return model


def _twice():
    model = make_net()
    Supernet(model, ["o"], name="first")
    return model


def _shared():
    model = make_net()
    model.blocks[1].q.weight = model.blocks[0].q.weight
    return model


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda: None, {}, TypeError, "model must be a torch.nn.Module: got NoneType"),
        (make_net, {"targets": ["k"]}, ValueError, r"targets\[0\]='k' matched no layer"),
        (make_net, {"ranks": ()}, TypeError, "ranks must be a sequence of integers"),
        (make_net, {"ranks": (2, 2)}, ValueError, "ranks must be distinct"),
        (make_net, {"ranks": (0,)}, ValueError, "ranks must be at least 1"),
        (
            make_net,
            {"ranks": (2,), "operations": {"add_weight": (4, "none")}},
            ValueError,
            "rank must be at most 2, the largest of the space: got 4",
        ),
        (make_net, {"operations": {"right_weight": ("none",)}}, ValueError, "right_weight"),
        (make_net, {"seed": -1}, ValueError, "seed must be at least 0"),
        (make_net, {"dtype": torch.int8}, TypeError, "dtype must be a floating-point torch.dtype"),
        (make_net, {"name": "blocks"}, AdapterError, "an attribute 'blocks' already"),
        (make_net, {"name": "a b"}, ValueError, "name must be a Python identifier"),
        (_shared, {}, ValueError, "'blocks.0.q' shares its weight"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(make, options, error, message):
    model = make()
    before = snapshot(model) if model is not None else None
    with pytest.raises(error, match=message):
        Supernet(model, **{"targets": ["q", "v"], "ranks": (2,), **options})
    assert model is None or snapshot(model) == before


@pytest.mark.parametrize("make", [_wrapped, _noisy, _adapted, _twice])
def test_it_lies_beside_all_that_an_adapter_does(make):
    """Other adapters, another supernet, another library's forward, a layer with one of its own."""
    model = make()
    if make is _twice:
        model.first.use(fill(model.first).space.most)
    x = make_input()
    y = model(x)
    before = snapshot(model)
    supernet = Supernet(model, TARGETS, ranks=RANKS)
    supernet.use(supernet.space.most)
    assert torch.equal(model(x), y)
    fill(supernet)
    changed = model(x)
    assert not torch.allclose(changed, y)
    supernet.extract(supernet.space.most, name="other")
    assert torch.equal(model(x), changed)
    model.other.detach()
    assert torch.equal(model(x), y)
    assert snapshot(model) == before


def test_an_adapter_attached_later_adds_its_own():
    model, supernet = make_supernet(to={"dtype": torch.float64})
    x = make_input(dtype=torch.float64)
    supernet.use(supernet.space.most)
    y = model(x)
    adapter = fill(slt.attach(model, sl.lora(2), ["q"], name="other"))
    both = model(x)
    assert not torch.allclose(both, y)
    with supernet.disabled(), adapter.disabled():
        assert not torch.allclose(model(x), y)
    with slt.rows(model, ["supernet"] * len(x)):
        assert_near(model(x), y)
    supernet.extract(supernet.space.most)
    assert_near(model(x), both)
    adapter.detach()
    assert torch.equal(model(x), y)


@every_layer
def test_merged_it_computes_what_the_configuration_does(layer):
    model, supernet = make_supernet(layer, to={"dtype": torch.float64})
    before = {name: bits(value) for name, value in model.state_dict().items()}
    x = make_input(dtype=torch.float64)
    supernet.scale = 1.5
    for step in range(3):
        with supernet.using(supernet.sample(step)):
            y = model(x)
            supernet.merge()
            assert_near(model(x), y)
            with pytest.raises(AdapterError, match="must be unmerged to be given another"):
                supernet.draw(0)
            with supernet.disabled():
                assert not torch.allclose(model(x), y)
            chosen = sum(
                o != "none" for own in supernet.configuration.values() for o in own.values()
            )
            assert len(supernet.deltas()) == chosen
        assert not supernet.merged
        now = {name: bits(value) for name, value in model.state_dict().items()}
        assert now == before
    with pytest.raises(AdapterError, match="must have a configuration"):
        supernet.merge()
    for ask in (lambda: supernet.delta("add_weight.blocks.0.q"), supernet.deltas):
        with pytest.raises(AdapterError, match="must have a configuration"):
            ask()
    supernet.use(supernet.space.fixed(add_bias="vector"))
    with pytest.raises(KeyError, match="name must be one of"):
        supernet.delta("add_weight.blocks.0.q")
    assert supernet.gains_bias == ([*supernet.layers()] if layer == "no-bias" else [])
    supernet.use(supernet.space.fixed(add_weight=2))
    assert supernet.gains_bias == []
    assert {name: bits(value) for name, value in model.state_dict().items()} == before


def test_scale_and_ways_hold_for_every_configuration():
    """Set before an option is chosen for the first time, and after."""
    model, supernet = make_supernet(to={"dtype": torch.float64})
    first, second = supernet.sample(0), supernet.sample(1)
    found = {}
    for scale in (1.0, 2.0):
        supernet.scale = scale
        for index, configuration in enumerate((first, second)):
            supernet.use(configuration)
            found[scale, index] = supernet.deltas()
    for index in range(2):
        for name, delta in found[1.0, index].items():
            assert_near(found[2.0, index][name], 2 * delta)
    x = make_input(dtype=torch.float64)
    y = model(x)
    for way in ("factored", "formed"):
        supernet.applied = way
        assert {own.blocks.scope.applied for own in supernet.supports.values()} == {way}
        assert_near(model(x), y)


def test_a_forward_wrapped_later_is_not_lost():
    model, supernet = make_supernet()
    layer = model.blocks[0].q
    own = layer.forward
    layer.forward = lambda x: own(x)
    with pytest.raises(AdapterError, match=r"forward of 'blocks.0.q' is wrapped"):
        supernet.detach()
    layer.forward = own
    supernet.detach()


def test_a_weight_that_is_trained_under_it():
    """Its gradient has what the scale and the bias take from it."""
    with seeded(0):
        model = nn.Sequential(nn.Linear(5, 4)).double()
        x = torch.randn(3, 5, dtype=torch.float64)
    supernet = fill(Supernet(model, ranks=(2,)))
    supernet.use(supernet.space.most)
    model[0].weight.requires_grad_()

    def call(weight):
        return torch.func.functional_call(model, {"0.weight": weight}, (x,))

    weight = model[0].weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(call, (weight,))


def test_what_is_trained_beside_it():
    """A head and biases take their gradients as in the base."""
    model, supernet = make_supernet(to={"dtype": torch.float64})
    plain = copy.deepcopy(make_net(dtype=torch.float64))
    supernet.use(supernet.space.fixed())
    model.head.requires_grad_()
    model.blocks[0].q.bias.requires_grad_()
    x = make_input(dtype=torch.float64)
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    assert torch.equal(model.head.weight.grad, plain.head.weight.grad)
    assert torch.equal(model.blocks[0].q.bias.grad, plain.blocks[0].q.bias.grad)
    model.zero_grad()
    supernet.use(supernet.space.fixed(scale_bias="vector"))
    model(x).square().sum().backward()
    scale = 1 + supernet.stored("blocks.0.q")["scale_bias"][0]
    shifted = copy.deepcopy(plain)
    with torch.no_grad():
        for name in supernet.layers():
            shifted.get_submodule(name).bias.mul_(1 + supernet.stored(name)["scale_bias"][0])
    shifted.zero_grad()
    shifted(x).square().sum().backward()
    expected = scale * shifted.blocks[0].q.bias.grad
    torch.testing.assert_close(model.blocks[0].q.bias.grad, expected)
