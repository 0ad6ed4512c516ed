"""Maps: linear, with their adjoints, and open to maps of our own."""

from __future__ import annotations

import abc
import dataclasses
import itertools
import json

import numpy
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import superlora as sl
from superlora import maps
from superlora.maps import fastfood, gaussian, index_maps, one_hot, separable
from tests.maps.map_cases import (
    CASES,
    KINDS,
    as_double,
    as_dtype,
    draw,
    every_case,
    matrix_of,
    rows,
)
from tests.strategies import Mixing, Permuting


@dataclasses.dataclass(frozen=True)
class Picking(maps.Map):
    """Entries by their positions, which a file must hold."""

    positions: tuple[int, ...]

    def apply(self, x, size):
        return x[list(self.positions)][:size]

    def adjoint(self, y, size):
        raise NotImplementedError


SIZES = [(1, 1), (6, 6), (6, 4), (5, 1), (4, 9)]  # entries before, entries after
OWN = [(fixed, *sizes) for fixed in (Mixing(3), Permuting(3)) for sizes in SIZES]
IDENTITY = [(maps.Identity(), *sizes) for sizes in SIZES if sizes[1] <= sizes[0]]


@pytest.mark.parametrize(("fixed", "before", "size"), rows(KINDS[::4] + OWN + IDENTITY))
def test_the_adjoint_passes_the_dot_test(xp, fixed, before, size):
    x, y = draw(before), draw(size, seed=1)
    forward = fixed.apply(xp.array(x), size)
    backward = fixed.adjoint(xp.array(y), before)
    assert xp.owns(forward)
    assert xp.owns(backward)
    assert forward.shape == (size,)
    assert backward.shape == (before,)
    left, right = numpy.vdot(xp.to_numpy(forward), y), numpy.vdot(x, xp.to_numpy(backward))
    assert_allclose(left, right, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("fixed", "before", "size"), rows(CASES + IDENTITY))
def test_a_map_is_its_matrix(fixed, before, size):
    matrix = matrix_of(fixed, before, size)
    assert matrix.shape == (size, before)
    x, y = draw(before), draw(size, seed=1)
    assert_allclose(fixed.apply(x, size), matrix @ x, rtol=1e-12, atol=1e-12)
    assert_allclose(fixed.adjoint(y, before), matrix.T @ y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("fixed", "before", "size"), rows([*CASES[::9], *KINDS]))
def test_it_is_so_on_every_library_the_first_time_and_later(xp, fixed, before, size):
    matrix = matrix_of(fixed, before, size)
    x, y = draw(before), draw(size, seed=1)
    again = dataclasses.replace(fixed)  # of an empty memory
    for _ in range(2):
        found = xp.to_numpy(again.apply(xp.array(x), size))
        assert_allclose(found, matrix @ x, rtol=1e-12, atol=1e-12)
        found = xp.to_numpy(again.adjoint(xp.array(y), before))
        assert_allclose(found, matrix.T @ y, rtol=1e-12, atol=1e-12)


ROUNDING = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}


@pytest.mark.parametrize("index", range(len(KINDS)))
def test_the_dtype_stays_and_the_result_is_rounded_once(xp, index):
    fixed, before, size = KINDS[index]
    matrix, norm = matrix_of(fixed, before, size), numpy.linalg.norm
    dtypes = {"numpy": ["float32", "float16"], "torch": list(ROUNDING)}
    # jax compiles every operation for every dtype: one a map.
    for dtype in dtypes.get(xp.name, [list(ROUNDING)[index % 3]]):
        x, y = as_dtype(xp, draw(before), dtype), as_dtype(xp, draw(size, seed=1), dtype)
        forward, backward = fixed.apply(x, size), fixed.adjoint(y, before)
        assert forward.dtype == x.dtype
        assert backward.dtype == y.dtype
        x, y, forward, backward = (as_double(xp, array) for array in (x, y, forward, backward))
        assert norm(forward - matrix @ x) <= ROUNDING[dtype] * norm(matrix @ x)
        assert norm(backward - matrix.T @ y) <= ROUNDING[dtype] * norm(matrix.T @ y)


@every_case
def test_a_slice_is_what_the_whole_has_there(fixed, before, size):
    x = draw(before)
    whole = fixed.apply(x, size)
    for start, stop in itertools.combinations(range(size + 1), 2):
        found = fixed.apply_slice(x, size, start, stop)
        assert_allclose(found, whole[start:stop], rtol=1e-12, atol=1e-14)


