"""torch.compile(fullgraph=True) gives the same outputs and gradients, without a graph break.

What is trained goes through "aot_eager", which traces the backward pass too. For time the default
run traces one layer of some specs, and the slow one a layer of each spec, and whole models.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import superlora.torch as slt
from tests.torch.helpers import (
    KINDS,
    SPECS,
    assert_near,
    attach_filled,
    every_spec,
    gradients,
    loss_of,
    make_input,
    make_net,
    slow_but,
    some_specs,
)

# torch's own tracer does what its own warnings forbid.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:no Kronecker structure:UserWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, backend="eager", **options):
    return torch.compile(model, fullgraph=True, backend=backend, **options)


def assert_compiles(call, adapter, backend="eager", **options):
    """Compare outputs and gradients with eager ones; from step to step nothing is traced again."""
    x = make_input(dtype=torch.float64).requires_grad_()
    run = compiled(call, backend, **options)

    def compare():
        found, expected = run(x), call(x)
        assert_near(found, expected)
        own = step_of(adapter, x, expected)
        for name, gradient in step_of(adapter, x, found).items():
            assert_near(gradient, own[name])
        return expected

    first = compare()
    with torch.compiler.set_stance("fail_on_recompile"):
        with torch.no_grad():
            for factor in adapter.parameters():
                factor.mul_(1.25)
        second = compare()
        adapter.scale = -0.5 * adapter.scale
        third = compare()
    assert not torch.allclose(first, second)
    assert not torch.allclose(second, third)


def step_of(adapter, x, y):
    """Return the gradients of inputs and factors."""
    named = {"x": x, **dict(adapter.named_parameters())}
    loss = loss_of(y)
    found = torch.autograd.grad(
        loss, list(named.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(named, found, strict=True))


def depth_of(key):
    whole = SPECS[key].groups == 1 and isinstance(SPECS[key].fold, tuple)  # for two blocks
    return 2 if whole else 1


@pytest.mark.parametrize("key", slow_but({*KINDS, "dense", "cut", "fastfood"}, SPECS))
def test_compiled_layer_trains_as_eager(key):
    """Each spec goes its own way in one layer."""
    model = make_net(depth=depth_of(key), dtype=torch.float64)
    adapter = attach_filled(model, key)
    assert_compiles(model.blocks[0].q, adapter, "aot_eager")


@pytest.mark.slow
@every_spec
def test_compiled_model_trains_as_eager(key):
    model = make_net(depth=depth_of(key), dtype=torch.float64)
    assert_compiles(model, attach_filled(model, key), "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("key", ["lora", "lorta"])
def test_model_compiled_to_machine_code_trains_as_eager(key):
    model = make_net(depth=1, dtype=torch.float64)
    assert_compiles(model, attach_filled(model, key), "inductor")


FRESH = """
import torch
from tests.torch.helpers import attach_filled, loss_of, make_input, make_net

model = make_net(depth=1)
attach_filled(model, "dense")
call = torch.compile(model.blocks[0].q, fullgraph=True, backend="aot_eager")
loss_of(call(make_input())).backward()
with torch.compiler.set_stance("fail_on_recompile"):
    loss_of(call(make_input())).backward()
"""


def test_the_first_step_of_a_process_is_compiled_once():
    """Whatever is loaded or remembered at first use is so before anything is traced."""
    command = [sys.executable, "-W", "ignore", "-c", FRESH]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("applied", ["factored", "formed"])
@pytest.mark.parametrize("key", ["lora", "lokr", "fourierft"])
def test_either_way_of_applying_compiles(key, applied):
    model = make_net(depth=1, dtype=torch.float64)
    adapter = attach_filled(model, key, apply=applied)
    assert_compiles(model.blocks[0].q, adapter, "aot_eager")


@pytest.mark.parametrize("key", ["lora", "lokr", "dense", "lorta"])
def test_any_number_of_tokens_is_compiled_once(key):
    model = make_net(depth=1, dtype=torch.float64)
    attach_filled(model, key)
    q = model.blocks[0].q
    call = compiled(q, "aot_eager")
    sizes = [make_input(size, seed=size, dtype=torch.float64) for size in (6, 9, 4)]
    torch._dynamo.mark_dynamic(sizes[0], 0)
    assert_near(call(sizes[0]), q(sizes[0]))
    with torch.compiler.set_stance("fail_on_recompile"):
        for x in sizes[1:]:
            assert_near(call(x), q(x))


@pytest.mark.parametrize("key", ["lora", "cut"])
def test_other_numbers_of_tokens_are_compiled(key):
    """As they come, without a word to the compiler."""
    model = make_net(depth=1, dtype=torch.float64)
    adapter = attach_filled(model, key)
    q = model.blocks[0].q
    call = compiled(q, "aot_eager")
    for size in (6, 9, 4):
        x = make_input(size, dtype=torch.float64)
        expected = q(x)
        found = call(x)
        assert_near(found, expected)
        slopes = gradients(adapter, loss_of(expected))
        for name, gradient in gradients(adapter, loss_of(found)).items():
            assert_near(gradient, slopes[name])


@pytest.mark.parametrize("key", ["lora", "cut"])
def test_checkpoints_within_compiled_code(key):
    model = make_net(depth=1, dtype=torch.float64)
    adapter = attach_filled(model, key)

    def call(x):
        return checkpoint(model.blocks[0].q, x, use_reentrant=False)

    assert_compiles(call, adapter, "aot_eager")


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
