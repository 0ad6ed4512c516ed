"""What the layers' outputs and gradients owe to the rest of torch: changes in place, compilers,
gradients of gradients, and threads."""

import threading

import pytest
import torch
from torch import nn

import superlora as sl
import superlora.torch as slt
from superlora.torch import update
from tests.torch.helpers import (
    KINDS,
    SPECS,
    WIDTH,
    assert_near,
    fill,
    loss_of,
    make_input,
    make_net,
    plain_forward,
    seeded,
    slow_but,
    targets_of,
)
from tests.torch.support_cases import DESIGNS, attach_small, every_design, make_model, plain_call
from tests.torch.test_applied import EVERY, every_way, forward_mode, make_pair

# torch's own tracer does what its own warning forbids.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
INPUTS = {"one axis": (8,), "rows": (5, 8), "batch": (2, 3, 8)}
every_input = pytest.mark.parametrize("shape", INPUTS.values(), ids=INPUTS)


@every_input
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("key", "way"), [(key, way) for key, way in EVERY if key in KINDS])
def test_an_output_may_be_changed_in_place(key, way, bias, shape):
    def loss(inplace):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8, bias=bias), nn.ReLU(inplace=inplace))
        adapter = fill(slt.attach(model, SPECS[key], ["0"], apply=way))
        model(torch.linspace(-1, 1, 8).expand(shape)).sum().backward()
        return [factor.grad for factor in adapter.parameters()]

    for found, expected in zip(loss(True), loss(False), strict=True):
        assert_near(found, expected)


def used_leaves(model, adapter, x):
    """Return inputs and factors that want a gradient and are of use to the model's output."""
    named = [x, *adapter.parameters()]
    slopes = torch.autograd.grad(model(x).sum(), named, allow_unused=True)
    return [leaf for leaf, slope in zip(named, slopes, strict=True) if slope is not None]


def penalty_of(y, leaves, create_graph=True):
    """Return what depends on gradients, each of them with a weight of its own."""
    slopes = torch.autograd.grad(loss_of(y), leaves, create_graph=create_graph)
    return sum((1 + place) * loss_of(slope) for place, slope in enumerate(slopes))


def assert_same(found, expected, tolerance=1e-11):
    largest = max(gradient.abs().max() for gradient in expected)
    assert largest > 0
    for own, gradient in zip(found, expected, strict=True):
        assert (own - gradient).abs().max() <= tolerance * largest


@every_way
def test_gradients_of_gradients_are_those_of_plain_autograd(key, way):
    """Of a whole model, whose layers share what they can."""
    model, adapter, x = make_pair(key, way)
    leaves = used_leaves(model, adapter, x)
    assert len(leaves) > 1
    y = plain_forward(model, adapter, lambda: model(x))
    expected = torch.autograd.grad(penalty_of(y, leaves), leaves)
    y = model(x)
    assert_same(torch.autograd.grad(penalty_of(y, leaves), leaves), expected)


@pytest.mark.parametrize("key", ["lora", "dense", "tinylora-tied"])
def test_a_base_weight_that_is_trained_too(key):
    """In a layer that is called twice, so that its inputs depend on its weight."""
    model, adapter, x = make_pair(key, "auto")
    for block in model.blocks:
        block.o.weight.requires_grad_()
    block = model.blocks[0]

    def twice(x):
        return block(block(x))

    leaves = [*used_leaves(twice, adapter, x), block.o.weight]
    expected = torch.autograd.grad(
        penalty_of(plain_forward(model, adapter, lambda: twice(x)), leaves), leaves
    )
    assert_same(torch.autograd.grad(penalty_of(twice(x), leaves), leaves), expected)


@pytest.mark.parametrize(
    ("key", "way"),
    [
        pytest.param(key, way, marks=[] if key in KINDS else pytest.mark.slow, id=f"{key}-{way}")
        for key, way in EVERY
    ],
)
def test_gradients_of_gradients_against_finite_differences(key, way):
    model, adapter, _ = make_pair(key, way)
    x = make_input(2, dtype=torch.float64).requires_grad_()
    leaves = used_leaves(model, adapter, x)
    assert torch.autograd.gradgradcheck(lambda x, *_: model(x), leaves, fast_mode=True)


