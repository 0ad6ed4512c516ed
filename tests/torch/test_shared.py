"""What layers share during one call of the model: right in any use, and gone afterwards."""

import concurrent.futures
import contextlib
import copy
import gc
import io
import sys
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import superlora as sl
import superlora.torch as slt
from superlora import maps
from superlora.torch import operands
from superlora.torch.scope import Scope
from tests.torch.counting import Tracker
from tests.torch.helpers import (
    SPECS,
    assert_near,
    attach_filled,
    fill,
    gradients,
    loss_of,
    make_input,
    make_net,
    plain_forward,
    slow_but,
    targets_of,
)

# By the kinds of what is shared.
STAGES = {
    "vector": SPECS["fastfood"],
    "rows": sl.Spec(rank=1, groups=1, fold="aligned", scale=0.7),
    "modes": sl.Spec(rank=2, order=3, groups=1, fold="aligned", map=maps.Separable(), ratio=0.5),
    "modes+rows": sl.Spec(rank=1, groups=1, fold="aligned", map=maps.Separable(), ratio=0.5),
    "inner": sl.lora(2, factor_map=maps.Fastfood(), factor_size=40, scale=0.7),
}

# One vector, several with cut weights, one that a map makes of all groups, the entries before a
# map that reads them, and the vector that a map makes blocks of.
SHARED = ["fastfood", "fastfood-cut", "shuffle-all", "one-hot", *STAGES]
every_shared = pytest.mark.parametrize("key", SHARED)


def make_pair(key):
    model = make_net(dtype=torch.float64)
    if key in STAGES:
        adapter = fill(slt.attach(model, STAGES[key], ["q", "v", "o"]))
    else:
        adapter = attach_filled(model, key)
    return model, adapter, make_input(dtype=torch.float64)


class Planned:
    """What `plain_forward` asks an adapter for, from the plan, which shares nothing."""

    def __init__(self, adapter):
        self.adapter, self.plan = adapter, adapter.plan

    def delta(self, name):
        factors = self.adapter.factors()
        return self.plan.delta(factors, name, self.adapter.blocks.scales[name].value)


def plain(model, adapter, call):
    return plain_forward(model, Planned(adapter), call)


def plain_gradients(model, adapter, x):
    return gradients(adapter, loss_of(plain(model, adapter, lambda: model(x))))


def assert_same(found, expected, times=1.0):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_near(found[name], times * gradient)


def kept(adapter):
    """List the values that an adapter holds for its layers."""
    scope = adapter.blocks.scope
    passes = [*scope._passes.values(), *scope._kept.values()]
    held = [values for own in passes for values in own.values()]
    return [value for values in held for value in values.values()]


class Watched(dict):
    """Values that tell of each that is put among them."""

    def __init__(self, tell):
        super().__init__()
        self.tell = tell

    def __setitem__(self, key, value):
        for part in value.values():
            self.tell(part)
        super().__setitem__(key, value)


def watch_kept(monkeypatch, tell):
    """Tell of every part of a value that layers share, when it is made."""
    original = Scope.values

    def values(self):
        found = original(self)
        if found is None or isinstance(found, Watched):
            return found
        for held in (*self._passes.values(), *self._kept.values()):
            for mode, own in held.items():
                if own is found:
                    held[mode] = Watched(tell)
                    return held[mode]
        raise AssertionError("values that no pass holds")

    monkeypatch.setattr(Scope, "values", values)


def count_made(monkeypatch):
    """Count what is made, by kind of what layers may share, as the values are asked for."""
    made = []
    for kind in (operands.Shared, *operands.Shared.__subclasses__()):

        def make(self, adapter, whole, original=kind.make):
            made.append(self.key if whole else ("own", self.key))
            return original(self, adapter, whole)

        monkeypatch.setattr(kind, "make", make)
    return made


@pytest.fixture
def made(monkeypatch):
    """Return a list that grows by the key of every value that is made."""
    return count_made(monkeypatch)


