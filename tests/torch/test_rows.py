"""`rows`: each row of a batch goes through the adapter that it names, and through no other."""

import gc
import sys

import pytest
import torch
from torch import nn

import superlora as sl
import superlora.torch as slt
from tests.torch.helpers import (
    assert_near,
    attach_filled,
    every_layer,
    every_spec,
    fill,
    loss_of,
    make_input,
    make_net,
    make_outer,
    slow_but,
    some_specs,
    unchanged,
)

NAMES = ["french", None, "german", "french"]


def three(model, key):
    """Attach adapters of a spec, another one and another scale; the third is never used."""
    found = {
        "french": attach_filled(model, key, name="french", seed=2),
        "german": attach_filled(model, "cut", name="german", seed=3),
        "unused": attach_filled(model, "lora", name="unused", seed=4),
    }
    found["german"].scale = -0.4
    return found


def one_by_one(model, adapters, x, names):
    """Compute every row alone, all adapters but its own disabled."""
    outputs = []
    for row, name in zip(x, names, strict=True):
        others = [adapter for key, adapter in adapters.items() if key != name]
        with contexts(others):
            outputs.append(model(row.unsqueeze(0)))
    return torch.cat(outputs)


def contexts(adapters):
    from contextlib import ExitStack

    stack = ExitStack()
    for adapter in adapters:
        stack.enter_context(adapter.disabled())
    return stack


@every_spec
def test_equals_one_by_one(key):
    model = make_net(dtype=torch.float64)
    adapters = three(model, key)
    x = make_input(4, 5, dtype=torch.float64)
    with slt.rows(model, NAMES):
        y = model(x)
    assert_near(y, one_by_one(model, adapters, x, NAMES))


@every_layer
@pytest.mark.parametrize("shape", [(4,), (4, 3, 2)], ids=["no tokens", "two axes of tokens"])
def test_layers_and_shapes_of_inputs(layer, shape):
    model = make_net(layer, dtype=torch.float64)
    adapters = three(model, "lora")
    x = make_input(*shape, dtype=torch.float64)
    with slt.rows(model, NAMES):
        y = model(x)
    assert_near(y, one_by_one(model, adapters, x, NAMES))


@pytest.mark.parametrize("names", [["french"] * 4, [None] * 4, ["german", "french"] * 2], ids=str)
@some_specs
def test_batches_of_one_adapter_or_none(key, names):
    model = make_net(dtype=torch.float64)
    adapters = three(model, key)
    x = make_input(4, 5, dtype=torch.float64)
    with slt.rows(model, names):
        y = model(x)
    assert_near(y, one_by_one(model, adapters, x, names))


@some_specs
def test_rows_of_none_are_the_base_bit_for_bit(key):
    model = make_net()
    x = make_input(4, 5)
    base = model(x)
    three(model, key)
    with slt.rows(model, NAMES):
        assert torch.equal(model(x)[1], base[1])


@some_specs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(key, dtype):
    model = make_net(dtype=dtype)
    adapters = three(model, key)
    x = make_input(4, 5, dtype=dtype)
    with slt.rows(model, NAMES):
        y = model(x)
    assert y.dtype == dtype
    assert_near(y, one_by_one(model, adapters, x, NAMES), torch.bfloat16)


