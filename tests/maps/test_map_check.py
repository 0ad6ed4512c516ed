"""`maps.check`, and the documentation's map of one's own, on every library."""

from __future__ import annotations

import re
from pathlib import Path

import numpy
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import superlora as sl
from superlora import maps
from superlora.maps._check import is_own
from tests.conftest import LIBRARIES
from tests.maps.map_cases import KINDS, as_dtype, draw, every_kind, rows
from tests.pairs import pairwise
from tests.strategies import Mixing, Permuting
from tests.test_docs import read_blocks

PAGE = Path(__file__).parents[2] / "docs" / "own-maps.md"


@pytest.fixture(scope="module")
def own():
    """The names that the page's blocks define."""
    names: dict = {"__name__": "__main__"}
    for block in read_blocks(PAGE.read_text("utf-8")):
        if ">>>" not in block:
            exec(compile(block, str(PAGE), "exec"), names)
    yield names
    for name in ("Symmetric", "RepeatedSigns"):
        maps.Map._known.pop(name, None)


@pytest.fixture(scope="module")
def symmetric(own):
    return own["Symmetric"]


def test_the_recipe_with_a_seed_is_a_map_on_every_library(xp, own):
    fixed = own["RepeatedSigns"](seed=1)
    for size in (36, 144, 150):
        maps.check(fixed, 36, size, like=xp.like)
        maps.check(fixed, 36, size, like=as_dtype(xp, numpy.zeros(1), "float32"))
    x = draw(36)
    assert_allclose(
        xp.to_numpy(fixed.apply(xp.array(x), 144)), numpy.tile(x, 4) * fixed.signs(144) / 2
    )
    assert_allclose(fixed.gain(36, 144), numpy.mean(fixed.apply(x, 144) ** 2) / numpy.mean(x**2))
    with pytest.raises(ValueError, match="size must be at least 36"):
        fixed.check(36, 35)


def test_the_recipe_is_a_map_on_every_library(xp, symmetric):
    fixed = symmetric()
    maps.check(fixed, 10, 16, like=xp.like)
    maps.check(fixed, 10, 16, like=as_dtype(xp, numpy.zeros(1), "float32"))
    lower = numpy.zeros((4, 4))
    lower[numpy.tril_indices(4)] = theta = draw(10)
    expected = lower + numpy.tril(lower, -1).T
    plan = sl.Plan(sl.dense(map=fixed, scale=0.5), {"q": (4, 4)})
    assert plan.factor_shapes == {"0.0.core": (10,)}
    delta = xp.to_numpy(plan.delta({"0.0.core": xp.array(theta)}, "q"))
    assert_allclose(delta, 0.5 * expected, rtol=1e-12)


def test_the_recipe_is_differentiated(symmetric):
    torch = pytest.importorskip("torch")
    x = torch.tensor(draw(10), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: symmetric().apply(x, 16), (x,))


@every_kind
def test_maps_of_the_library_pass(fixed, before, size):
    maps.check(fixed, before, size)


@pairwise(
    {
        "case": {case.id: case.values for case in rows([*KINDS[::4], (Mixing(3), 5, 7)])},
        "dtype": ["float64", "float32", "bfloat16"],
        "xp": LIBRARIES,
    },
    indirect=["xp"],
)
def test_they_pass_in_any_dtype_of_any_library(xp, case, dtype):
    fixed, before, size = case
    if xp.name == "numpy" and dtype == "bfloat16":
        dtype = "float16"
    maps.check(fixed, before, size, like=as_dtype(xp, numpy.zeros(1), dtype))


def wrong(**methods):
    """Return a map that is `Permuting` but for some methods."""
    kind = type("Faulty", (Permuting,), {"__module__": __name__, **methods})
    del maps.Map._known["Faulty"]
    return kind(1)


def added(self, x, size):
    return Permuting.apply(self, x, size) + 0.1


def squared(self, x, size):
    return Permuting.apply(self, x, size) ** 3


def absolute(self, x, size):
    return abs(Permuting.apply(self, x, size))


def ranked(self, x, size):
    return numpy.sort(Permuting.apply(self, x, size))


def halved(self, y, size):
    return Permuting.adjoint(self, y, size) / 2


def shifted(self, x, size, start, stop):
    return numpy.roll(Permuting.apply(self, x, size), 1)[start:stop]


def short(self, x, size):
    return Permuting.apply(self, x, size)[1:]


def single(self, y, size):
    return Permuting.adjoint(self, y, size).astype("float32")


def undefined(self, x, size):
    return Permuting.apply(self, x, size) * numpy.nan


LINEAR = r"F\(-2 x\)\[\d\] must be -2 F x: expected -?\d"
ADJOINT = "⟨x, Fᵀ y⟩ must be ⟨F x, y⟩: expected -?[0-9]"


@pytest.mark.parametrize(
    ("methods", "match"),
    [
        ({"apply": added}, LINEAR),
        ({"apply": squared}, LINEAR),
        ({"apply": absolute}, LINEAR),
        ({"apply": ranked}, LINEAR),
        ({"apply": undefined}, "must be -2 F x: expected nan, got nan"),
        ({"adjoint": halved}, ADJOINT),
        (
            {"apply_slice": shifted},
            r"apply_slice from 3 to 9 must be what apply has at \d: expected -?\d",
        ),
        ({"apply": short}, r"F x must have the shape \(9,\) and dtype float64: got \(8,\)"),
        ({"adjoint": single}, r"Fᵀ y must have the shape \(5,\) .*: got \(5,\) and float32"),
    ],
)
def test_a_wrong_map_is_refused_in_words(methods, match):
    fixed = wrong(**methods)
    with pytest.raises(ValueError, match=f"^Faulty from 5 to 9 entries: .*{match}"):
        maps.check(fixed, 5, 9)


def test_a_map_that_is_of_another_library_is_refused():
    torch = pytest.importorskip("torch")
    fixed = wrong(apply=lambda self, x, size: numpy.zeros(size))
    with pytest.raises(TypeError, match="arrays must be of one library"):
        maps.check(fixed, 5, 9, like=torch.zeros(1))


def test_sizes_that_a_map_cannot_serve_are_refused():
    with pytest.raises(ValueError, match=re.escape("size must be at least 5")):
        maps.check(maps.OneHot(), 5, 3)


def test_a_check_calls_a_map_as_often_as_it_says_and_draws_from_no_global_numbers():
    called: list = []

    def noted(name):
        def method(self, *args):
            called.append(name)
            return getattr(Permuting, name)(self, *args)

        return method

    fixed = wrong(**{name: noted(name) for name in ("apply", "adjoint")})
    before = numpy.random.get_state()[1].copy()  # noqa: NPY002
    maps.check(fixed, 5, 9)
    assert_array_equal(numpy.random.get_state()[1], before)  # noqa: NPY002
    assert sorted(called) == ["adjoint", "apply", "apply"]


def test_a_large_map_is_checked_at_once():
    maps.check(maps.OneHot(window=4096), 10**5, 10**6)


def test_which_maps_are_ones_own():
    own, ours = Mixing(1), maps.OneHot()
    assert is_own(own)
    assert is_own(maps.Composed(first=ours, second=own))
    assert is_own(maps.BlockDiagonal(parts=(ours, own)))
    assert not is_own(ours)
    assert not any(is_own(fixed) for fixed, *_ in KINDS)
