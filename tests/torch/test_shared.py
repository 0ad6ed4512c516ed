"""One vector for all layers that are cut from it: right in any use, and not kept for long."""

import concurrent.futures
import copy
import gc
import io
import sys
import weakref
from unittest import mock

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import superlora as sl
import superlora.torch as slt
from superlora import maps
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
    targets_of,
)

# By the kinds of what is shared.
STAGES = {
    "vector": SPECS["fastfood"],
    "rows": sl.Spec(rank=1, groups=1, fold="aligned", scale=0.7),
    "modes": sl.Spec(rank=2, order=3, groups=1, fold="aligned", map=maps.Separable(), ratio=0.5),
    "modes+rows": sl.Spec(rank=1, groups=1, fold="aligned", map=maps.Separable(), ratio=0.5),
}


# One vector, several with cut weights, and one that a map makes of all groups.
every_shared = pytest.mark.parametrize(
    "key", ["fastfood", "fastfood-cut", "shuffle-all", "one-hot", *STAGES]
)


def make_pair(key):
    model = make_net(dtype=torch.float64)
    if key in STAGES:
        adapter = fill(slt.attach(model, STAGES[key], ["q", "v", "o"]))
    else:
        adapter = attach_filled(model, key)
    return model, adapter, make_input(dtype=torch.float64)


def plain_gradients(model, adapter, x):
    return gradients(adapter, loss_of(plain_forward(model, adapter, lambda: model(x))))


def assert_same(found, expected, times=1.0):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_near(found[name], times * gradient)


def kept(adapter):
    """List the vectors' pieces that an adapter holds."""
    return [part for made in adapter._sources.shared._made.values() for part in made.parts]


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


@every_shared
def test_a_step_between_forward_and_backward_is_refused(key):
    model, adapter, x = make_pair(key)
    loss = loss_of(model(x))
    with torch.no_grad():
        next(adapter.parameters()).add_(1)
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
        assert_near(model(x), plain_forward(model, adapter, lambda: model(x)))
    assert_same(gradients(adapter, loss_of(model(x))), plain_gradients(model, adapter, x))
    for factor in adapter.parameters():
        factor.data = factor.data.float()
    assert_near(model(x), plain_forward(model, adapter, lambda: model(x)), torch.float32)


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


@every_shared
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
def test_no_vector_outlives_its_use(key):
    """A graph that holds itself is seen by no collector: one vector a step would be left."""
    model, adapter, x = make_pair(key)
    alive = []

    def watch():
        assert kept(adapter)
        alive.extend(map(weakref.ref, kept(adapter)))

    for _ in range(3):
        loss = loss_of(model(x))
        watch()
        loss.backward()
        del loss
        assert not kept(adapter)  # its gradients were taken
    for _ in range(3):
        model(x)  # no gradients are taken
        watch()
        with torch.no_grad():
            model(x)
            watch()
    model(x)
    here = kept(adapter)
    gc.collect()
    assert sum(part() is not None for part in alive) == 0
    del here


@every_shared
def test_neither_merging_nor_forming_leaves_a_vector(key):
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
    model, adapter, x = make_pair(key)
    loss = loss_of(model(x))
    if backward:
        loss.backward()
    found = weakref.ref(model), weakref.ref(adapter)
    del model, adapter, loss
    gc.collect()
    assert [reference() for reference in found] == [None, None]


@every_shared
def test_copies_have_no_vectors(key):
    model, adapter, x = make_pair(key)
    y = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert not kept(copied.superlora)
        assert_near(copied(x), y)
        loss_of(copied(x)).backward()
    assert kept(adapter)
    assert all(factor.grad is None for factor in adapter.parameters())


@pytest.mark.parametrize("value", [1.0, float("nan")])
@pytest.mark.parametrize("key", ["fastfood", "shuffle-all"])
def test_the_vector_is_formed_once_for_all_layers(key, value):
    model, adapter, x = make_pair(key)
    with torch.no_grad():
        next(adapter.parameters()).fill_(value)
    kind = type(SPECS[key].map)
    with mock.patch.object(kind, "_forward", autospec=True, side_effect=kind._forward) as formed:
        model(x)
        model(x)
        assert formed.call_count == 1
        with torch.no_grad():
            model(x)
            model(x)
        assert formed.call_count == 2
        adapter.deltas()
        assert formed.call_count == 3


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


@pytest.mark.parametrize("key", STAGES)
def test_what_is_shared_does_not_hold_the_adapter(key):
    """As the graph, which is held by what is cached, refers to it."""
    model = make_net()
    adapter = fill(slt.attach(model, STAGES[key], ["q", "v", "o"]))
    model(make_input())
    assert {kind for kind, _ in adapter._sources.shared._made} == set(key.split("+"))
    found = weakref.ref(adapter)
    del model, adapter
    gc.collect()
    assert found() is None


def test_memory_given_later_is_filled():
    model = make_net()
    adapter = fill(slt.attach(model, SPECS["fastfood"], targets_of("fastfood")))
    x = make_input()
    model(x)
    model.to("meta")
    assert model(x.to("meta")).shape == (2, 5, 3)
    model.to_empty(device="cpu")
    assert sorted(factor.abs().max() > 0 for factor in adapter.parameters()) == [False, True]


def test_a_map_of_slices_is_not_shared():
    spec = sl.Spec(rank=2, groups=1, fold="balanced", map=maps.Gaussian(), ratio=0.3)
    model = make_net()
    adapter = slt.attach(model, spec, ["q", "v", "o"])
    model(make_input())
    assert not adapter._sources.shared._made
