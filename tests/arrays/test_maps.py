"""Maps: linear, with their adjoints, and open to maps of our own."""

from __future__ import annotations

import abc
import dataclasses
import json

import numpy
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import superlora as sl
from superlora import maps
from tests.strategies import Mixing, Permuting


@dataclasses.dataclass(frozen=True)
class Picking(maps.Map):
    """Entries by their positions, which a file must hold."""

    positions: tuple[int, ...]

    def apply(self, x, size):
        return x[list(self.positions)][:size]

    def adjoint(self, y, size):
        raise NotImplementedError


CASES = [(1, 1), (6, 6), (6, 4), (5, 1)]  # entries before, entries after


def draw(size, seed=0):
    return numpy.random.default_rng(seed).standard_normal(size)


def rows(*known):
    """Pair every map with the sizes that it allows; the identity makes nothing longer."""
    return [
        pytest.param(fixed, before, size, id=f"{type(fixed).__name__}-{before}-{size}")
        for fixed in known
        for before, size in [*CASES, (4, 9)]
        if size <= before or not isinstance(fixed, maps.Identity)
    ]


every_map = pytest.mark.parametrize(
    ("fixed", "before", "size"), rows(maps.Identity(), Mixing(3), Permuting(3))
)


@every_map
def test_the_adjoint_passes_the_dot_test(xp, fixed, before, size):
    x, y = draw(before), draw(size, seed=1)
    forward = fixed.apply(xp.array(x), size)
    backward = fixed.adjoint(xp.array(y), before)
    assert xp.owns(forward)
    assert xp.owns(backward)
    assert forward.shape == (size,)
    assert backward.shape == (before,)
    left, right = numpy.vdot(xp.to_numpy(forward), y), numpy.vdot(x, xp.to_numpy(backward))
    assert_allclose(left, right, rtol=1e-12)


@every_map
def test_a_map_is_linear(xp, fixed, before, size):
    x, y = draw(before), draw(before, seed=1)
    parts = [xp.to_numpy(fixed.apply(xp.array(part), size)) for part in (x, y, 2 * x - 3 * y)]
    assert_allclose(parts[2], 2 * parts[0] - 3 * parts[1], rtol=1e-12, atol=1e-12)


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
    assert maps.Map._known["Mixing"] is Mixing
