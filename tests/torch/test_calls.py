"""The ways in which a layer is called: keywords, hooks, shapes, dtypes, devices."""

import pytest
import torch
from torch import nn

import superlora as sl
import superlora.torch as slt
from tests.torch.helpers import (
    SPECS,
    WIDTH,
    assert_near,
    attach_filled,
    every_layer,
    fill,
    make_input,
    make_net,
    seeded,
    some_specs,
    targets_of,
)


def expected_of(layer, adapter, name, x):
    with adapter.disabled():
        return layer(x) + x @ adapter.delta(name).t()


@some_specs
@every_layer
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (2, 3, 4, 5)], ids=str)
def test_any_batch_shape(key, layer, shape):
    model = make_net(layer, dtype=torch.float64)
    adapter = attach_filled(model, key)
    q = model.blocks[0].q
    with seeded(0):
        x = torch.randn(*shape, WIDTH, dtype=torch.float64, requires_grad=True)
    y = q(x)
    assert y.shape == (*shape, 8)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(
        factor.grad is None or factor.grad.isfinite().all() for factor in adapter.parameters()
    )
    if y.numel():
        assert_near(y, expected_of(q, adapter, "blocks.0.q", x))


@some_specs
def test_input_that_is_not_contiguous(key):
    model = make_net(dtype=torch.float64)
    adapter = attach_filled(model, key)
    q = model.blocks[0].q
    x = make_input(5, 3, dtype=torch.float64)
    for view in (x.transpose(0, 1), x.flip(-1)[::2], x[:, :1].expand(5, 4, WIDTH)):
        assert_near(q(view), expected_of(q, adapter, "blocks.0.q", view))


@some_specs
def test_keyword_argument(key):
    model = make_net()
    attach_filled(model, key)
    q, x = model.blocks[0].q, make_input()
    assert torch.equal(q(input=x), q(x))
    assert torch.equal(q.forward(x), q(x))


@pytest.mark.parametrize("key", ["lora", "dense", "cut"])
def test_keyword_argument_of_conv1d(key):
    model = make_net("conv1d")
    attach_filled(model, key)
    q, x = model.blocks[0].q, make_input()
    assert torch.equal(q(x=x), q(x))


CALLS = {
    "nothing": ((), {}),
    "two": ((make_input(), 3), {}),
    "unknown keyword": ((), {"foo": make_input()}),
    "extra keyword": ((make_input(),), {"foo": 1}),
}


@some_specs
@pytest.mark.parametrize(("args", "kwargs"), CALLS.values(), ids=CALLS)
def test_wrong_arguments_are_refused_as_by_the_base(key, args, kwargs):
    model = make_net()
    with pytest.raises(TypeError) as plain:
        model.blocks[0].q(*args, **kwargs)
    attach_filled(model, key)
    with pytest.raises(TypeError) as adapted:
        model.blocks[0].q(*args, **kwargs)
    assert type(adapted.value) is type(plain.value)


@some_specs
def test_input_of_wrong_width_or_dtype_is_refused_as_by_the_base(key):
    model = make_net()
    attach_filled(model, key)
    with pytest.raises(RuntimeError, match=r"shape|size"):
        model.blocks[0].q(torch.ones(2, WIDTH + 1))
    with pytest.raises(RuntimeError, match=r"dtype|type"):
        model.blocks[0].q(torch.ones(2, WIDTH, dtype=torch.float64))


@some_specs
def test_hooks_of_layers_fire_once_in_order(key):
    model = make_net()
    attach_filled(model, key)
    q, seen = model.blocks[0].q, []
    q.register_forward_pre_hook(lambda module, args: seen.append(("pre", len(args))))
    q.register_forward_hook(lambda module, args, y: seen.append(("post", y.shape[-1])) or y + 1)
    q.register_full_backward_hook(lambda module, *gradients: seen.append("backward"))
    x = make_input().requires_grad_()
    y = q(x)
    assert torch.equal(y, q.forward(x) + 1)
    y.sum().backward()
    assert seen == [("pre", 1), ("post", 8), "backward"]


class Doubling(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, input):
        return 2 * super().forward(input)


@some_specs
def test_forward_of_a_subclass_is_kept(key):
    model = make_net()
    for block in model.blocks:
        block.q.__class__ = Doubling
    x = make_input()
    expected = model(x)
    adapter = slt.attach(model, SPECS[key], targets_of(key))
    assert torch.equal(model(x), expected)
    fill(adapter)
    q = model.blocks[0].q
    changed = q.weight + adapter.delta("blocks.0.q")
    assert_near(q(x), 2 * nn.functional.linear(x, changed, q.bias))


@some_specs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_whose_input_is_half_precision(key, dtype):
    """Weights in half precision, factors in float32."""
    model = make_net(dtype=dtype)
    adapter = attach_filled(model, key)
    q, x = model.blocks[0].q, make_input(dtype=dtype).requires_grad_()
    y = q(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert x.grad.dtype == dtype
    used = [factor for factor in adapter.parameters() if factor.grad is not None]
    assert used
    assert all(factor.grad.dtype == torch.float32 for factor in used)


MIXED = {
    "per weight": sl.lora(1),
    "dense": sl.dense(),
    "one group": sl.Spec(rank=1, groups=1, fold="balanced"),
    "two groups": sl.Spec(rank=1, groups=2, fold="balanced"),
}


@pytest.mark.parametrize("spec", MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("other", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_model_of_mixed_dtypes(spec, other):
    """Factors shared by layers of several dtypes serve each of them."""
    with seeded(0):
        model = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    model[1].to(other)
    adapter = slt.attach(model, spec)
    x = torch.ones(2, 4)
    fill(adapter)
    for name, layer in model.named_children():
        y = layer(x.to(layer.weight.dtype))
        assert y.dtype == layer.weight.dtype
        base = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
        expected = base + x.double() @ adapter.delta(name).double().t()
        assert_near(y, expected, torch.bfloat16 if y.dtype == torch.bfloat16 else torch.float32)


@some_specs
def test_factors_of_another_dtype_under_autocast(key):
    model = make_net()
    adapter = fill(slt.attach(model, SPECS[key], targets_of(key), dtype=torch.float64))
    x = make_input()
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert adapter.dtype == torch.float64
    assert (y - expected).norm() <= 0.1 * expected.norm()


@some_specs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_meta_forward_gives_the_shape(key, dtype):
    """As tools that count operations or infer shapes do."""
    with torch.device("meta"):
        model = make_net(dtype=dtype)
    slt.attach(model, SPECS[key], targets_of(key))
    y = model(torch.empty(2, 5, WIDTH, dtype=dtype, device="meta"))
    assert y.shape == (2, 5, 3)
    assert y.dtype == dtype


def test_threads_share_an_adapted_model():
    import concurrent.futures

    model = make_net(dtype=torch.float64)
    attach_filled(model, "lora", name="first")
    attach_filled(model, "cut", name="second")
    inputs = [make_input(seed=seed, dtype=torch.float64) for seed in range(8)]
    expected = [model(x) for x in inputs]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(model, inputs))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
