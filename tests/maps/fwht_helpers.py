"""What the tests of the Walsh–Hadamard transform share."""

from __future__ import annotations

import contextlib
import importlib

import numpy

from superlora.maps import walsh_hadamard
from superlora.maps.walsh_hadamard import fwht

SINGLE, DOUBLE = numpy.float32, numpy.float64
ROUNDING = {SINGLE: 1e-6, DOUBLE: 2e-15}


def draw(*shape, dtype=DOUBLE, seed=0):
    return numpy.random.default_rng(seed).standard_normal(shape).astype(dtype)


@contextlib.contextmanager
def failures(*found):
    """Let the transform know these failures of its compiled kernels, and no others."""
    before = list(walsh_hadamard._failures)
    walsh_hadamard._failures[:] = found
    try:
        yield
    finally:
        walsh_hadamard._failures[:] = before


@contextlib.contextmanager
def compiled_kernels():
    """Yield the module of compiled kernels, which the test then meets; needs numba."""
    with failures():
        yield importlib.import_module("superlora.maps._native_transform")


def plain(x, **options):
    with failures(ImportError("not wanted")):
        return fwht(x, **options)


def watch(native, monkeypatch):
    """Return a list to which every call of the kernels appends its rows and row length."""
    calls = []

    def transform(x, *rest):
        calls.append((x.size // x.shape[-1], x.shape[-1]))
        original(x, *rest)

    original = native.transform
    monkeypatch.setattr(native, "transform", transform)
    return calls
