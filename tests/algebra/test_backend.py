"""Libraries are told by the type of their arrays, and nothing global is switched."""

from __future__ import annotations

import sys
import threading

import numpy
import pytest
import tensorly
from tensorly.backend.core import Backend

import superlora as sl
from superlora import _backend
from tests import conftest
from tests.strategies import draw_factors


@pytest.mark.parametrize("package", ["torch", "jax", "cupy", "tensorflow", "paddle"])
def test_the_library_is_installed_and_so_all_of_its_tests_run(package):
    if not conftest.is_installed(package):
        pytest.skip(f"{package} is not installed: its rows are left out")
    assert package in {name for name, _ in conftest.LIBRARIES.values()}


def test_the_backend_is_that_of_the_type(xp):
    library = _backend.backend_of(xp.like)
    assert library.backend_name == {"torch": "pytorch"}.get(xp.name, xp.name)
    assert _backend.backend_of(xp.like, xp.like) is library


def test_subclasses_belong_to_their_base():
    class Marked(numpy.ndarray):
        pass

    assert _backend.backend_of(numpy.zeros(2).view(Marked)).backend_name == "numpy"
    torch = pytest.importorskip("torch")
    assert _backend.backend_of(torch.nn.Parameter(torch.zeros(2))).backend_name == "pytorch"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ((), "arrays must not be empty: got none"),
        (([1.0],), r"arrays must be of numpy, torch, .*: got builtins\.list"),
        ((numpy.zeros(2), 3), r"arrays must be of numpy, torch, .*: got builtins\.int"),
    ],
)
def test_what_is_no_array_has_no_backend(arrays, message):
    with pytest.raises(TypeError, match=message):
        _backend.backend_of(*arrays)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_numbers_become_arrays_like_another(xp, dtype):
    like = xp.array(numpy.zeros(3, dtype=dtype))
    values = numpy.arange(6.0).reshape(2, 3)
    for array, expected in [
        (_backend.from_numpy(values, like), values),
        (_backend.zeros((2, 3), like), 0 * values),
    ]:
        assert xp.owns(array)
        assert array.dtype == like.dtype
        numpy.testing.assert_array_equal(xp.to_numpy(array), expected)


def test_all_libraries_work_in_one_process_whatever_tensorlys_default(xp):
    plan = sl.Plan(sl.lotr(rank=2), {"0.q": (6, 4), "1.q": (6, 4)})
    factors = draw_factors(plan)
    expected = plan.delta(factors, "1.q")
    defaults = ["numpy", *(["pytorch"] if conftest.is_installed("torch") else [])]
    for default in defaults:
        with tensorly.backend_context(default):
            delta = plan.delta(xp.arrays(factors), "1.q")
            assert tensorly.get_backend() == default
        assert xp.owns(delta)
        numpy.testing.assert_allclose(xp.to_numpy(delta), expected, rtol=1e-12)


def test_threads_do_not_see_each_other(xp):
    plan = sl.Plan(sl.lora(rank=2), {"q": (6, 4)})
    factors = draw_factors(plan)
    expected = plan.delta(factors, "q")
    results = []

    def work():
        for _ in range(5):
            results.append(plan.delta(factors, "q"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    mine = [plan.delta(xp.arrays(factors), "q") for _ in range(5)]
    for thread in threads:
        thread.join()
    assert len(results) == 20
    assert all(type(result) is numpy.ndarray for result in results)
    assert all(xp.owns(result) for result in mine)
    for result in [*results, *map(xp.to_numpy, mine)]:
        numpy.testing.assert_allclose(result, expected, rtol=1e-12)


@pytest.mark.parametrize("globally", [False, True])
@pytest.mark.parametrize("locally", [False, True])
def test_the_first_use_of_jax_leaves_its_precision_alone(monkeypatch, globally, locally):
    jax = pytest.importorskip("jax")
    # As in a process that has not used jax yet: TensorLy's import switches its precision.
    monkeypatch.setattr(_backend, "_loaded", {})
    monkeypatch.delitem(Backend._available_backends, "jax", raising=False)
    monkeypatch.delitem(sys.modules, "tensorly.backend.jax_backend", raising=False)
    flag = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", globally)
    try:
        before = conftest.global_state()
        with conftest.jax_x64(locally):
            inside = conftest.global_state()
            sl.kronecker([jax.numpy.ones((2, 2))] * 2)
            assert "tensorly.backend.jax_backend" in sys.modules
            assert conftest.global_state() == inside
        assert conftest.global_state() == before
    finally:
        jax.config.update("jax_enable_x64", flag)


def test_the_watch_over_global_state_can_fail():
    before = conftest.global_state()
    assert before == conftest.global_state()
    if conftest.is_installed("torch"):
        with tensorly.backend_context("pytorch"):
            assert conftest.global_state() != before
    if conftest.is_installed("jax"):
        import jax

        known = conftest.global_state()
        flag = jax.config.jax_enable_x64
        jax.config.update("jax_enable_x64", not flag)
        changed = conftest.global_state()
        jax.config.update("jax_enable_x64", flag)
        assert changed != known
    assert conftest.global_state() == before