def taken(adapter):
    """Return the gradients that a backward pass left, and take them away."""
    found = {name: factor.grad for name, factor in adapter.named_parameters()}
    adapter.zero_grad(set_to_none=True)
    return found


@every_shared
def test_backward_passes_come_in_any_order(key):
    model, adapter, x = make_pair(key)
    other = make_input(seed=5, dtype=torch.float64)
    expected, expected_other = (plain_gradients(model, adapter, each) for each in (x, other))
    first, second = loss_of(model(x)), loss_of(model(other))
    assert_same(gradients(adapter, second), expected_other)
    third = loss_of(model(x))  # after gradients were taken, before others are
    assert_same(gradients(adapter, first), expected)
    assert_same(gradients(adapter, third), expected)
    (loss_of(model(x)) + loss_of(model(x))).backward()
    assert_same(taken(adapter), expected, times=2)
    for _ in range(2):  # accumulated
        loss_of(model(x)).backward()
    assert_same(taken(adapter), expected, times=2)
    loss = loss_of(model(x))
    loss.backward(retain_graph=True)
    loss.backward()
    assert_same(taken(adapter), expected, times=2)


# What is shared is made by fixed linear maps alone.
LINEAR = ("modes+rows", "inner")


@every_shared
def test_a_step_between_forward_and_backward_is_refused_or_right(key):
    model, adapter, x = make_pair(key)
    expected = plain_gradients(model, adapter, x)
    loss = loss_of(model(x))
    with torch.no_grad():
        next(adapter.parameters()).add_(1)
    if key in LINEAR:  # what was made is all that is read
        assert_same(gradients(adapter, loss), expected)
    else:
        with pytest.raises(RuntimeError, match=r"changed in place|modified (by an )?inplace"):
            loss.backward()
    assert_same(gradients(adapter, loss_of(model(x))), plain_gradients(model, adapter, x))


def write_in_place(factor, values):
    with torch.no_grad():
        factor.copy_(values)


def put_and_change_type(factor, values):
    factor.data = values.float()
    factor.data = values


