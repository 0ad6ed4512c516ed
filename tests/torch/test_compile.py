"""torch.compile(fullgraph=True) gives the same outputs and gradients, without a graph break."""

from collections.abc import Iterator

import pytest
import torch

import superlora.torch as slt
from tests.torch.helpers import (
    SPECS,
    assert_near,
    attach_filled,
    every_spec,
    gradients,
    loss_of,
    make_input,
    make_net,
    some_specs,
)

# torch's own tracer does what its own warning forbids.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:no Kronecker structure:UserWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model):
    return torch.compile(model, fullgraph=True, backend="eager")


def assert_compiles(call, adapter):
    x = make_input(dtype=torch.float64)
    expected = call(x)
    y = compiled(call)(x)
    assert_near(y, expected)
    found = gradients(adapter, loss_of(y))
    for name, gradient in gradients(adapter, loss_of(expected)).items():
        assert_near(found[name], gradient)


@every_spec
def test_compiled_layer_equals_eager(key):
    """One layer alone is traced, for time; each spec goes its own way in it."""
    whole = SPECS[key].groups == 1 and isinstance(SPECS[key].fold, tuple)  # for two blocks
    model = make_net(depth=2 if whole else 1, dtype=torch.float64)
    assert_compiles(model.blocks[0].q, attach_filled(model, key))


@pytest.mark.parametrize(
    ("key", "layer"), [("lora", "conv1d"), ("dense", "bias"), ("cut", "conv1d")]
)
def test_compiled_model_equals_eager(key, layer):
    model = make_net(layer, depth=1, dtype=torch.float64)
    assert_compiles(model, attach_filled(model, key))


@some_specs
def test_compiled_model_sees_state_changes(key):
    """Nothing of the adapter's state is frozen into the compiled code."""
    model = make_net(depth=1, dtype=torch.float64)
    x = make_input(dtype=torch.float64)
    base = model(x)
    adapter = attach_filled(model, key)
    call = compiled(model)
    adapted = model(x)
    assert_near(call(x), adapted)
    with adapter.disabled():
        assert torch.equal(call(x), base)
    adapter.merge()
    assert_near(call(x), adapted)
    adapter.unmerge()
    adapter.scale = 2 * adapter.scale
    doubled = model(x)
    assert not torch.allclose(doubled, adapted)
    assert_near(call(x), doubled)
    adapter.detach()
    assert torch.equal(call(x), base)


def test_model_compiled_before_attach_is_adapted():
    model = make_net(depth=1, dtype=torch.float64)
    x = make_input(dtype=torch.float64)
    call = compiled(model)
    base = call(x)
    attach_filled(model, "lora")
    assert_near(call(x), model(x))
    assert not torch.allclose(call(x), base)


def test_two_adapters_compile():
    model = make_net(depth=1, dtype=torch.float64)
    x = make_input(dtype=torch.float64)
    for key in ("lora", "dense", "lorta"):
        attach_filled(model, key, name=key)
    assert_near(compiled(model)(x), model(x))


@some_specs
def test_exported_program_gives_the_same_output(key):
    model = make_net(depth=1, dtype=torch.float64)
    slt.attach(model, SPECS[key])
    attach_filled(model, key, name="second")
    x = make_input(dtype=torch.float64)
    program = torch.export.export(model, (x,))
    assert_near(program.module()(x), model(x))