@pytest.mark.parametrize(("key", "way"), [(key, way) for key, way in EVERY if key in KINDS])
def test_every_gradient_of_a_gradient_against_finite_differences(key, way):
    """One by one, not along a random direction; of two layers that are called on their own."""
    model, adapter, _ = make_pair(key, way)
    x = make_input(2, dtype=torch.float64).requires_grad_()
    block = model.blocks[1]

    def product(x, *_):
        return block.q(x) * block.v(x)

    leaves = used_leaves(lambda x: product(x), adapter, x)
    assert torch.autograd.gradgradcheck(product, leaves)


@pytest.mark.parametrize(("key", "way"), [(key, way) for key, way in EVERY if key in KINDS])
def test_third_derivatives(key, way):
    model, adapter, x = make_pair(key, way)
    leaves = used_leaves(model, adapter, x)

    def third(y):
        slopes = torch.autograd.grad(penalty_of(y, leaves), leaves, create_graph=True)
        return torch.autograd.grad(sum(map(loss_of, slopes)), leaves)

    expected = third(plain_forward(model, adapter, lambda: model(x)))
    assert_same(third(model(x)), expected)


@every_design
def test_gradients_of_gradients_of_merge_operations(key):
    model = make_model(dtype=torch.float64)
    adapter = attach_small(model, key)
    x = make_input(2, dtype=torch.float64).requires_grad_()
    leaves = used_leaves(model, adapter, x)
    assert len(leaves) > 1
    y = plain_call(model, [adapter], lambda: model(x))
    expected = torch.autograd.grad(penalty_of(y, leaves), leaves)
    assert_same(torch.autograd.grad(penalty_of(model(x), leaves), leaves), expected)


@pytest.mark.parametrize("key", slow_but(["ssf", "bias in one group"], DESIGNS))
def test_gradients_of_gradients_of_merge_operations_against_finite_differences(key):
    model = make_model(dtype=torch.float64)
    adapter = attach_small(model, key)
    x = make_input(2, dtype=torch.float64).requires_grad_()
    leaves = used_leaves(model, adapter, x)
    assert torch.autograd.gradgradcheck(lambda x, *_: model(x), leaves, fast_mode=True)


@pytest.mark.parametrize("applied", ["factored", "formed"])
@pytest.mark.parametrize(
    "key",
    slow_but(
        ["add_weight", "right_weight", "left_weight"],
        ["add_weight", "right_weight", "left_weight", "glora, matrix"],
    ),
)
def test_gradients_of_gradients_of_merge_operations_in_each_way(key, applied):
    model = make_model(dtype=torch.float64)
    adapter = attach_small(model, key, apply=applied)
    x = make_input(2, dtype=torch.float64).requires_grad_()
    leaves = used_leaves(model, adapter, x)
    assert torch.autograd.gradgradcheck(lambda x, *_: model(x), leaves, fast_mode=True)


def test_a_wrong_gradient_of_a_gradient_is_noticed(monkeypatch):
    """Of a backward pass that is right, but is no function of its inputs for autograd."""
    right = update._differentiable

    def first_only(ctx, gradient, before):
        found = right(ctx, gradient, before)
        return [each if each is None else each.detach() for each in found]

    model, adapter, x = make_pair("lora", "factored")
    leaves = used_leaves(model, adapter, x)
    monkeypatch.setattr(update, "_differentiable", first_only)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(penalty_of(model.blocks[0].q(x), [x]), [x])
    leaves = [leaf for leaf in leaves if leaf is not x]
    assert not torch.autograd.gradgradcheck(
        lambda *_: model(x), leaves, fast_mode=True, raise_exception=False
    )


@every_way
def test_a_backward_pass_that_will_be_differentiated_gives_the_same(key, way):
    """First derivatives are those of the pass that keeps little."""
    model, adapter, x = make_pair(key, way)
    leaves = used_leaves(model, adapter, x)
    expected = torch.autograd.grad(loss_of(model(x)), leaves)
    for create_graph in (True, False):
        loss = loss_of(model(x))
        assert_same(torch.autograd.grad(loss, leaves, create_graph=create_graph), expected)