WRITES = {
    "data": lambda factor, values: factor.data.copy_(values),
    "in place": write_in_place,
    "put": lambda factor, values: setattr(factor, "data", values),
    "put and change type": put_and_change_type,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@every_shared
def test_parameters_may_be_written_in_any_way(key, write):
    model, adapter, x = make_pair(key)
    model(x)
    with torch.no_grad():
        model(x)
    for factor in adapter.parameters():
        write(factor, torch.randn_like(factor))
    with torch.no_grad():
        assert_near(model(x), plain(model, adapter, lambda: model(x)))
    assert_same(gradients(adapter, loss_of(model(x))), plain_gradients(model, adapter, x))
    for factor in adapter.parameters():
        factor.data = factor.data.float()
    assert_near(model(x), plain(model, adapter, lambda: model(x)), torch.float32)


@every_shared
def test_modes_and_scales_between_passes(key):
    model, adapter, x = make_pair(key)
    expected = plain_gradients(model, adapter, x)
    before = loss_of(model(x))
    adapter.scale = -0.3
    other = plain_gradients(model, adapter, x)
    assert_same(gradients(adapter, before), expected)  # of the scale of its forward pass
    assert_same(gradients(adapter, loss_of(model(x))), other)
    with torch.inference_mode():
        model(x)
    assert_same(gradients(adapter, loss_of(model(x))), other)
    with adapter.disabled():
        model(x)
    y = model(x)
    adapter.merge()
    assert_near(model(x), y)
    adapter.unmerge()
    assert_same(gradients(adapter, loss_of(model(x))), other)
    model.float().double()
    assert_same(gradients(adapter, loss_of(model(x))), plain_gradients(model, adapter, x))
    frozen = next(adapter.parameters()).requires_grad_(False)
    model(x)
    frozen.requires_grad_(True)
    assert_same(gradients(adapter, loss_of(model(x))), plain_gradients(model, adapter, x))


@every_shared
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(key, reentrant):
    model, adapter, x = make_pair(key)
    x.requires_grad_(True)
    expected = plain_gradients(model, adapter, x)

    def run():
        z = x + model.shift
        for block in model.blocks:
            z = checkpoint(block, z, use_reentrant=reentrant)
        return loss_of(model.head(z))

    run().backward()
    assert_same(taken(adapter), expected)
    first, second = run(), run()
    second.backward()
    first.backward()
    assert_same(taken(adapter), expected, times=2)


@every_shared
def test_other_parameters_by_functional_call(key):
    model, adapter, x = make_pair(key)
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    expected = plain_gradients(model, adapter, x)

    def loss(parameters, x):
        return loss_of(torch.func.functional_call(model, parameters, (x,)))

    model(x)
    found = torch.func.grad(loss)(own, x)
    assert_same({n.removeprefix("superlora."): g for n, g in found.items()}, expected)
    products = {n: p * 1.0 for n, p in own.items()}  # of a graph of their own
    total = loss(products, x) + loss(products, x)
    found = dict(zip(own, torch.autograd.grad(total, list(own.values())), strict=True))
    assert_same({n.removeprefix("superlora."): g for n, g in found.items()}, expected, times=2)
    stacked = {n: torch.stack([p, 2 * p]).detach() for n, p in own.items()}
    assert_near(torch.func.vmap(loss, (0, None))(stacked, x)[0], loss(own, x))
    with torch.inference_mode():  # whose tensors do not count their changes
        assert_near(loss({n: p.clone() for n, p in own.items()}, x), loss(own, x))


@pytest.mark.parametrize("key", slow_but(["fastfood-cut", "one-hot", "inner"], SHARED))
def test_exported_program(key):
    model, _, x = make_pair(key)
    y = model(x)
    assert_near(torch.export.export(model, (x,), strict=False).module()(x), y)
    assert_near(model(x), y)


@every_shared
def test_threads_train_on_one_model(key):
    model, adapter, _ = make_pair(key)
    inputs = [make_input(seed=seed, dtype=torch.float64) for seed in range(12)]
    expected = [plain_gradients(model, adapter, x) for x in inputs]

    def run(index):
        if index % 3 == 0:
            with torch.no_grad():
                model(inputs[index])
        return gradients(adapter, loss_of(model(inputs[index])))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            found = list(pool.map(run, range(len(inputs))))
    finally:
        sys.setswitchinterval(interval)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


@every_shared
def test_no_value_outlives_its_use(monkeypatch, key):
    """A graph that holds itself is seen by no collector: one vector a step would be left."""
    model, adapter, x = make_pair(key)
    alive = []
    watch_kept(monkeypatch, lambda value: alive.append(weakref.ref(value)))
    gc.disable()
    try:
        for _ in range(3):
            loss = loss_of(model(x))
            assert alive
            assert not kept(adapter)
            assert adapter.blocks.scope._passes == {}
            loss.backward()
            del loss
        model(x)  # no gradients are taken
        with torch.no_grad():
            model(x)
        with torch.inference_mode():
            model(x)
        living = [part for part in alive if part() is not None]
    finally:
        gc.enable()
    assert living == []


@every_shared
def test_neither_merging_nor_forming_leaves_a_value(key):
    model, adapter, x = make_pair(key)
    model(x)
    adapter.merge()
    assert not kept(adapter)
    adapter.unmerge()
    adapter.deltas()
    assert not kept(adapter)
    model(x)
    adapter.detach()
    assert not kept(adapter)


@every_shared
@pytest.mark.parametrize("backward", [False, True])
def test_a_model_is_freed(key, backward):
    gc.freeze()  # what is collected is only what is made here
    model, adapter, x = make_pair(key)
    loss = loss_of(model(x))
    if backward:
        loss.backward()
    found = weakref.ref(model), weakref.ref(adapter)
    del model, adapter, loss
    gc.collect()
    assert [reference() for reference in found] == [None, None]


@every_shared
def test_copies_share_among_themselves(made, key):
    model, adapter, x = make_pair(key)
    made.clear()
    y = model(x)
    once = list(made)
    file = io.BytesIO()
    torch.save(model, file)
    with adapter.shared(), torch.no_grad():
        model(x)
        assert kept(adapter)
        copies = [copy.deepcopy(model)]
        file.seek(0)
        copies.append(torch.load(file, weights_only=False))
        for copied in copies:
            assert copied.superlora.blocks.scope is not adapter.blocks.scope
            assert not kept(copied.superlora)
    for copied in copies:
        made.clear()
        assert_near(copied(x), y)
        assert made == once
        loss_of(copied(x)).backward()
        assert not kept(copied.superlora)
        with torch.no_grad():
            for factor in copied.superlora.parameters():
                factor.mul_(2)
        assert_near(model(x), y)
        copied.superlora.detach()
        assert not copied._forward_pre_hooks
        assert not copied._forward_hooks
    assert all(factor.grad is None for factor in adapter.parameters())


# By kind, what is made once in a pass.
COUNTS = {
    "fastfood": {"vector"},
    "fastfood-cut": {"vector"},
    "vector": {"vector"},
    "shuffle-all": {"vector"},
    "one-hot": {"vector"},
    "rows": {"rows"},
    "modes": {"modes"},
    "modes+rows": {"rows", "modes"},
    "inner": {"inner"},
}


def shared(made, key):
    """Leave out rows that layers open on their own, where they would be too many for a group."""
    alone = ("own", ("rows", 0, 0))
    assert alone not in made or key == "modes"
    return [each for each in made if each != alone]


@pytest.mark.parametrize("value", [None, float("nan")])
@every_shared
def test_a_value_is_made_once_a_pass_for_all_layers(made, key, value):
    model, adapter, x = make_pair(key)
    if value is not None:
        with torch.no_grad():
            next(adapter.parameters()).fill_(value)
    made.clear()
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        for _ in range(2):
            with mode():
                model(x)
            together = shared(made, key)
            assert {kind for kind, *_ in together} == COUNTS[key]
            assert len(together) == len(set(together)) < len(adapter.plan.shapes)
            made.clear()
    adapter.deltas()
    together = shared(made, key)
    assert {kind for kind, *_ in together} <= COUNTS[key]
    assert len(together) == len(set(together))


MAPPED = {
    "fastfood": (maps.Fastfood, "_forward"),
    "shuffle-all": (maps.Shuffle, "_forward"),
    "inner": (maps.Fastfood, "_forward"),
    "modes": (maps.Separable, "map_mode"),
    "rows": (operands, "open_rows"),
}


@pytest.mark.parametrize("key", MAPPED)
def test_what_makes_it_is_called_once_a_pass(monkeypatch, key):
    """By a map or a contraction, forward and backward, in a deep model as in a flat one."""
    owner, name = MAPPED[key]
    original = getattr(owner, name)
    calls = []

    def counted(*arguments, **options):
        calls.append(name)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, counted)
    found = []
    for depth in (2, 4):
        model = make_net(depth=depth, dtype=torch.float64)
        spec = STAGES[key] if key in STAGES else SPECS[key]
        fill(slt.attach(model, spec, ["q", "v", "o"]))
        x = make_input(dtype=torch.float64)
        model(x)
        calls.clear()
        loss = loss_of(model(x))
        forward = len(calls)
        loss.backward()
        found.append((forward, len(calls) - forward))
    assert found[0] == found[1]
    assert found[0][0] <= 3  # of the modes of a fold, one each