@some_specs
def test_autocast(key):
    model = make_net()
    adapters = three(model, key)
    x = make_input(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        with slt.rows(model, NAMES):
            y = model(x)
        expected = one_by_one(model, adapters, x, NAMES)
    assert y.dtype == torch.bfloat16
    assert_near(y, expected)


@every_spec
def test_gradients_are_those_of_the_rows(key):
    model = make_net(dtype=torch.float64)
    adapters = three(model, key)
    x = make_input(4, 5, dtype=torch.float64, seed=6).requires_grad_()
    wanted = [x, *(p for adapter in adapters.values() for p in adapter.parameters())]

    def gradients_of(y):
        return torch.autograd.grad(loss_of(y), wanted, materialize_grads=True, allow_unused=True)

    with slt.rows(model, NAMES):
        y = model(x)
    expected = gradients_of(one_by_one(model, adapters, x, NAMES))
    for found, gradient in zip(gradients_of(y), expected, strict=True):
        assert_near(found, gradient)


def test_layers_that_only_some_adapters_have():
    model = make_net(dtype=torch.float64)
    adapters = {
        "french": fill(slt.attach(model, sl.lora(2), ["q"], name="french")),
        "german": fill(slt.attach(model, sl.dense(), ["blocks.1.v", "head"], name="german"), 3),
    }
    x = make_input(4, 5, dtype=torch.float64)
    with slt.rows(model, NAMES):
        y = model(x)
    assert_near(y, one_by_one(model, adapters, x, NAMES))


def test_a_layer_that_another_library_has_wrapped():
    model = make_net(dtype=torch.float64)
    layer = model.blocks[0].q
    plain = layer.forward
    layer.forward = lambda input: plain(input) + 1
    adapters = three(model, "dense")
    inner = model.blocks[1].v.forward
    model.blocks[1].v.forward = lambda input: 2 * inner(input)
    x = make_input(4, 5, dtype=torch.float64)
    with slt.rows(model, NAMES):
        y = model(x)
    assert_near(y, one_by_one(model, adapters, x, NAMES))


def test_a_model_within_a_model():
    model = make_outer(dtype=torch.float64)
    adapters = {
        "french": attach_filled(model.inner, "lora", name="french"),
        "german": fill(slt.attach(model, sl.lora(1), ["q", "extra"], name="german"), 3),
    }
    x = make_input(4, 5, dtype=torch.float64)
    with slt.rows(model, NAMES):
        y = model(x)
    assert_near(y, one_by_one(model, adapters, x, NAMES))


def test_a_container():
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    adapters = {
        name: fill(slt.attach(model, sl.lora(1), name=name), seed)
        for seed, name in enumerate(("french", "german"))
    }
    x = make_input(4, dtype=torch.float64)
    with slt.rows(model, NAMES):
        y = model(x)
    assert_near(y, one_by_one(model, adapters, x, NAMES))


def test_other_models_are_left_alone():
    model, other = make_net(), make_net()
    three(model, "lora")
    attach_filled(other, "lora")
    x = make_input(3, 5)
    expected = other(x)
    with slt.rows(model, NAMES):
        assert torch.equal(other(x), expected)


@some_specs
def test_all_is_as_before_after_the_block(key):
    model = make_net()
    three(model, key)
    x = make_input(4, 5)
    expected = model(x)
    with slt.rows(model, NAMES):  # what layers work out once and keep
        model(x)
    with unchanged(model):
        with slt.rows(model, NAMES):
            model(x)
        with pytest.raises(KeyboardInterrupt), slt.rows(model, NAMES):
            raise KeyboardInterrupt
    assert torch.equal(model(x), expected)


def test_nested_blocks_are_undone_one_by_one():
    model = make_net(dtype=torch.float64)
    adapters = three(model, "lora")
    x = make_input(4, 5, dtype=torch.float64)
    other = ["german"] * 4
    with slt.rows(model, NAMES):
        outer = model(x)
        with slt.rows(model, other):
            inner = model(x)
        assert torch.equal(model(x), outer)
    assert_near(inner, one_by_one(model, adapters, x, other))
    assert_near(outer, one_by_one(model, adapters, x, NAMES))


def test_an_adapter_disabled_inside_the_block_is_left_out():
    model = make_net(dtype=torch.float64)
    adapters = three(model, "lora")
    x = make_input(4, 5, dtype=torch.float64)
    with slt.rows(model, NAMES), adapters["french"].disabled():
        y = model(x)
    assert_near(y, one_by_one(model, adapters, x, [None, None, "german", None]))


@pytest.mark.parametrize("key", slow_but(["lora"], ["lora", "dense", "cut"]))
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_sees_the_block(key):
    model = make_net(depth=1, dtype=torch.float64)
    adapters = three(model, key)
    x = make_input(4, 5, dtype=torch.float64)
    torch._dynamo.reset()
    call = torch.compile(model, backend="eager")
    together = call(x)
    for names in (NAMES, NAMES[::-1]):
        with slt.rows(model, names):
            y = call(x)
        assert_near(y, one_by_one(model, adapters, x, names))
    assert_near(call(x), together)
    torch._dynamo.reset()


# What is refused.


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ("french", TypeError, "names must be a list of names and None: got 'french'"),
        (None, TypeError, "names must be a list"),
        ([1, None], TypeError, r"names\[0\] must be a string or None: got 1"),
        ([], ValueError, "one entry for each row"),
        (["french", "dutch"], ValueError, r"'french', 'german', 'unused': got names\[1\]='dutch'"),
    ],
    ids=["a text", "null", "a number", "empty", "unknown"],
)
def test_wrong_names(names, error, message):
    model = make_net()
    three(model, "lora")
    with unchanged(model), pytest.raises(error, match=message), slt.rows(model, names):
        raise AssertionError("entered")


