"""The compiled kernels of the transform against its plain form; their threads and failures."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import threading
import warnings

import numpy
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.linalg import hadamard

from superlora.walsh_hadamard import (
    fwht,
    transform_padded,
)
from tests.arrays.fwht_helpers import DOUBLE, ROUNDING, SINGLE, compiled_kernels, draw, plain, watch
from tests.conftest import is_installed

needs_numba = pytest.mark.skipif(not is_installed("numba"), reason="numba is not installed")


@pytest.fixture
def native():
    pytest.importorskip("numba")
    with compiled_kernels() as module:
        yield module


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
    ("count", "bits"), [(33, 13), (3, 17), (2, 18), (8, 16), (1, 19), (1030, 8), (1, 21), (7, 17)]
)
def test_threads_share_rows_and_columns(native, monkeypatch, count, bits):
    monkeypatch.setattr(native, "_SHARE", 1 << 19)
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


@pytest.mark.parametrize("scale", [0.0, numpy.inf, -2.0])
@pytest.mark.parametrize("bits", [8, 12, 19])
def test_any_scale_is_applied_once(native, bits, scale):
    x = numpy.zeros(2**bits)
    x[0] = 1.0
    assert_array_equal(transform_padded(x, 2**bits, scale), numpy.full(2**bits, scale))


def test_a_failure_in_a_helping_thread_is_raised(native):
    raised = threading.Event()

    def fail(start, stop):
        if threading.current_thread() is not threading.main_thread():
            raised.set()
            raise ZeroDivisionError
        assert raised.wait(10)

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


def test_many_threads_may_call_at_once(native, monkeypatch):
    monkeypatch.setattr(native, "_SHARE", 1 << 19)
    x = [draw(4, 2**18, dtype=SINGLE, seed=seed) for seed in range(3)]
    expected = [fwht(v) for v in x]
    with concurrent.futures.ThreadPoolExecutor(6) as callers:
        found = list(callers.map(lambda at: fwht(x[at % 3]), range(12)))
    for at, y in enumerate(found):
        assert_array_equal(y, expected[at % 3])


def _transform_in_child(connection, x):
    connection.send(fwht(x).sum(axis=-1))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_has_threads_of_its_own(native, monkeypatch):
    monkeypatch.setattr(native, "_SHARE", 1 << 19)
    monkeypatch.setattr(native, "processors", lambda: 2)
    x = draw(4, 2**18, dtype=SINGLE)
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