def test_sharing_that_is_none_is_noticed(monkeypatch, made):
    monkeypatch.setattr(Scope, "values", lambda self: {})
    model, _, x = make_pair("fastfood")
    made.clear()
    model(x)
    assert len(made) > len(set(made))


class Interrupted(nn.Module):
    """A layer in whose place something goes wrong."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        if self.error is not None:
            raise self.error
        return x


ERRORS = {"error": ValueError("bad"), "interrupt": KeyboardInterrupt(), "exit": SystemExit()}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("grad", [True, False])
@every_shared
def test_an_interrupted_pass_leaves_nothing_to_the_next(key, grad, error):
    model, adapter, x = make_pair(key)
    model.head = nn.Sequential(Interrupted(error), model.head)
    with torch.set_grad_enabled(grad):
        with pytest.raises(type(error)):
            model(x)
        if isinstance(error, Exception):
            assert not kept(adapter)
        for factor in adapter.parameters():
            factor.data.mul_(1.5)
        model.head[0].error = None
        assert_near(model(x), plain(model, adapter, lambda: model(x)))
    assert adapter.blocks.scope._passes == {}


@every_shared
def test_layers_that_are_called_alone_share_nothing(made, key):
    """Factors that change between two of them, in whatever way, are seen by the second."""
    model, adapter, x = make_pair(key)
    first, second = model.blocks

    def check(layer, x):
        assert_near(layer(x), plain(model, adapter, lambda: layer(x)))

    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        made.clear()
        with mode():
            check(first.q, x)
            check(first.v, x)
            for factor in adapter.parameters():
                factor.data.mul_(-1.25)
            check(second.q, x)
            y = first(x)
            for factor in adapter.parameters():
                factor.data = factor.data * 0.75
            check(second, y)
        assert made
        assert {kind for kind, _ in made} == {"own"}
        assert not kept(adapter)


def test_a_pass_that_is_not_closed_is_noticed(monkeypatch):
    model, adapter, x = make_pair("fastfood")
    model._forward_hooks.clear()
    with torch.no_grad():
        model(x)
        for factor in adapter.parameters():
            factor.data.mul_(-1.25)
        q = model.blocks[0].q
        with pytest.raises(AssertionError):
            assert_near(q(x), plain(model, adapter, lambda: q(x)))
        assert_near(model(x), plain(model, adapter, lambda: model(x)))


@every_shared
def test_forward_called_directly(made, key):
    """No hook is called then: nothing is shared, and nothing wrong."""
    model, adapter, x = make_pair(key)
    expected = plain_gradients(model, adapter, x)
    made.clear()
    loss = loss_of(model.forward(x))
    assert {kind for kind, _ in made} == {"own"}
    assert_same(gradients(adapter, loss), expected)
    for factor in adapter.parameters():
        factor.data.mul_(-1.25)
    with torch.no_grad():
        assert_near(model.forward(x), plain(model, adapter, lambda: model(x)))


class Leaving(nn.Module):
    """Blocks of which some are left out, left early, or called in vain."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.how = ""

    def forward(self, x):
        first, second = self.net.blocks
        if self.how == "dropped":
            return self.net.head(second(x))
        if self.how == "early":
            return self.net.head(first(x))
        if self.how == "in vain":
            first.q(x)
            y = first(x)
            second(y)
            return self.net.head(y)
        if self.how == "detached":
            return self.net.head(second(first(x).detach()))
        if self.how == "half without gradients":
            with torch.no_grad():
                x = first(x)
            return self.net.head(second(x))
        if self.how == "nested":
            self.how = "early"
            return self(x) + self.net.head(second(first(x)))
        return self.net(x)


