"""What the tests of the Walsh–Hadamard transform share."""

from __future__ import annotations

import contextlib

import numpy

from superlora import walsh_hadamard
from superlora.walsh_hadamard import fwht

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


@contextlib.contextmanager
def compiled_kernels():
    """Yield the module of compiled kernels, which the test then meets; needs numba."""
    module = walsh_hadamard._find_native()
    assert module is not None
    with kernels(module):
        yield module


def plain(x, **options):
    with kernels(None):
        return fwht(x, **options)


def watch(native, monkeypatch):
    """Return a list to which every call of the kernels appends its rows and row length."""
    calls = []

    def transform(source, target, count, size, *rest):
        calls.append((count, size))
        original(source, target, count, size, *rest)

    original = native.transform
    monkeypatch.setattr(native, "transform", transform)
    return calls
