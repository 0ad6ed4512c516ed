"""What the layers' outputs and gradients owe to the rest of torch: changes in place, compilers,
gradients of gradients, and threads."""

import threading

import pytest
import torch
from torch import nn

import superlora as sl
import superlora.torch as slt
from tests.torch.helpers import SPECS, WIDTH, assert_near, fill, make_net, targets_of
from tests.torch.test_applied import EVERY, KINDS, make_pair

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


# First derivatives alone: of what is formed, of spectra, and of what layers share.
ONCE = {
    "formed": ("lora", "formed"),
    "dense": ("dense", "auto"),
    "spectra": ("fourierft", "factored"),
    "one-hot": ("one-hot", "auto"),
    "vector": ("fastfood", "auto"),
}


@pytest.mark.parametrize(("key", "way"), ONCE.values(), ids=ONCE)
@pytest.mark.parametrize("of", ["inputs", "factors"])
def test_a_gradient_of_the_gradient_is_refused_whatever_is_asked_for(key, way, of):
    """Also where a path from one to the other passes what torch itself guards by."""
    model, adapter, x = make_pair(key, way)
    factors = list(adapter.parameters())
    asked = [x] if of == "inputs" else factors
    slopes = torch.autograd.grad(
        model(x).square().sum(), asked, create_graph=True, allow_unused=True
    )
    penalty = sum(slope.square().sum() for slope in slopes if slope is not None)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(penalty, factors, allow_unused=True)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "key", ["said", "one-group", "cut", "fastfood-stacked", "dense", "one-hot"]
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