LEAVINGS = ["dropped", "early", "in vain", "detached", "half without gradients", "nested", ""]


@pytest.mark.parametrize("how", LEAVINGS)
@every_shared
def test_layers_that_are_left_out(key, how):
    net, inner, x = make_pair(key)
    inner.detach()
    model = Leaving(net)
    spec = STAGES[key] if key in STAGES else SPECS[key]
    adapter = fill(slt.attach(model, spec, ["q", "v", "o"]))
    x.requires_grad_()

    def slopes(call):
        model.how = how
        named = {"x": x, **dict(adapter.named_parameters())}
        found = torch.autograd.grad(
            loss_of(call()), list(named.values()), allow_unused=True, materialize_grads=True
        )
        return dict(zip(named, found, strict=True))

    expected = slopes(lambda: plain(model, adapter, lambda: model(x)))
    assert_same(slopes(lambda: model(x)), expected)
    with torch.no_grad():
        model.how = how
        y = model(x)
        model.how = how
        assert_near(y, plain(model, adapter, lambda: model(x)))
    assert not kept(adapter)


@every_shared
def test_values_are_kept_over_calls_without_gradients(made, key):
    model, adapter, x = make_pair(key)
    expected = plain_gradients(model, adapter, x)
    y = model(x)
    made.clear()
    with adapter.shared():
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert_near(model(x), y)
                once = shared(made, key)
                assert once
                with adapter.shared():
                    assert_near(model(x), y)
                assert_near(model.forward(x), y)
                model.blocks[1].q(x)
                assert shared(made, key) == once
                with contextlib.suppress(RuntimeError):
                    model(x[..., 1:])
                assert_near(model(x), y)
                assert shared(made, key) == once
                made.clear()
        for _ in range(2):  # with gradients there is one graph a pass
            made.clear()
            assert_same(gradients(adapter, loss_of(model(x))), expected)
            assert len(shared(made, key)) == len(set(shared(made, key))) > 0
        for _ in range(2):  # and none for layers alone
            loss_of(model.blocks[0](x)).backward()
    assert not kept(adapter)
    taken(adapter)
    with torch.no_grad():
        for factor in adapter.parameters():
            factor.mul_(2)
        assert_near(model(x), plain(model, adapter, lambda: model(x)))


