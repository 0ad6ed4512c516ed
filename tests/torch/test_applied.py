"""``apply`` and ``adapter.applied``: forced or chosen, the ways of applying an update are one."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import superlora as sl
import superlora.torch as slt
from superlora.design.cost_rule import application
from superlora.torch.update import FactoredWay, FormedWay, MultipliedWay
from tests.torch.counting import Tracker
from tests.torch.helpers import (
    KINDS,
    SPECS,
    WIDTH,
    assert_near,
    attach_filled,
    every_spec,
    fill,
    loss_of,
    make_input,
    make_net,
    plain_forward,
    seeded,
    targets_of,
    unchanged,
)

SHAPES = {"q": (8, 16), "v": (8, 16), "o": (16, 8)}


def ways_of(key):
    """Return the ways that all layers of the tests' model have."""
    shapes = {f"{block}.{name}": SHAPES[name] for block in (0, 1) for name in targets_of(key)}
    layout = sl.Plan(SPECS[key], shapes).layout
    factored = all(application(layout, name).factored is not None for name in shapes)
    return ("auto", "factored", "formed") if factored else ("auto", "formed")


ALL = [(key, way) for key in SPECS for way in ways_of(key)]
# "auto" is one of the others for each layer: one test has it for every spec.
EVERY = [(key, way) for key, way in ALL if way != "auto"]
every_way = pytest.mark.parametrize(("key", "way"), EVERY)
# torch imports at first use of forward mode what warns of itself.
forward_mode = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
some_ways = pytest.mark.parametrize(
    ("key", "way"), [(key, way) for key in KINDS for way in ("factored", "formed")]
)


def make_pair(key, way, dtype=torch.float64):
    model = make_net(dtype=dtype)
    adapter = attach_filled(model, key, apply=way)
    assert adapter.applied == way
    return model, adapter, make_input(dtype=dtype).requires_grad_()


