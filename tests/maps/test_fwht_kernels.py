"""The compiled kernels of the transform against its plain form; their threads and failures."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import warnings

import numpy
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.linalg import hadamard

from superlora.maps import walsh_hadamard
from superlora.maps.walsh_hadamard import fwht, transform_padded
from tests.conftest import is_installed
from tests.maps.fwht_helpers import DOUBLE, ROUNDING, SINGLE, compiled_kernels, draw, plain, watch

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
    assert bool(calls) == (n >= native.LEAST)


@pytest.mark.parametrize(("count", "bits"), [(1, 22), (3, 21), (5, 20), (17, 18), (2049, 11)])
def test_threads_share_rows_and_parts_of_rows(native, monkeypatch, count, bits):
    started = []

    def pool(threads):
        started.append(threads)
        return concurrent.futures.ThreadPoolExecutor(threads)

    monkeypatch.setattr(native, "ThreadPoolExecutor", pool)
    x = draw(count, 2**bits, dtype=SINGLE)
    results = [numpy.empty_like(x) for _ in range(4)]
    for threads, y in zip((1, 2, 3, 99), results, strict=True):
        native.transform(x, y, 1.0, threads)
    most = x.nbytes // 2**23
    assert started == [min(threads, most) for threads in (2, 3, 99)]
    for y in results[1:]:
        assert_array_equal(y, results[0])
    assert_allclose(results[0], plain(x), rtol=0, atol=1e-5 * 2 ** (bits / 2) * bits)


@pytest.mark.parametrize("scale", [0.0, 1e300, -2.0])
@pytest.mark.parametrize("bits", [8, 9, 12, 19])
def test_any_scale_is_applied_once(native, bits, scale):
    x = numpy.zeros(2**bits)
    x[0] = 1.0
    assert_array_equal(transform_padded(x, 2**bits, scale), numpy.full(2**bits, scale))


def test_many_threads_may_call_at_once(native, monkeypatch):
    monkeypatch.setattr(native.numba.config, "NUMBA_NUM_THREADS", 2)
    x = [draw(16, 2**18, dtype=SINGLE, seed=seed) for seed in range(3)]
    expected = [fwht(v) for v in x]
    with concurrent.futures.ThreadPoolExecutor(6) as callers:
        found = list(callers.map(lambda at: fwht(x[at % 3]), range(12)))
    for at, y in enumerate(found):
        assert_array_equal(y, expected[at % 3])


def _transform_in_child(connection, x):
    connection.send(fwht(x).sum(axis=-1))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_has_threads_of_its_own(native, monkeypatch):
    monkeypatch.setattr(native.numba.config, "NUMBA_NUM_THREADS", 2)
    x = draw(16, 2**18, dtype=SINGLE)
    expected = fwht(x).sum(axis=-1)
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


def test_no_memory_for_a_result_is_no_failure_of_the_kernels(native, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(numpy, "empty", lambda *args: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            fwht(draw(512))
    assert not walsh_hadamard._failures


def test_without_a_folder_for_the_cache_there_is_none(native, monkeypatch):
    options = []

    def njit(**given):
        options.append(given)
        if given.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(native.numba, "njit", njit)
    assert native._compiled(draw) is draw
    assert [given.get("cache") for given in options] == [True, None]


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