def small_chunks(monkeypatch):
    for module, name, value in [
        (fastfood, "_CHUNK", 16),
        (one_hot, "_CHUNK", 12),
        (index_maps, "CHUNK", 4),
        (gaussian, "_CHUNK", 32),
        (gaussian, "_KEPT", 50),
        (gaussian, "_RUN", 4),
        (separable, "_DENSE", 4),
    ]:
        monkeypatch.setattr(module, name, value)


@every_case
def test_chunks_change_nothing(monkeypatch, fixed, before, size):
    x, y = draw(before), draw(size, seed=1)
    small_chunks(monkeypatch)
    matrix = matrix_of(fixed, before, size)
    again = dataclasses.replace(fixed)
    assert_allclose(again.apply(x, size), matrix @ x, atol=1e-12)
    assert_allclose(again.adjoint(y, before), matrix.T @ y, atol=1e-12)
    for start, stop in itertools.combinations(range(0, size + 1, 2), 2):
        found = again.apply_slice(x, size, start, stop)
        assert_allclose(found, (matrix @ x)[start:stop], atol=1e-12)


@pytest.mark.parametrize(("fixed", "before", "size"), rows(KINDS[1::4]))
def test_chunks_join_on_every_library(monkeypatch, xp, fixed, before, size):
    small_chunks(monkeypatch)
    x, y, matrix = draw(before), draw(size, seed=1), matrix_of(fixed, before, size)
    again = dataclasses.replace(fixed)
    found = xp.to_numpy(again.apply(xp.array(x), size))
    assert_allclose(found, matrix @ x, atol=1e-12)
    found = xp.to_numpy(again.adjoint(xp.array(y), before))
    assert_allclose(found, matrix.T @ y, atol=1e-12)