def step(x, adapter, y):
    """Return the gradients of inputs and of the factors that want one."""
    named = {"x": x, **dict(adapter.named_parameters())}
    named = {name: tensor for name, tensor in named.items() if tensor.requires_grad}
    found = torch.autograd.grad(
        loss_of(y), list(named.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(named, found, strict=True))


def plain(model, adapter, x, call=None):
    """Return output and gradients by plain autograd through ``x @ (W + ΔW)ᵀ``."""
    y = plain_forward(model, adapter, lambda: (call or model)(x))
    return y, step(x, adapter, y)


def assert_same(found, expected, tolerance=1e-12):
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= tolerance * largest, name


@pytest.mark.parametrize(("key", "way"), ALL)
def test_outputs_and_gradients_are_those_of_plain_autograd(key, way):
    model, adapter, x = make_pair(key, way)
    y, expected = plain(model, adapter, x)
    found = model(x)
    assert_near(found, y)
    assert_same(step(x, adapter, found), expected)
    assert torch.equal(model(x.detach()), found)  # inputs that want no gradient
    with torch.no_grad():
        assert_near(model(x), y)
    with torch.inference_mode():
        assert_near(model(x), y)


@pytest.mark.parametrize("key", [key for key, way in EVERY if way == "factored"])
def test_the_orders_for_few_tokens_and_for_many_are_one(key):
    model, adapter, x = make_pair(key, "factored")
    y, expected = plain(model, adapter, x)
    for switch in (0, 1 << 40):
        for support in adapter.supports.values():
            if isinstance(support.way, FactoredWay):
                support.way.factored = replace(support.way.factored)
                vars(support.way.factored)["switch"] = switch
        found = model(x)
        assert_near(found, y)
        assert_same(step(x, adapter, found), expected)
        with torch.no_grad():
            assert_near(model(x), y)


@every_spec
def test_applied_can_be_changed_at_any_time(key):
    model, adapter, x = make_pair(key, "auto")
    y, expected = plain(model, adapter, x)
    adapter.scale = 1.5 * adapter.scale
    scaled, _ = plain(model, adapter, x)
    for way in reversed(ways_of(key)):
        adapter.applied = way
        adapter.scale = SPECS[key].scaling
        before = model(x)
        adapter.scale = 1.5 * adapter.scale
        assert_near(model(x), scaled)
        adapter.applied = "auto"
        assert_near(before, y)
        assert_same(step(x, adapter, before), expected)  # those of the pass that was computed


@some_ways
@pytest.mark.parametrize("traced", [False, True])
def test_the_way_that_was_asked_for_is_taken(monkeypatch, key, way, traced):
    model, adapter, x = make_pair(key, way)
    taken = []
    for kind in (FactoredWay, MultipliedWay, FormedWay):
        for method in ("plain", "forward"):
            watch(monkeypatch, kind, method, taken)
    kind = {"formed": FormedWay, "factored": FactoredWay}[way]
    if (key, way) == ("fourierft", "factored"):
        kind = MultipliedWay
    assert (adapter.supports["blocks.0.q"].way.operands[0].opened is None) == (key != "aligned-3")
    for tokens in (1, 1 << 12):
        inputs = x.detach()[:1, :1].expand(1, tokens, WIDTH)
        for autocast in (False, True):  # under which no two products are one
            taken.clear()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
                (torch.func.vmap(model) if traced else model)(inputs)
            assert set(taken) == {kind}


def watch(monkeypatch, kind, method, taken):
    """List in `taken` which kind of way a method is called of."""
    original = getattr(kind, method)

    def watched(self, *arguments):
        taken.append(type(self))
        return original(self, *arguments)

    monkeypatch.setattr(kind, method, watched)


@pytest.mark.parametrize("grad", [True, False])
def test_the_number_of_tokens_decides(monkeypatch, grad):
    """From the bound on that was counted for this layer the update is formed; before it is not."""
    model = nn.Sequential(nn.Linear(48, 64))
    adapter = fill(slt.attach(model, sl.lora(24), ["0"]))
    taken = []
    for kind in (FactoredWay, FormedWay):
        watch(monkeypatch, kind, "forward", taken)
    bounds = application(adapter.plan.layout, "0").bounds
    assert bounds[False, True] < bounds[True, True]
    bound = bounds[grad, True]
    with torch.set_grad_enabled(grad):
        for tokens, kind in ((bound - 1, FactoredWay), (bound, FormedWay)):
            x = torch.randn(tokens, 48)
            expected = plain_forward(model, adapter, lambda x=x: model(x))
            taken.clear()
            assert_near(model(x), expected)
            assert taken[0] is kind
            taken.clear()
            adapter.scale = adapter.scale  # no decision is kept
            model(x[None, :, None])
            assert taken[0] is kind
    adapter.applied = "factored"
    model(x)
    assert taken[-1] is FactoredWay


@every_way
def test_mixed_precision(key, way):
    model, adapter, x = make_pair(key, way, torch.float32)
    y, expected = plain(model, adapter, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    assert found.dtype == torch.bfloat16
    assert (found - y).norm() < 0.1 * y.norm()
    for name, gradient in step(x, adapter, found.float()).items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected[name]).norm() < 0.35 * expected[name].norm(), name


@pytest.mark.parametrize(  # in turns: each spec by default has both in test_gradients
    ("key", "way", "reentrant"), [(*each, place % 2 == 0) for place, each in enumerate(EVERY)]
)
def test_gradient_checkpointing(key, way, reentrant):
    model, adapter, x = make_pair(key, way)
    _, expected = plain(model, adapter, x)
    y = x + model.shift
    for block in model.blocks:
        y = checkpoint(block, y, use_reentrant=reentrant)
    loss_of(model.head(y)).backward()
    assert_same({"x": x.grad, **{n: p.grad for n, p in adapter.named_parameters()}}, expected)


@every_way
def test_a_layer_used_twice_in_a_pass(key, way):
    model, adapter, x = make_pair(key, way)
    block = model.blocks[0]

    def twice(x):
        return block(block(x)) + block.q(x).sum()

    y, expected = plain(model, adapter, x, twice)
    found = twice(x)
    assert_near(found, y)
    assert_same(step(x, adapter, found), expected)


@every_way
def test_some_factors_are_frozen_by_the_user(key, way):
    model, adapter, x = make_pair(key, way)
    parameters = list(adapter.parameters())
    for start in (0, 1):
        for index, parameter in enumerate(parameters):
            parameter.requires_grad_(index % 2 != start)
        _, expected = plain(model, adapter, x)
        loss_of(model(x)).backward()
        found = {n: p.grad for n, p in adapter.named_parameters() if p.requires_grad}
        assert_same({"x": x.grad, **found}, expected)
        assert all(p.grad is None for p in parameters if not p.requires_grad)
        x.grad = None
        adapter.zero_grad(set_to_none=True)
    adapter.requires_grad_(False)
    assert not model(x.detach()).requires_grad
    _, expected = plain(model, adapter, x)
    assert_same(step(x, adapter, model(x)), expected)


@every_way
def test_base_weights_are_trained_too(key, way):
    """Where the user frees them again, or some of them; a layer may be called twice."""
    model, adapter, x = make_pair(key, way)
    base = dict(model.named_parameters(prefix="model"))
    for name, parameter in base.items():
        parameter.requires_grad_("blocks.1.v" not in name)

    def twice(x):
        return model(x) + model.head(model.blocks[0](x))

    def slopes(y):
        wanted = [p for p in base.values() if p.requires_grad]
        found = torch.autograd.grad(loss_of(y), wanted, allow_unused=True, materialize_grads=True)
        return {str(place): gradient for place, gradient in enumerate(found)}

    expected = slopes(plain_forward(model, adapter, lambda: twice(x)))
    assert all(gradient.any() for gradient in expected.values())
    assert_same(slopes(twice(x)), expected)


@some_ways
def test_no_gradient_is_computed_that_is_not_asked_for(key, way):
    """Counted: what is frozen costs less."""

    def flops(x):
        with Tracker() as tracker:
            loss_of(model(x)).backward()
        return tracker.flops

    model, adapter, x = make_pair(key, way)
    everything = flops(x)
    without_inputs = flops(x.detach())
    adapter.requires_grad_(False)
    without_factors = flops(x)
    assert without_inputs < everything
    assert without_factors < everything or (key, way) == ("fourierft", "factored")


@some_ways
def test_transforms(key, way):
    """A gradient a sample, by vmap over grad over functional_call; and inputs alone."""
    model, adapter, _ = make_pair(key, way)
    x = make_input(4, dtype=torch.float64)
    own = {f"{adapter.name}.{name}": p.detach() for name, p in adapter.named_parameters()}

    def loss(factors, sample):
        return torch.func.functional_call(model, factors, (sample,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(own, x)
    for row in range(4):
        y = plain_forward(model, adapter, lambda row=row: model(x[row])).square().sum()
        slopes = torch.autograd.grad(y, list(adapter.parameters()))
        for name, gradient in zip(own, slopes, strict=True):
            assert_near(found[name][row], gradient)
    assert_near(torch.func.vmap(model)(x), model(x))
    slope = torch.func.grad(lambda x: loss_of(model(x)))(x)
    leaf = x.clone().requires_grad_()
    assert_near(slope, torch.autograd.grad(loss_of(model(leaf)), leaf)[0])


@forward_mode
@every_way
def test_forward_mode(key, way):
    model, _, x = make_pair(key, way)
    x = x.detach()
    factors = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    with seeded(3):
        along = {n: torch.randn_like(p) for n, p in factors.items()}
        of_x = torch.randn_like(x)
    step = 1e-6

    def moved(distance):
        shifted = {n: p + distance * along[n] for n, p in factors.items()}
        return torch.func.functional_call(model, shifted, (x + distance * of_x,))

    expected = (moved(step) - moved(-step)) / (2 * step)
    with forward_ad.dual_level():
        dual = {n: forward_ad.make_dual(p, along[n]) for n, p in factors.items()}
        y = torch.func.functional_call(model, dual, (forward_ad.make_dual(x, of_x),))
        value, slope = forward_ad.unpack_dual(y)
    assert_near(value, model(x))
    assert (slope - expected).norm() <= 1e-7 * expected.norm()
    found = torch.func.jvp(model, (x,), (of_x,))[1]
    inputs_alone = (model(x + step * of_x) - model(x - step * of_x)) / (2 * step)
    assert (found - inputs_alone).norm() <= 1e-7 * inputs_alone.norm()


@some_ways
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (2, 3, 4)], ids=str)
def test_any_batch_shape(key, way, shape):
    model, adapter, _ = make_pair(key, way)
    with seeded(0):
        x = torch.randn(*shape, WIDTH, dtype=torch.float64, requires_grad=True)
    y, expected = plain(model, adapter, x, model.blocks[0].q)
    found = model.blocks[0].q(x)
    assert found.shape == (*shape, 8)
    slopes = step(x, adapter, found) if found.numel() else None
    if slopes is not None:
        assert_near(found, y)
        assert_same(slopes, expected)
    else:
        found.sum().backward()
        assert x.grad.shape == x.shape
        assert not any(p.grad.any() for p in adapter.parameters() if p.grad is not None)


@some_ways
def test_inputs_and_gradients_that_are_not_contiguous(key, way):
    model, adapter, _ = make_pair(key, way)
    q = model.blocks[0].q
    x = make_input(5, 3, dtype=torch.float64).requires_grad_()
    views = [
        lambda x: x.transpose(0, 1),
        lambda x: x.flip(-1)[::2],
        lambda x: x[:, :1].expand(5, 4, WIDTH),
    ]
    for view in views:
        y, expected = plain(model, adapter, x, lambda x, view=view: q(view(x)).transpose(0, -1))
        found = q(view(x)).transpose(0, -1)
        assert_near(found, y)
        assert_same(step(x, adapter, found), expected)
    slope = torch.autograd.grad(q(x).sum(), x)[0]  # of a gradient that is one number expanded
    expected = torch.autograd.grad(plain_forward(model, adapter, lambda: q(x)).sum(), x)[0]
    assert_near(slope, expected)


def test_factored_is_refused_before_anything_is_changed():
    model = make_net()
    mixed = sl.lora(2, overrides={"o": {"fold": "balanced", "groups": 3}})
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"for 'blocks.0.o', 'blocks.1.o', whose fold.*'factored'"),
    ):
        slt.attach(model, mixed, ["q", "v", "o"], apply="factored")
    with unchanged(model), pytest.raises(ValueError, match="apply must be one of 'auto'"):
        slt.attach(model, sl.lora(2), ["q"], apply="fast")
    adapter = slt.attach(model, mixed, ["q", "v", "o"])
    for value in ("factored", "fast", None):
        with pytest.raises(ValueError, match="apply must be"):
            adapter.applied = value
        assert adapter.applied == "auto"


def test_two_adapters_applied_in_two_ways():
    model = make_net(dtype=torch.float64)
    x = make_input(dtype=torch.float64)
    first = attach_filled(model, "lora", name="first", apply="formed")
    second = attach_filled(model, "lokr", name="second", apply="factored")
    expected = make_net(dtype=torch.float64)
    with torch.no_grad():
        for name in first.plan.shapes:
            expected.get_submodule(name).weight += first.delta(name) + second.delta(name)
    assert_near(model(x), expected(x))
