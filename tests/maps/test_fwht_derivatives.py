"""The transform under the derivatives, function transforms and compilers of torch and jax."""

from __future__ import annotations

import subprocess
import sys

import numpy
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.linalg import hadamard

from superlora.maps import walsh_hadamard
from superlora.maps.walsh_hadamard import (
    fwht,
    transform_cropped,
    transform_padded,
)
from tests.conftest import is_installed, jax_x64
from tests.maps.fwht_helpers import DOUBLE, SINGLE, compiled_kernels, draw, plain, watch

needs_jax = pytest.mark.skipif(not is_installed("jax"), reason="jax is not installed")


@pytest.fixture
def native():
    pytest.importorskip("numba")
    with compiled_kernels() as module:
        yield module


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


SIZES = [4, 512]  # without and with kernels


# torch scripts its own decompositions at the first use of this mode.
forward_mode = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


@forward_mode
@pytest.mark.parametrize("n", SIZES)
def test_torch_derivatives_of_every_order_and_mode(torch, n):
    x = torch.tensor(draw(n), requires_grad=True)
    matrix = torch.tensor(hadamard(n).astype(DOUBLE))
    y = fwht(x)
    assert y.grad_fn is not None
    (g,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
    assert_allclose(g.numpy(force=True), matrix.sum(0).numpy(), atol=1e-12)
    t = torch.tensor(draw(n, seed=1))
    assert_allclose(torch.func.jvp(fwht, (x.detach(),), (t,))[1], matrix @ t, atol=1e-11)
    assert_allclose(torch.func.vjp(fwht, x.detach())[1](t)[0], matrix @ t, atol=1e-11)
    with torch.autograd.forward_ad.dual_level():
        dual = fwht(torch.autograd.forward_ad.make_dual(x.detach(), t))
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
        assert_allclose(tangent, matrix @ t, atol=1e-11)
    if n == 4:
        grown = torch.tensor(draw(2, n, 3), requires_grad=True)
        for function in (lambda v: fwht(v, 1, orthonormal=True), lambda v: fwht(v, 1) ** 2):
            assert torch.autograd.gradcheck(function, grown, check_forward_ad=True)
            assert torch.autograd.gradgradcheck(function, grown, check_fwd_over_rev=True)
        for function in (lambda v: transform_padded(v, 8, 0.5), lambda v: transform_cropped(v, 3)):
            transposed = grown.detach().movedim(1, 2).requires_grad_()
            assert torch.autograd.gradcheck(function, transposed, check_forward_ad=True)


@forward_mode
@pytest.mark.parametrize("n", SIZES)
def test_torch_function_transforms(torch, n):
    x = torch.tensor(draw(3, n))
    matrix = torch.tensor(hadamard(n).astype(DOUBLE))
    expected = (x @ matrix).numpy()
    assert_allclose(torch.func.vmap(fwht)(x), expected, atol=1e-11)
    assert_allclose(torch.func.vmap(fwht, in_dims=1, out_dims=1)(x.T), expected.T, atol=1e-11)
    first = torch.func.vmap(lambda part: fwht(part, axis=0))(x[:, :, None])
    assert_allclose(first[:, :, 0], expected, atol=1e-11)
    nested = torch.func.vmap(torch.func.vmap(fwht, in_dims=1), in_dims=0)(x.T.reshape(1, n, 3))
    assert_allclose(nested[0], expected, atol=1e-11)
    assert_allclose(torch.func.jacrev(fwht)(x[0]), matrix, atol=1e-12)
    assert_allclose(torch.func.jacfwd(fwht)(x[0]), matrix, atol=1e-12)

    def energy(v):
        return (fwht(v) ** 2).sum()

    gradients = torch.func.vmap(torch.func.grad(energy))(x)
    assert_allclose(gradients, 2 * n * x, atol=1e-9)
    hessian = torch.func.hessian(energy)(x[0, :4])
    assert_allclose(hessian, 8 * numpy.eye(4), atol=1e-11)


def test_torch_keeps_nothing_for_the_backward_pass(torch):
    x = torch.tensor(draw(4, 512), requires_grad=True)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        y = fwht(x)
        z = plain(x)
    assert packed == []
    assert_array_equal(*(torch.autograd.grad(v.sum(), x)[0] for v in (y, z)))
    assert not y.grad_fn.next_functions[0][0].next_functions  # straight to the leaf


def test_torch_modes_without_gradients(torch):
    x = torch.tensor(draw(2, 512), requires_grad=True)
    expected = x.detach().numpy() @ hadamard(512)
    for context in (torch.no_grad, torch.inference_mode):
        for function in (fwht, plain):
            with context():
                y = function(x)
            assert not y.requires_grad
            assert_allclose(y.numpy(), expected, atol=1e-11)
    # What was made under inference mode does not stay behind.
    x2 = torch.tensor(draw(2, 64, dtype=SINGLE), requires_grad=True)
    with torch.inference_mode():
        plain(x2)
    plain(x2).sum().backward()
    assert not fwht(x.detach()).requires_grad


@pytest.mark.parametrize("n", SIZES)
def test_torch_tensors_of_any_kind(torch, native, n):
    x = torch.tensor(draw(3, n))
    expected = x.numpy() @ hadamard(n)
    before = x.clone()
    for y in (x, x.T.contiguous().T, x.repeat_interleave(2, 1)[:, ::2], torch.nn.Parameter(x)):
        assert_allclose(fwht(y).detach(), expected, atol=1e-11)
    assert_array_equal(x, before)
    offset = torch.cat((torch.zeros(1), x.flatten()))[1:].reshape(3, n)
    assert_allclose(fwht(offset), expected, atol=1e-11)
    negative = torch._neg_view(-x)
    assert negative.is_neg()
    assert negative.is_contiguous()
    assert_allclose(fwht(negative), expected, atol=1e-11)
    assert not fwht(torch._efficientzerotensor(3, n)).any()
    assert fwht(x.expand(2, 3, n)).shape == (2, 3, n)


@pytest.mark.parametrize("n", SIZES)
def test_torch_tensors_without_data(torch, native, n):
    meta = fwht(torch.empty(2, n, device="meta"), 1)
    assert meta.device.type == "meta"
    assert meta.shape == (2, n)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = torch.empty(2, n, dtype=torch.float16, requires_grad=True)
        y = fwht(fake)
        assert (y.shape, y.dtype, y.device.type) == ((2, n), torch.float16, "cpu")
        y.sum().backward()
        assert fake.grad.shape == (2, n)
    mode.from_tensor(torch.zeros(1))
    # Nothing fake stays behind.
    assert_allclose(plain(torch.ones(n)), numpy.r_[float(n), numpy.zeros(n - 1)])


@pytest.mark.parametrize("n", SIZES)
def test_torch_tracing_sees_the_operations(torch, native, n):
    from torch.fx.experimental.proxy_tensor import make_fx

    x, y = torch.tensor(draw(2, n)), torch.tensor(draw(2, n, seed=1))
    traced = make_fx(lambda v: fwht(v))(x)
    assert_allclose(traced(y), fwht(y), atol=1e-11)


@pytest.mark.filterwarnings("ignore")  # of tracing sizes, and that this tracer is old
@pytest.mark.parametrize("n", SIZES)
def test_torch_jit_traces_the_operations(torch, native, n):
    x, y = torch.tensor(draw(2, n)), torch.tensor(draw(2, n, seed=1))
    traced = torch.jit.trace(lambda v: fwht(v), x)
    assert_allclose(traced(y), fwht(y), atol=1e-11)
    assert not walsh_hadamard._failures  # not tried in vain


def test_torch_subclasses_stay(torch, native):
    seen = []

    class Marked(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    x = torch.tensor(draw(512)).as_subclass(Marked)
    y = fwht(x)
    assert type(y) is Marked
    assert seen
    assert_allclose(y.as_subclass(torch.Tensor), fwht(x.as_subclass(torch.Tensor)), atol=1e-11)


@pytest.mark.filterwarnings("ignore")  # Inductor's own
@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_needs_no_break(torch, native, dynamic):
    torch.compiler.reset()

    def function(x):
        return (fwht(x, 1, orthonormal=True) * 2).sin() + transform_cropped(
            transform_padded(x[:, :, :3].contiguous(), 8), 5
        ).sum()

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (2, 3):
        x = torch.tensor(draw(rows, 512, 4), requires_grad=True)
        results = []
        for call in (function, compiled):
            y = call(x)
            (g,) = torch.autograd.grad(y.sum(), x)
            results.append((y.detach(), g))
        for ours, theirs in zip(*results, strict=True):
            assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_torch_compiles_and_exports_what_was_never_called():
    code = """
import torch, warnings
warnings.simplefilter("ignore")
from superlora.maps.walsh_hadamard import fwht
class Module(torch.nn.Module):
    def forward(self, x):
        return fwht(x)
exported = torch.export.export(Module(), (torch.ones(3, 512),)).module()
compiled = torch.compile(Module(), fullgraph=True, backend="eager")
x = torch.randn(3, 512)
assert (exported(x) - fwht(x)).abs().max() < 1e-3
assert (compiled(x) - fwht(x)).abs().max() < 1e-3
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_torch_meets_the_kernels(torch, native, monkeypatch):
    calls = watch(native, monkeypatch)
    fwht(torch.ones(2, 512))
    fwht(torch.ones(512, 2, dtype=torch.float64), 0)
    fwht(torch.ones(512, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    fwht(torch.ones(16))
    assert calls == [(2, 512), (2, 512), (1, 512), (1, 512)]


@needs_jax
@pytest.mark.parametrize("n", SIZES)
def test_jax_transformations(n):
    import jax

    with jax_x64():
        x = jax.numpy.asarray(draw(3, n))
        matrix = hadamard(n).astype(DOUBLE)
        expected = numpy.asarray(x) @ matrix
        for function in (jax.jit(fwht), jax.vmap(fwht), jax.jit(jax.vmap(fwht))):
            assert_allclose(function(x), expected, atol=1e-10)
        assert_allclose(jax.jacrev(fwht)(x[0]), matrix, atol=1e-12)
        assert_allclose(jax.jacfwd(fwht)(x[0]), matrix, atol=1e-12)
        gradient = jax.jit(jax.grad(lambda v: (fwht(v, 1) ** 2).sum()))(x)
        assert_allclose(gradient, 2 * n * x, atol=1e-9)
        wide = jax.jit(lambda v: transform_padded(v, 2 * n, 0.5))(x[:, :3])
        assert_allclose(wide, 0.5 * x[:, :3] @ hadamard(2 * n)[:3], atol=1e-11)