@pytest.mark.parametrize(
    ("fixed", "before", "size"),
    [
        (maps.Fastfood(blocks="stacked"), 3, (1 << 18) + 1021),
        (maps.Fastfood(blocks="stacked", order="le"), 700, (1 << 18) + 1021),
        (maps.OneHot(), 3, (1 << 19) + 1021),
        (maps.OneHot(tiled=False), 70_000, (1 << 19) + 1021),
        (maps.OneHot(), 70_000, (1 << 19) + 1021),
        (maps.OneHot(window=4096), 70_000, (1 << 19) + 1021),
        (maps.OneHot(window=70_000), 80_000, (1 << 19) + 1021),
        (maps.Gaussian(structured=True), 700, (1 << 18) + 1021),
        (maps.Shuffle(stored=False), (1 << 20) + 5, (1 << 20) + 5),
    ],
)
def test_several_chunks_of_the_real_size_pass_the_dot_test(fixed, before, size):
    x, y = draw(before), draw(size, seed=1)
    forward = fixed.apply(x, size)
    assert_allclose(forward @ y, x @ fixed.adjoint(y, before), rtol=1e-8)
    for start, stop in [(size - 9, size), (1 << 18, (1 << 18) + 1), (5, size // 2 + 3)]:
        found = fixed.apply_slice(x, size, start, stop)
        assert_allclose(found, forward[start:stop], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("stored", ["Fastfood", "OneHot", "Shuffle"])
def test_what_is_not_kept_is_drawn_the_same(stored):
    for fixed, before, size in CASES:
        if type(fixed).__name__ == stored:
            other = dataclasses.replace(fixed, stored=not fixed.stored)
            x, y = draw(before), draw(size)
            assert_array_equal(other.apply(x, size), fixed.apply(x, size))
            assert_array_equal(other.adjoint(y, before), fixed.adjoint(y, before))
            assert ("_constants" in vars(other)) == other.stored


def is_exact(fixed):
    """Return whether the mean square of the entries does not depend on the draw."""
    by_draw = any(word in repr(fixed) for word in ("Gaussian", "Fastfood", "Fourier"))
    some = isinstance(fixed, maps.Wavelet) and fixed.positions is not None
    return not by_draw and not some and not isinstance(fixed, maps.Selection)


@pytest.mark.parametrize(("fixed", "before", "size"), rows(c for c in CASES if is_exact(c[0])))
def test_the_mean_square_is_the_gain(fixed, before, size):
    matrix = matrix_of(fixed, before, size)
    assert_allclose((matrix**2).sum() / size, fixed.gain(before, size), rtol=1e-12)


@pytest.mark.parametrize("fixed", [fixed for fixed, *_ in CASES if not fixed.keeps_size][1::7])
def test_nothing_that_is_not_a_number_is_hidden(xp, fixed):
    _, before, size = next(case for case in CASES if case[0] is fixed)
    reached = matrix_of(fixed, before, size)[:, 0]
    x = draw(before)
    x[0] = numpy.nan
    found = numpy.isnan(xp.to_numpy(fixed.apply(xp.array(x), size)))
    assert found[abs(reached) > 1e-9].all()
    y = draw(size)
    y[-1] = numpy.nan
    met = numpy.isnan(xp.to_numpy(fixed.adjoint(xp.array(y), before)))
    assert met[abs(matrix_of(fixed, before, size)[-1]) > 1e-9].all()


def test_the_identity_crops_and_pads(xp):
    x = draw(5)
    assert_array_equal(xp.to_numpy(maps.Identity().apply(xp.array(x), 3)), x[:3])
    padded = xp.to_numpy(maps.Identity().adjoint(xp.array(x), 7))
    assert_array_equal(padded, [*x, 0.0, 0.0])


def test_the_identity_refuses_to_make_up_or_to_lose_entries(xp):
    x = xp.array(draw(5))
    with pytest.raises(ValueError, match="size must be at most 5, the entries of x: got 6"):
        maps.Identity().apply(x, 6)
    with pytest.raises(ValueError, match="size must be at least 5, the entries of y: got 4"):
        maps.Identity().adjoint(x, 4)


@pytest.mark.parametrize("fixed", [Mixing(5), Permuting(5)])
@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.05])
def test_a_map_of_ones_own_in_the_plan_is_its_matrix(xp, fixed, ratio):
    spec = sl.dense(groups=1, fold="balanced", map=fixed, ratio=ratio, scale=0.5)
    plan = sl.Plan(spec, {"q": (4, 6), "v": (5, 3)})
    (before,) = plan.factor_shapes["0.0.core"]
    theta = draw(before)
    expected = 0.5 * fixed.matrix(before, 39) @ theta
    factors = {"0.0.core": xp.array(theta)}
    x = draw((2, 6), seed=1)
    for deltas in (plan.deltas(factors), {name: plan.delta(factors, name) for name in "qv"}):
        assert_allclose(xp.to_numpy(deltas["q"]), expected[:24].reshape(4, 6), rtol=1e-12)
        assert_allclose(xp.to_numpy(deltas["v"]), expected[24:].reshape(5, 3), rtol=1e-12)
    result = xp.to_numpy(plan.apply(factors, "q", xp.array(x)))
    assert_allclose(result, x @ expected[:24].reshape(4, 6).T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("ratio", "held", "before"), [(1.0, 24, 24), (0.5, 24, 12), (0.3, 24, 8), (0.001, 24, 1)]
)
def test_the_ratio_is_rounded_up(ratio, held, before):
    plan = sl.Plan(sl.dense(fold="balanced", map=Mixing(), ratio=ratio), {"q": (1, held)})
    assert plan.num_parameters == before


@pytest.mark.parametrize(("ratio", "before"), [(0.07, 7), (0.55, 55), (0.29, 29)])
def test_a_whole_number_of_entries_is_not_rounded_up(ratio, before):
    # 0.07 * 100 is 7.000000000000001 in floating point.
    plan = sl.Plan(sl.dense(fold="balanced", map=Mixing(), ratio=ratio), {"q": (1, 100)})
    assert plan.num_parameters == before


def test_a_map_with_a_tuple_survives_json():
    spec = sl.Spec(fold="balanced", map=Picking((2, 0, 1)))
    again = sl.Spec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert hash(again) == hash(spec)


def test_a_map_is_a_frozen_value():
    assert Mixing(1) == Mixing(1) != Mixing(2)
    assert hash(Mixing(1)) == hash(Mixing(1))
    assert Mixing(1).to_dict() == {"name": "Mixing", "seed": 1}
    with pytest.raises(dataclasses.FrozenInstanceError):
        Mixing(1).seed = 2


def test_a_map_without_adjoint_cannot_be_made():
    class Half(maps.Map):
        def apply(self, x, size):
            return x

    try:
        with pytest.raises(TypeError, match="adjoint"):
            Half()
        assert abc.ABC in maps.Map.__mro__
    finally:
        del maps.Map._known["Half"]


def test_two_maps_of_one_name_are_refused():
    with pytest.raises(TypeError, match=r"'Mixing' exists already in tests\.strategies"):
        type("Mixing", (maps.Map,), {"__module__": "elsewhere"})
    spec = sl.dense(fold="balanced", map=Mixing(4))
    assert type(sl.Spec.from_dict(spec.to_dict()).map) is Mixing