def test_a_block_that_keeps_values_ends_with_an_error():
    model, adapter, x = make_pair("fastfood")

    def fail():
        with adapter.shared(), torch.no_grad():
            model(x)
            assert kept(adapter)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not kept(adapter)
    assert adapter.blocks.scope.values() is None


def test_what_a_thread_keeps_no_other_reads():
    model, adapter, x = make_pair("fastfood")
    inside, done, found = threading.Event(), threading.Event(), []

    def other():
        with torch.no_grad(), adapter.shared():
            found.append(model(x))
            inside.set()
            assert done.wait(20)
            found.append(model(x))

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(20)
    with torch.no_grad():
        assert adapter.blocks.scope.values() is None
        for factor in adapter.parameters():
            factor.mul_(2)
        assert_near(model(x), plain(model, adapter, lambda: model(x)))
        assert not torch.allclose(model(x), found[0])
    done.set()
    thread.join()
    assert torch.equal(found[0], found[1])  # as it was told that factors would not change
    assert not kept(adapter)


@every_shared
def test_hooks_are_there_for_what_is_shared_alone(key):
    plain = make_net()
    slt.attach(plain, SPECS["lora"], ["q"])
    # Those that look for changed layers, and for weights that are read otherwise.
    assert len(plain._forward_pre_hooks) == len(plain._forward_hooks) == 1
    model, adapter, x = make_pair(key)
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 2
    base = make_net(dtype=torch.float64)
    adapter.detach()
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert not model._forward_hooks_always_called
    assert torch.equal(model(x), base(x))


@every_shared
def test_what_is_made_of_frozen_factors_has_no_gradient(monkeypatch, key):
    """Nor is one computed: nothing of the size of what is shared is written on the way back."""
    model, adapter, x = make_pair(key)
    adapter.requires_grad_(False)
    handed = []
    watch_kept(monkeypatch, lambda value: handed.append(value.requires_grad))
    x.requires_grad_()
    written = []
    for trained in (False, True):
        adapter.requires_grad_(trained)
        handed.clear()
        loss = loss_of(model(x))
        assert handed
        assert set(handed) == {trained}
        with Tracker() as tracker:
            (found,) = torch.autograd.grad(loss, [x], retain_graph=True)
            torch.autograd.grad(loss, [x, *adapter.parameters()][: 1 + trained * 99])
        written.append(tracker.written)
        (expected,) = torch.autograd.grad(loss_of(plain(model, adapter, lambda: model(x))), [x])
        assert_near(found, expected)
    assert written[0] < written[1]


