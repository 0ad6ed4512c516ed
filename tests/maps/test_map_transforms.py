"""Maps under differentiation, vectorisation and compilers, and what these leave behind."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import sys
import threading

import numpy
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from superlora import maps
from tests.conftest import jax_x64
from tests.maps.map_cases import KINDS, draw, every_kind, matrix_of, rows


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def jax():
    module = pytest.importorskip("jax")
    with jax_x64():
        yield module


def calls(fixed, before, size):
    """Return both directions, their matrices and the entries that they take."""
    matrix = matrix_of(fixed, before, size)
    slice_ = (size // 3, size - 1)
    return [
        (lambda x: fixed.apply(x, size), matrix, before),
        (lambda x: fixed.apply_slice(x, size, *slice_), matrix[slice(*slice_)], before),
        (lambda y: fixed.adjoint(y, before), matrix.T, size),
    ]


# torch's own forward mode makes use of it.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@every_kind
def test_torch_differentiates_and_vectorises(torch, fixed, before, size):
    for call, matrix, entries in calls(fixed, before, size):
        x = torch.tensor(draw(entries), requires_grad=True)
        assert torch.autograd.gradcheck(call, (x,))
        batch = torch.tensor(draw((3, entries), seed=1))
        found = torch.func.vmap(call)(batch)
        assert_allclose(found.numpy(), batch.numpy() @ matrix.T, rtol=1e-10, atol=1e-12)
        for jacobian in (torch.func.jacrev, torch.func.jacfwd):
            assert_allclose(jacobian(call)(x.detach()).numpy(), matrix, atol=1e-12)
        _, tangent = torch.func.jvp(call, (x.detach(),), (batch[0],))
        assert_allclose(tangent.numpy(), matrix @ batch[0].numpy(), rtol=1e-10, atol=1e-12)


@every_kind
def test_jax_differentiates_vectorises_and_compiles(jax, fixed, before, size):
    fixed = dataclasses.replace(fixed)
    there, _, back = calls(fixed, before, size)

    @jax.jit
    def both(*batches):
        found = []
        for (call, _, _), batch in zip((there, back), batches, strict=True):
            gradient = jax.grad(lambda x, call=call: (call(x) ** 2).sum() / 2)
            found.append((jax.vmap(call)(batch), gradient(batch[0])))
        return found

    batches = draw((3, before)), draw((3, size))
    results = both(*batches)  # the first call of all is traced
    for (found, gradient), (_, matrix, _), batch in zip(
        results, (there, back), batches, strict=True
    ):
        assert_allclose(found, batch @ matrix.T, rtol=1e-10, atol=1e-12)
        assert_allclose(gradient, matrix.T @ (matrix @ batch[0]), rtol=1e-10, atol=1e-12)
    for kept in vars(fixed).get("_constants", {}).values():
        assert type(kept) is numpy.ndarray


@pytest.mark.parametrize(
    ("fixed", "before", "size"),
    [
        pytest.param(*case.values, id=case.id, marks=[pytest.mark.slow] if place % 4 else [])
        for place, case in enumerate(rows(KINDS))
    ],
)
def test_torch_compiles_it_whole_once_it_has_drawn(torch, fixed, before, size):
    (there, matrix, _), _, (back, _, _) = calls(fixed, before, size)
    x = torch.tensor(draw(before), requires_grad=True)
    back(there(x.detach()))
    torch.compiler.reset()
    loop = torch.compile(lambda x: back(there(x)), fullgraph=True, backend="aot_eager")(x)
    assert_allclose(loop.detach().numpy(), matrix.T @ (matrix @ draw(before)), rtol=1e-10)
    (gradient,) = torch.autograd.grad(loop @ loop / 2, x)
    expected = matrix.T @ matrix @ loop.detach().numpy()
    assert_allclose(gradient.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
def test_torch_traces_a_first_call_with_and_without_sizes(torch, tracing):
    from torch.fx.experimental.proxy_tensor import make_fx

    for fixed, size in [(maps.Fastfood(), 13), (maps.OneHot(), 13), (maps.Shuffle(), 5)]:
        again = dataclasses.replace(fixed)
        x, matrix = torch.tensor(draw(5)), matrix_of(fixed, 5, size)
        graph = make_fx(functools.partial(again.apply, size=size), tracing_mode=tracing)(x)
        assert_allclose(graph(x).numpy(), matrix @ x.numpy(), atol=1e-12)
        assert_allclose(again.apply(x, size).numpy(), matrix @ x.numpy(), atol=1e-12)


def spoilt(torch):
    """Return contexts in which a first call must leave nothing behind that serves no other."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return [torch.inference_mode, torch.no_grad, FakeTensorMode, lambda: torch.device("meta")]


