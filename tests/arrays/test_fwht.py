"""The Walsh–Hadamard transform against the matrix, its algebra, and its own plain form."""

from __future__ import annotations

import concurrent.futures
import contextlib
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import hypothesis
import numpy
import pytest
from hypothesis import strategies
from numpy.testing import assert_allclose, assert_array_equal
from scipy.linalg import hadamard

from superlora import walsh_hadamard
from superlora.walsh_hadamard import (
    fwht,
    next_power_of_two,
    transform_cropped,
    transform_padded,
)
from tests.conftest import is_installed, jax_x64

needs_torch = pytest.mark.skipif(not is_installed("torch"), reason="torch is not installed")
needs_jax = pytest.mark.skipif(not is_installed("jax"), reason="jax is not installed")
needs_numba = pytest.mark.skipif(not is_installed("numba"), reason="numba is not installed")

SINGLE, DOUBLE = numpy.float32, numpy.float64
ROUNDING = {SINGLE: 1e-6, DOUBLE: 2e-15}


def draw(*shape, dtype=DOUBLE, seed=0):
    return numpy.random.default_rng(seed).standard_normal(shape).astype(dtype)


@contextlib.contextmanager
def kernels(module):
    """Put a module, or None, in the place of the compiled kernels."""
    before = dict(walsh_hadamard._found)
    walsh_hadamard._found["kernels"] = module
    try:
        yield
    finally:
        walsh_hadamard._found.clear()
        walsh_hadamard._found.update(before)


def plain(x, **options):
    with kernels(None):
        return fwht(x, **options)


@pytest.fixture
def native():
    pytest.importorskip("numba")
    module = walsh_hadamard._find_native()
    assert module is not None
    with kernels(module):
        yield module


def watch(native, monkeypatch):
    """Return a list to which every call of the kernels appends its rows and row length."""
    calls = []

    def transform(source, target, count, size, *rest):
        calls.append((count, size))
        original(source, target, count, size, *rest)

    original = native.transform
    monkeypatch.setattr(native, "transform", transform)
    return calls


# --- the matrix, on every library ---------------------------------------------------------


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
@pytest.mark.parametrize("bits", range(11))
def test_it_multiplies_by_the_matrix(xp, bits, dtype):
    n = 2**bits
    x = draw(3, n, dtype=dtype, seed=bits)
    for scale, options in ((1.0, {}), (n**-0.5, {"orthonormal": True})):
        y = fwht(xp.array(x), **options)
        assert xp.owns(y)
        assert y.dtype == xp.array(x).dtype
        expected = scale * (x.astype(DOUBLE) @ hadamard(n))
        tolerance = ROUNDING[dtype] * (bits + 1) * math.sqrt(n) * scale * 4
        assert_allclose(xp.to_numpy(y), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((8,), 0),
        ((8, 3), 0),
        ((3, 8), 1),
        ((2, 16, 3), 1),
        ((2, 16, 3), -2),
        ((512, 3), 0),
        ((2, 256, 2), 1),
        ((4, 2, 3), -3),
        ((2, 3, 1), -1),
        ((0, 8), 1),
        ((256, 0), 0),
    ],
)
def test_any_axis_of_any_batch(xp, shape, axis):
    x = draw(*shape)
    given_ = xp.array(x)
    y = xp.to_numpy(fwht(given_, axis))
    n = shape[axis]
    expected = numpy.moveaxis(numpy.moveaxis(x, axis, -1) @ hadamard(n), -1, axis)
    assert y.shape == shape
    assert_allclose(y, expected, rtol=0, atol=1e-12)
    assert_array_equal(xp.to_numpy(given_), x)


@hypothesis.settings(max_examples=20)  # each shape is compiled anew by some libraries
@hypothesis.given(
    bits=strategies.integers(0, 9),
    before=strategies.lists(strategies.integers(1, 3), max_size=2),
    after=strategies.lists(strategies.integers(1, 3), max_size=2),
    orthonormal=strategies.booleans(),
    seed=strategies.integers(0, 99),
)
def test_it_is_symmetric_and_its_own_inverse(xp, bits, before, after, orthonormal, seed):
    shape, axis, n = (*before, 2**bits, *after), len(before), 2**bits
    x, y = draw(*shape, seed=seed), draw(*shape, seed=seed + 100)
    options = {"axis": axis, "orthonormal": orthonormal}
    hx, hy = (xp.to_numpy(fwht(xp.array(v), **options)) for v in (x, y))
    back = xp.to_numpy(fwht(xp.array(hx), **options))
    assert_allclose(back, x if orthonormal else n * x, rtol=0, atol=1e-13 * n)
    assert_allclose(numpy.vdot(hx, y), numpy.vdot(x, hy), rtol=0, atol=1e-11 * n)