@forward_mode
@every_way
def test_hessian_vector_products(key, way):
    """Forward mode over reverse mode, and twice reverse mode."""
    model, _, x = make_pair(key, way)
    factors = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    with seeded(3):
        along = {n: torch.randn_like(p) for n, p in factors.items()}
    x = x.detach()

    def loss(factors):
        return loss_of(torch.func.functional_call(model, factors, (x,)))

    found = torch.func.jvp(torch.func.grad(loss), (factors,), (along,))[1]
    leaves = {n: p for n, p in model.named_parameters() if p.requires_grad}
    slopes = torch.autograd.grad(
        loss_of(model(x)),
        list(leaves.values()),
        create_graph=True,
        materialize_grads=True,
        allow_unused=True,
    )
    total = sum((slope * along[n]).sum() for n, slope in zip(leaves, slopes, strict=True))
    expected = torch.autograd.grad(
        total, list(leaves.values()), materialize_grads=True, allow_unused=True
    )
    assert_same(list(found.values()), expected)


@forward_mode
@pytest.mark.parametrize("key", [*KINDS, "fastfood", "one-hot", "dense"])
def test_hessians(key):
    model, adapter, _ = make_pair(key, "auto")
    x = make_input(2, dtype=torch.float64)
    name, factor = next(iter(adapter.named_parameters()))
    start = factor.detach().clone()

    def loss(own):
        return loss_of(torch.func.functional_call(model, {f"superlora.{name}": own}, (x,)))

    found = torch.func.hessian(loss)(start).reshape(start.numel(), -1)
    assert found.abs().max() > 0
    assert_near(found, found.T)
    rows = []
    slope = torch.autograd.grad(loss_of(model(x)), factor, create_graph=True)[0].reshape(-1)
    for each in slope:
        rows.append(torch.autograd.grad(each, factor, retain_graph=True)[0].reshape(-1))
    assert_near(found, torch.stack(rows))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "key",
    slow_but(
        ["said", "cut", "dense"],
        ["said", "one-group", "cut", "fastfood-stacked", "dense", "one-hot"],
    ),
)
def test_inference_compiles(key, mode):
    torch._dynamo.reset()
    model = make_net(depth=1, dtype=torch.float64)
    adapter = fill(slt.attach(model, SPECS[key], targets_of(key)))
    x = torch.randn(2, 5, model.blocks[0].q.in_features, dtype=torch.float64)
    with mode():
        expected = model(x)
        found = torch.compile(model, fullgraph=True, backend="eager")(x)
    assert_near(found, expected)
    assert adapter.active


def test_rows_are_those_of_the_thread_that_asked():
    model = nn.Linear(4, 4)
    for index, name in enumerate(("one", "other")):
        fill(slt.attach(model, sl.lora(1), name=name), seed=index)
    x = torch.randn(3, 4)
    with slt.rows(model, ["one"] * 3):
        expected = model(x)
    inside, done, found = threading.Event(), threading.Event(), []

    def other():
        with slt.rows(model, ["other"] * 3):
            inside.set()
            assert done.wait(20)

    thread = threading.Thread(target=other)
    with slt.rows(model, ["one"] * 3):
        thread.start()
        assert inside.wait(20)
        found.append(model(x))
    found.append(model(x))  # with all adapters, as outside of any block
    done.set()
    thread.join()
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], model(x))
    assert not torch.allclose(found[1], expected)


def test_decisions_are_not_kept_for_every_length():
    model, adapter, _ = make_pair("lora", "auto")
    before = len(vars(adapter))
    for tokens in range(1, 9):
        model(torch.zeros(1, tokens, WIDTH, dtype=torch.float64))
    held = [value for value in vars(adapter).values() if isinstance(value, dict)]
    assert len(vars(adapter)) == before
    assert max(map(len, held), default=0) <= len(adapter.plan.shapes)


@pytest.mark.parametrize("key", ["dense", "fastfood", "lora", "one-hot"])
def test_an_update_is_the_callers_own(key):
    """Also where it is a factor itself, or a piece of what other layers are made of."""
    _, adapter, _ = make_pair(key, "auto")
    name = next(iter(adapter.plan.shapes))
    expected = adapter.delta(name)
    with torch.no_grad():
        adapter.delta(name).add_(1)
        assert torch.equal(adapter.delta(name), expected)


def test_a_way_is_chosen_where_a_file_is_loaded(tmp_path):
    model, adapter, x = make_pair("lora", "auto")
    y = model(x)
    adapter.save(tmp_path / "a.safetensors")
    adapter.detach()
    with pytest.raises(ValueError, match="apply must be one of"):
        slt.load(model, tmp_path / "a.safetensors", apply="quickly")
    loaded = slt.load(model, tmp_path / "a.safetensors", apply="formed")
    assert loaded.applied == "formed"
    assert_near(model(x), y)