@every_kind
@pytest.mark.parametrize("index", range(4))
def test_a_first_call_in_any_mode_spoils_no_later_one(torch, fixed, before, size, index):
    fixed = dataclasses.replace(fixed)
    with spoilt(torch)[index]():
        for call, matrix, entries in calls(fixed, before, size):
            assert call(torch.zeros(entries)).shape == matrix.shape[:1]
    for call, matrix, entries in calls(fixed, before, size):
        x = torch.tensor(draw(entries), requires_grad=True)
        y = call(x)
        assert_allclose(y.detach().numpy(), matrix @ draw(entries), rtol=1e-10, atol=1e-12)
        y.sum().backward()
        assert_allclose(x.grad.numpy(), matrix.sum(axis=0), rtol=1e-10, atol=1e-12)
    with spoilt(torch)[2]():  # and what is kept serves tensors without values
        assert fixed.apply(torch.zeros(before), size).shape == (size,)


def test_numbers_among_tensors_without_values_are_not_kept(torch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    fixed, x = maps.OneHot(seed=8), torch.tensor(draw(5))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert fixed.apply(x, 13).shape == (13,)
    assert_allclose(fixed.apply(x, 13).numpy(), matrix_of(fixed, 5, 13) @ x.numpy(), rtol=1e-12)


@every_kind
def test_a_traced_or_vectorised_first_call_spoils_no_later_one(torch, fixed, before, size):
    fixed = dataclasses.replace(fixed)
    for call, matrix, entries in calls(fixed, before, size):
        x = torch.tensor(draw(entries))
        torch.func.vmap(torch.func.grad(lambda x, call=call: call(x).sum()))(x[None])
        assert_allclose(call(x).numpy(), matrix @ x.numpy(), rtol=1e-10, atol=1e-12)


@every_kind
def test_one_map_serves_all_libraries_and_precisions_at_once(torch, jax, fixed, before, size):
    fixed = dataclasses.replace(fixed)
    x, matrix = draw(before), matrix_of(fixed, before, size)
    arrays = [x.astype(numpy.float32), torch.tensor(x), jax.numpy.asarray(x), x]
    arrays += [torch.tensor(x).float(), torch.nn.Parameter(torch.tensor(x))]
    for array in arrays:
        found = fixed.apply(array, size)
        assert isinstance(found, torch.Tensor if isinstance(array, torch.Tensor) else type(array))
        found = numpy.asarray(found.detach() if isinstance(found, torch.Tensor) else found)
        rtol = 1e-5 if array.dtype in (numpy.float32, torch.float32) else 1e-11
        assert_allclose(found, matrix @ x, rtol=rtol, atol=rtol)


def test_threads_share_a_map():
    fixed, x = maps.Fastfood(blocks="stacked", order="le"), draw(5)
    expected = matrix_of(fixed, 5, 999)[:, :] @ x
    found: list = []
    start = threading.Barrier(8)

    def work():
        start.wait()
        found.append(fixed.apply(x, 999))
        found.append(fixed.apply_slice(x, 999, 100, 300))

    threads = [threading.Thread(target=work) for _ in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(found) == 16
    for y in found:
        assert_allclose(y, expected if len(y) == 999 else expected[100:300], atol=1e-12)


@every_kind
def test_what_is_kept_is_no_part_of_the_value(fixed, before, size):
    fresh = dataclasses.replace(fixed)
    used = dataclasses.replace(fixed)
    y = used.apply(draw(before), size)
    used.adjoint(y, before)
    assert used == fresh
    assert hash(used) == hash(fresh)
    assert repr(used) == repr(fresh)
    assert used.to_dict() == fresh.to_dict()
    assert len(pickle.dumps(used)) == len(pickle.dumps(fresh))
    for again in (pickle.loads(pickle.dumps(used)), copy.copy(used)):
        assert "_constants" not in vars(again)
        assert again == used
        assert_array_equal(again.apply(draw(before), size), y)
    # It cannot change, so that a copied model shares it.
    assert copy.deepcopy(used) is used