@pytest.mark.parametrize("n", [4, 4096])
def test_a_result_is_exact_to_rounding(xp, n):
    # Sums of integers are exact, so that every entry must be.
    x = numpy.random.default_rng(0).integers(-1000, 1000, n).astype(DOUBLE)
    expected = x.copy().reshape(1, n)
    for _ in range(n.bit_length() - 1):
        half = expected.reshape(-1, 2, expected.shape[1] // 2)
        expected = numpy.stack((half[:, 0] + half[:, 1], half[:, 0] - half[:, 1]), 1)
        expected = expected.reshape(-1, expected.shape[2])
    assert_array_equal(xp.to_numpy(fwht(xp.array(x))), expected.ravel())


def test_one_entry_is_a_new_array(xp):
    x = xp.array(numpy.ones((2, 1)))
    y = fwht(x)
    assert y is not x
    if xp.name in ("numpy", "torch"):
        y += 1.0
        assert_array_equal(xp.to_numpy(x), numpy.ones((2, 1)))


@pytest.mark.parametrize("n", [8, 512])
def test_not_a_number_and_infinity_spread_along_their_row_only(xp, n):
    x = draw(4, n)
    x[0, 1], x[1, 2], x[2, 0], x[2, 3] = numpy.nan, numpy.inf, numpy.inf, numpy.inf
    y = xp.to_numpy(fwht(xp.array(x)))
    assert numpy.isnan(y[0]).all()
    assert_array_equal(y[1], numpy.inf * hadamard(n)[2])
    columns = hadamard(n)[0] + hadamard(n)[3]
    with numpy.errstate(invalid="ignore"):
        assert_array_equal(y[2], numpy.inf * columns)
    assert numpy.isfinite(y[3]).all()


# --- types of numbers ---------------------------------------------------------------------


def halves():
    rows = [("numpy", "float16", lambda v: v.astype(numpy.float16))]
    if is_installed("torch"):
        import torch

        rows += [
            ("torch", name, lambda v, name=name: torch.tensor(v).to(getattr(torch, name)))
            for name in ("float16", "bfloat16")
        ]
    if is_installed("jax"):
        import jax.numpy

        rows += [
            ("jax", name, lambda v, name=name: jax.numpy.asarray(v).astype(name))
            for name in ("float16", "bfloat16")
        ]
    return [pytest.param(*row[1:], id="-".join(row[:2])) for row in rows]


def as_double(x):
    return numpy.asarray(x.double() if hasattr(x, "double") else x).astype(DOUBLE)


@pytest.mark.parametrize(("name", "make"), halves())
def test_short_types_are_summed_in_single_precision(name, make):
    n = 2**16
    ones = make(numpy.ones(n, SINGLE))
    y = fwht(ones, orthonormal=True)
    assert str(y.dtype).endswith(name)
    assert_array_equal(as_double(y), numpy.r_[256.0, numpy.zeros(n - 1)])
    x = make(draw(2, 1024, dtype=SINGLE))
    expected = (as_double(x) @ hadamard(1024)).astype(SINGLE)
    # One rounding at the end, to the short type.
    assert_allclose(as_double(fwht(x)), as_double(make(expected)), rtol=1e-2, atol=1e-4)
    exact = numpy.isclose(as_double(fwht(x)), as_double(make(expected)), rtol=1e-6, atol=0)
    assert exact.mean() > 0.95


@pytest.mark.parametrize(("name", "make"), halves())
def test_folds_of_short_types_are_summed_in_single_precision(name, make):
    n = 2**16
    y = transform_cropped(make(numpy.ones(n, SINGLE)), 3, 2.0**-8)
    assert str(y.dtype).endswith(name)
    assert_array_equal(as_double(y), [256.0, 0.0, 0.0])
    # 2048 + 1 is no half.
    z = numpy.zeros(n, SINGLE)
    z[0], z[4:8004:4] = 2048, 1
    assert as_double(transform_cropped(make(z), 1, 2.0**-6))[0] == pytest.approx(63.25, rel=5e-3)
    x = transform_padded(make(numpy.ones(3, SINGLE)), 8, 0.5)
    assert str(x.dtype).endswith(name)
    assert_array_equal(as_double(x), [1.5, 0.5, 0.5, -0.5] * 2)


def test_long_doubles_keep_their_precision():
    x = draw(8).astype(numpy.longdouble)
    y = fwht(fwht(x)) / 8
    assert y.dtype == numpy.longdouble
    assert abs(y - x).max() <= 16 * numpy.finfo(numpy.longdouble).eps


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool", "complex64", "complex128"])
def test_other_types_of_numbers_are_refused(xp, dtype):
    x = xp.array(numpy.ones(4, dtype))
    for call in (fwht, lambda v: transform_padded(v, 4)):
        with pytest.raises(TypeError, match=f"x must have a floating-point dtype: got {dtype}"):
            call(x)
    with pytest.raises(TypeError, match=f"y must have a floating-point dtype: got {dtype}"):
        transform_cropped(x, 2)


@pytest.mark.parametrize(
    ("shape", "axis", "error", "message"),
    [
        ((6,), -1, ValueError, "along axis -1: got 6; the next is 8$"),
        ((3, 4), 0, ValueError, "x must have a power of two of entries along axis 0: got 3"),
        ((2, 0), 1, ValueError, "along axis 1: got 0; the next is 1$"),
        ((), -1, ValueError, r"x must have at least one axis: got shape \(\)"),
        ((4, 4), 2, ValueError, "axis must lie in -2 … 1: got 2"),
        ((4, 4), -3, ValueError, "axis must lie in -2 … 1: got -3"),
        ((4, 4), 1.0, TypeError, "axis must be an integer: got 1.0"),
        ((4, 4), None, TypeError, "axis must be an integer: got None"),
    ],
)
def test_what_cannot_be_transformed_is_refused(xp, shape, axis, error, message):
    with pytest.raises(error, match=message):
        fwht(xp.array(numpy.ones(shape)), axis)


def test_lists_are_refused():
    with pytest.raises(TypeError, match=r"got builtins\.list"):
        fwht([1.0, 2.0])


# --- padding and cropping -----------------------------------------------------------------


def test_the_next_power_of_two():
    assert [next_power_of_two(n) for n in range(1, 10)] == [1, 2, 4, 4, 8, 8, 8, 8, 16]
    assert next_power_of_two(2**62 + 1) == 2**63
    for n in (0, -4):
        with pytest.raises(ValueError, match=f"n must be at least 1: got {n}"):
            next_power_of_two(n)


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize(
    ("p", "n"),
    [(1, 1), (1, 8), (3, 4), (3, 16), (4, 16), (8, 8), (5, 512), (300, 1024), (512, 512)],
)
def test_padding_and_cropping_are_slices_of_the_matrix(xp, p, n, scale):
    x, y = draw(2, 3, p), draw(2, 3, n, seed=1)
    wide = transform_padded(xp.array(x), n, scale)
    narrow = transform_cropped(xp.array(y), p, scale)
    assert xp.owns(wide)
    assert xp.owns(narrow)
    wide, narrow = xp.to_numpy(wide), xp.to_numpy(narrow)
    assert_allclose(wide, scale * x @ hadamard(n)[:p], rtol=0, atol=1e-11)
    assert_allclose(narrow, scale * y @ hadamard(n)[:, :p], rtol=0, atol=1e-11)
    assert_allclose(numpy.vdot(wide, y), numpy.vdot(x, narrow), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: transform_padded(x, 6), "n must be a power of two: got 6; the next is 8"),
        (lambda x: transform_padded(x, 0), "n must be a power of two: got 0; the next is 1"),
        (lambda x: transform_padded(x, 2), "x must have 1 … 2 entries: got 4"),
        (lambda x: transform_padded(x[:0], 2), "x must have 1 … 2 entries: got 0"),
        (lambda x: transform_cropped(x, 5), "p must be 1 … 4 entries: got 5"),
        (lambda x: transform_cropped(x, 0), "p must be 1 … 4 entries: got 0"),
        (lambda x: transform_cropped(x[:3], 1), "n must be a power of two: got 3; the next is 4"),
        (lambda x: transform_padded(x[0], 2), r"x must have at least one axis: got shape \(\)"),
        (lambda x: transform_cropped(x[0], 2), r"y must have at least one axis: got shape \(\)"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(numpy.ones(4))


# --- the compiled kernels -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
@pytest.mark.parametrize("bits", range(23))
def test_the_kernels_agree_with_plain_operations(native, monkeypatch, bits, dtype):
    n = 2**bits
    calls = watch(native, monkeypatch)
    for count in (1, 3) if bits < 18 else (1,):
        x = draw(count, n, dtype=dtype, seed=bits)
        y, z = fwht(x, orthonormal=True), plain(x, orthonormal=True)
        assert_allclose(y, z, rtol=0, atol=8 * ROUNDING[dtype] * (bits + 1))
    assert bool(calls) == (n * x.itemsize >= native.BLOCK)


@pytest.mark.parametrize(
    ("count", "bits"), [(33, 16), (3, 19), (2, 20), (8, 18), (1, 21), (1030, 11), (5, 18)]
)
def test_threads_share_rows_and_columns(native, monkeypatch, count, bits):
    x = draw(count, 2**bits, dtype=SINGLE)
    shares = []

    def share_out(work, count, threads):
        shares.append((count, threads))
        original(work, count, threads)

    original = native._share_out
    monkeypatch.setattr(native, "_share_out", share_out)
    results = []
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(native, "processors", lambda threads=threads: threads)
        shares.clear()
        results.append(fwht(x))
        assert bool(shares) == (threads > 1)
        assert all(2 <= used <= threads for _, used in shares)
    for result in results[1:]:
        assert_array_equal(result, results[0])
    assert_allclose(results[0], plain(x), rtol=0, atol=1e-5 * 2 ** (bits / 2) * bits)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
def test_long_rows_of_many_lines_are_transformed(native, monkeypatch, dtype):
    # As if the caches were small: the strips of 2^4 … 2^11 lines that long rows have.
    monkeypatch.setattr(native, "_TILE", 1 << 10)
    monkeypatch.setattr(native, "_LONG_TILE", 1 << 10)
    for bits in range(8, 20):
        x = draw(2, 2**bits, dtype=dtype, seed=bits)
        y, z = fwht(x, orthonormal=True), plain(x, orthonormal=True)
        assert_allclose(y, z, rtol=0, atol=8 * ROUNDING[dtype] * (bits + 1))


def test_a_failure_in_a_helping_thread_is_raised(native):
    def fail(start, stop):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        native._share_out(fail, 8, 2)


def test_every_part_is_worked_on_once(native):
    for count, threads in ((1, 2), (7, 2), (100, 3), (5, 9)):
        seen = []
        native._share_out(lambda start, stop: seen.extend(range(start, stop)), count, threads)  # noqa: B023
        assert sorted(seen) == list(range(count))


def test_no_threads_to_be_had_is_no_error(native, monkeypatch):
    class Ended:
        def submit(self, work):
            raise RuntimeError("cannot schedule new futures after shutdown")

    monkeypatch.setattr(native, "_pool", Ended())
    seen = []
    native._share_out(lambda start, stop: seen.extend(range(start, stop)), 9, 3)
    assert sorted(seen) == list(range(9))


def test_many_threads_may_call_at_once(native):
    x = [draw(4, 2**19, dtype=SINGLE, seed=seed) for seed in range(3)]
    expected = [fwht(v) for v in x]
    with concurrent.futures.ThreadPoolExecutor(6) as callers:
        found = list(callers.map(lambda at: fwht(x[at % 3]), range(12)))
    for at, y in enumerate(found):
        assert_array_equal(y, expected[at % 3])


def _transform_in_child(connection, x):
    connection.send(fwht(x).sum(axis=-1))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_has_threads_of_its_own(native):
    x = draw(4, 2**19, dtype=SINGLE)
    expected = fwht(x).sum(axis=-1)  # starts the parent's
    assert native._pool is not None
    ours, theirs = multiprocessing.Pipe()
    with warnings.catch_warnings():
        # Python and jax warn of forks beside threads, which is what is tested.
        warnings.simplefilter("ignore")
        child = multiprocessing.get_context("fork").Process(
            target=_transform_in_child, args=(theirs, x)
        )
        child.start()
    try:
        assert ours.poll(20)
        assert_array_equal(ours.recv(), expected)
    finally:
        child.kill()
        child.join()


def test_kernels_that_fail_are_given_up_with_one_warning(native, monkeypatch):
    def fail(*args):
        raise OSError("no compiler")

    monkeypatch.setattr(native, "transform", fail)
    x = draw(512)
    with pytest.warns(RuntimeWarning, match="must do without its compiled kernels: got OSError"):
        y = fwht(x)
    assert_allclose(y, x @ hadamard(512), rtol=0, atol=1e-11)
    assert_array_equal(fwht(x), y)


def test_a_cache_that_fails_costs_the_cache_only(native):
    entry = native._Entry()
    calls = []

    def broken(*args):
        raise OSError("disk full")

    entry.cached, entry.kernel = True, broken
    entry.forgo_cache = lambda: setattr(entry, "kernel", lambda *args: calls.append(args))
    entry.prepare(SINGLE(1))
    assert len(calls) == 1
    entry.cached, entry.kernel = False, broken
    with pytest.raises(OSError, match="disk full"):
        entry.prepare(SINGLE(1))


def test_without_a_folder_for_the_cache_there_is_none(native, monkeypatch):
    compiled = native._compiled

    def refuse(function, cache=False):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return compiled(function)

    monkeypatch.setattr(native, "_compiled", refuse)
    assert not native._Entry().cached


def run_python(code, **environment):
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.parametrize("environment", [{}, {"NUMBA_DISABLE_JIT": "1"}])
def test_what_is_imported_and_when(environment):
    code = """
import sys, numpy
from superlora import walsh_hadamard
assert not {"torch", "jax", "numba", "llvmlite"} & set(sys.modules)
y = walsh_hadamard.fwht(numpy.ones(16))
assert not {"torch", "jax", "numba"} & set(sys.modules)
y = walsh_hadamard.fwht(numpy.ones(512))
assert not {"torch", "jax"} & set(sys.modules)
assert y[0] == 512 and not y[1:].any()
print(walsh_hadamard._found.get("kernels") is not None)
"""
    used = is_installed("numba") and not environment
    assert run_python(code, **environment) == [str(used)]


def test_without_numba_nothing_is_said():
    code = """
import sys
sys.modules["numba"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "numba" else find(name, *rest)
import numpy
from superlora import walsh_hadamard
assert walsh_hadamard.fwht(numpy.ones(512))[0] == 512
print(walsh_hadamard._found["kernels"])
"""
    assert run_python(code) == ["None"]


def test_a_broken_numba_is_told_of():
    code = """
import importlib.machinery, sys, types, warnings
sys.modules["numba"] = types.ModuleType("numba")
sys.modules["numba"].__spec__ = importlib.machinery.ModuleSpec("numba", None)
import numpy
from superlora import walsh_hadamard
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert walsh_hadamard.fwht(numpy.ones(512))[0] == 512
    assert walsh_hadamard.fwht(numpy.ones(512))[0] == 512
print(len(caught), "kernels" in str(caught[0].message))
"""
    assert run_python(code) == ["1", "True"]


def test_numpy_arrays_of_any_layout(native):
    x = draw(6, 1024)
    expected = x @ hadamard(1024)
    frozen = x.copy()
    frozen.flags.writeable = False
    big_endian = x.astype(">f8")
    unaligned = numpy.frombuffer(b"\0" + x.tobytes(), numpy.uint8)[1:].view(DOUBLE).reshape(x.shape)
    for y in (frozen, big_endian, unaligned, numpy.asfortranarray(x), numpy.repeat(x, 2, 0)[::2]):
        found = fwht(y)
        assert type(found) is numpy.ndarray
        assert_allclose(found, expected, rtol=0, atol=1e-11)
    backwards = fwht(x[::-1, ::-1])
    assert_allclose(backwards, x[::-1, ::-1] @ hadamard(1024), rtol=0, atol=1e-11)
    assert_array_equal(x, draw(6, 1024))


# --- torch --------------------------------------------------------------------------------


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
    negative = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert negative.is_neg()
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


def test_torch_meets_the_kernels(torch, native, monkeypatch):
    calls = watch(native, monkeypatch)
    fwht(torch.ones(2, 512))
    fwht(torch.ones(512, 2, dtype=torch.float64), 0)
    fwht(torch.ones(512, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    fwht(torch.ones(16))
    assert calls == [(2, 512), (2, 512), (1, 512), (1, 512)]


# --- jax ----------------------------------------------------------------------------------


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


@needs_numba
@needs_torch
def test_a_read_only_package_is_no_error(tmp_path):
    """The first call in a process whose caches cannot be written to."""
    package = Path(walsh_hadamard.__file__).parent
    copy = tmp_path / "superlora"
    copy.mkdir()
    for name in ("_backend.py", "_native_transform.py", "walsh_hadamard.py"):
        shutil.copy(package / name, copy / name)
    (copy / "__init__.py").touch()
    blocked = tmp_path / "blocked"
    blocked.touch()  # a file where a folder would be made: also for those who may do all
    (copy / "__pycache__").touch()
    code = """
import numpy
from superlora import walsh_hadamard
assert walsh_hadamard.fwht(numpy.ones(512, numpy.float32))[0] == 512
print(walsh_hadamard._found["kernels"] is not None)
"""
    environment = {
        "PYTHONPATH": str(tmp_path),
        "HOME": str(blocked),
        "XDG_CACHE_HOME": str(blocked),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    assert run_python(code, **environment) == ["True"]