def test_two_adapters_of_one_model():
    model, adapter, x = make_pair("fastfood")
    other = attach_filled(model, "fastfood-cut", name="other", seed=7)
    expected = make_net(dtype=torch.float64)
    with torch.no_grad():
        for name in adapter.plan.shapes:
            expected.get_submodule(name).weight += adapter.delta(name) + other.delta(name)
    y = model(x)
    assert_near(y, expected(x))
    loss_of(y).backward()
    assert all(p.grad.abs().max() > 0 for a in (adapter, other) for p in a.parameters())


@every_shared
@pytest.mark.parametrize("second", ["one-hot", "fastfood"])
def test_two_adapters_share_nothing_with_each_other(key, second):
    model, adapter, x = make_pair(key)
    other = attach_filled(model, second, name="other", seed=7)
    adapter.applied = other.applied = "formed"
    # The same adapter alone, on weights that have the other's update.
    base, alone, _ = make_pair(key)
    with torch.no_grad():
        for name in other.plan.shapes:
            base.get_submodule(name).weight += other.delta(name)
    expected = loss_of(plain(base, alone, lambda: base(x)))
    found = loss_of(model(x))
    assert_near(found, expected)
    got = gradients(adapter, found)
    for name, gradient in gradients(alone, expected).items():
        assert_near(got[name], gradient)


def test_a_mixed_block_is_an_operand_of_a_map_that_multiplies():
    """F_in makes the coefficients of several layers, each of which is read in its own shape."""
    spec = sl.Spec(
        rank=2, map=maps.Fourier(), fold="balanced", ratio=0.1,
        factor_map=maps.Fastfood(), factor_size=40,
    )  # fmt: skip
    model = make_net(dtype=torch.float64)
    adapter = fill(slt.attach(model, spec, ["q", "v", "o"]))
    x = make_input(dtype=torch.float64)
    adapter.applied = "formed"
    formed = loss_of(model(x))
    expected = gradients(adapter, formed)
    adapter.applied = "factored"
    found = loss_of(model(x))
    assert_near(found, formed)
    for name, gradient in gradients(adapter, found).items():
        assert_near(gradient, expected[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_in_forward_or_backward(dtype):
    model = make_net()
    adapter = attach_filled(model, "fastfood")
    x = make_input()
    expected = plain_gradients(model, adapter, x)
    for backward in (False, True):
        with torch.autocast("cpu", dtype):
            loss = loss_of(model(x).float())
            found = gradients(adapter, loss) if backward else None
        found = found or gradients(adapter, loss)
        for name, gradient in expected.items():
            assert found[name].dtype == torch.float32
            assert (found[name] - gradient).norm() <= 0.05 * gradient.norm()


def test_memory_given_later_is_filled():
    model = make_net()
    adapter = fill(slt.attach(model, SPECS["fastfood"], targets_of("fastfood")))
    x = make_input()
    model(x)
    model.to("meta")
    assert model(x.to("meta")).shape == (2, 5, 3)
    model.to_empty(device="cpu")
    assert sorted(factor.abs().max() > 0 for factor in adapter.parameters()) == [False, True]


def test_a_map_of_slices_is_not_shared(made):
    spec = sl.Spec(rank=2, groups=1, fold="balanced", map=maps.Gaussian(), ratio=0.3)
    model = make_net()
    slt.attach(model, spec, ["q", "v", "o"])
    assert len(model._forward_pre_hooks) == 1  # which looks for changed layers
    made.clear()
    model(make_input())
    assert {kind for kind, _ in made} == {"own"}