def test_no_module():
    with pytest.raises(TypeError, match="model must be"), slt.rows("model", NAMES):
        raise AssertionError("entered")


@pytest.mark.parametrize("name", ["german", "unused"])
def test_merged_adapters_are_refused(name):
    model = make_net()
    adapters = three(model, "lora")
    adapters[name].merge()
    with unchanged(model), pytest.raises(sl.AdapterError, match=f"'{name}' must be unmerged"):
        slt.rows(model, NAMES).__enter__()


def test_adapters_merged_inside_the_block_are_refused():
    model = make_net()
    adapters = three(model, "lora")
    with slt.rows(model, NAMES):
        adapters["unused"].merge()
        with pytest.raises(sl.AdapterError, match="'unused' are in the weights"):
            model(make_input(4, 5))


def test_disabled_adapters_are_refused_where_they_are_named():
    model = make_net()
    adapters = three(model, "lora")
    x = make_input(4, 5)
    with adapters["unused"].disabled(), slt.rows(model, NAMES):
        model(x)
    with adapters["german"].disabled(), pytest.raises(sl.AdapterError, match="'german' must not"):
        slt.rows(model, NAMES).__enter__()


def test_an_adapter_with_a_head_is_refused(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    model = make_net()
    path = tmp_path / "a.safetensors"
    adapter = attach_filled(model, "lora")
    adapter.save(path)
    adapter.detach()
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    save_file({**tensors, "model.head.bias": torch.ones(3)}, path, metadata=metadata)
    slt.load(model, path, name="french")
    with pytest.raises(sl.AdapterError, match=r"'french' .* replaced head\.bias"):
        slt.rows(model, ["french"]).__enter__()


def test_one_name_of_two_parts():
    model = make_outer()
    attach_filled(model.inner, "lora", name="french")
    slt.attach(model, sl.lora(1), ["extra"], name="french")
    with pytest.raises(ValueError, match="2 parts of the model have one named 'french'"):
        slt.rows(model, NAMES[:1]).__enter__()


@pytest.mark.parametrize("shape", [(3, 5), (5, 5), (20,), ()], ids=str)
def test_another_number_of_rows_is_refused(shape):
    model = make_net()
    three(model, "lora")
    x = make_input(*shape) if shape else make_input(1)[0]
    with slt.rows(model, NAMES), pytest.raises(ValueError, match=r"got 4 names and an input of"):
        model(x)


# Costs.


def count_calls(function):
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(before)
    return calls


@pytest.fixture
def _no_collector():
    """Finalizers of other tests' objects are calls too."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collector")
def test_what_is_not_used_costs_nothing():
    """Two hundred adapters, of which two serve the batch; calls are counted, not seconds."""
    model = make_net(depth=1)
    x = make_input(4, 5)
    names = ["french", None, "german", "french"]

    def serve():
        with slt.rows(model, names):
            model(x)

    for name in ("french", "german"):
        slt.attach(model, sl.lora(1), ["q", "v"], name=name)
    serve()
    few = count_calls(serve)
    attaching = []
    for index in range(200):
        attaching.append(
            count_calls(lambda i=index: slt.attach(model, sl.lora(1), ["q", "v"], name=f"a{i}"))
        )
    assert count_calls(serve) == few
    # Each attaches as quickly as the first, and leaves as quickly.
    assert attaching[-1] <= attaching[1] + 50
    leaving = [count_calls(model._modules[f"a{i}"].detach) for i in range(200)]
    assert max(leaving) <= leaving[-1] + 50
