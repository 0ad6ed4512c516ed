"""Maps as values: fields, files, and what they refuse in words."""

from __future__ import annotations

import dataclasses
import json
import re
import tracemalloc

import numpy
import pytest
from numpy.testing import assert_array_equal

from superlora import maps
from superlora.maps import map_from_dict
from tests.maps.map_cases import CASES, KINDS, NESTED, draw, every_kind, rows
from tests.strategies import Mixing

ALL = [*CASES, (maps.Identity(), 5, 4), (maps.Shuffle(scope="all", shared=False), 5, 5)]


@pytest.mark.parametrize(("fixed", "before", "size"), rows(ALL))
def test_a_map_survives_json(fixed, before, size):
    again = map_from_dict(json.loads(json.dumps(fixed.to_dict())))
    assert again == fixed
    assert hash(again) == hash(fixed)
    assert repr(again) == repr(fixed)
    assert again.checksum(before, size) == fixed.checksum(before, size)
    assert_array_equal(again.apply(draw(before), size), fixed.apply(draw(before), size))


def test_a_one_hot_map_without_a_window_has_the_file_of_before_there_was_one():
    assert "window" not in maps.OneHot().to_dict()
    assert maps.OneHot(window=5).to_dict()["window"] == 5


def test_maps_of_other_fields_are_other_values():
    known = dict.fromkeys(fixed for fixed, *_ in CASES)
    dicts = {json.dumps(fixed.to_dict(), sort_keys=True) for fixed in known}
    assert len(dicts) == len(known)
    assert len({hash(fixed) for fixed in known}) == len(known)


def test_a_nested_file_is_readable():
    assert NESTED.to_dict()["first"]["parts"][0] == {
        "name": "OneHot",
        "seed": 5,
        "shared": True,
        "version": 1,
        "substream": 0,
        "tiled": True,
        "signed": True,
        "normalize": "isometric",
        "stored": True,
    }
    bare = {"name": "Composed", "first": {"name": "Identity"}, "second": {"name": "Shuffle"}}
    assert map_from_dict(bare) == maps.Composed(first=maps.Identity(), second=maps.Shuffle())


@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        (3, TypeError, "map must be a mapping with a name: got 3"),
        ({}, ValueError, "got None"),
        ({"name": "Nothing"}, ValueError, "map must be one of ['BlockDiagonal', 'Broadcast'"),
        ({"name": ["Shuffle"]}, ValueError, "got ['Shuffle']"),
        ({"name": "SeededMap"}, ValueError, "got 'SeededMap'"),
        ({"name": "Map"}, ValueError, "got 'Map'"),
        ({"name": "Shuffle", "sead": 1}, ValueError, "map Shuffle has wrong fields: "),
        ({"name": "Shuffle", "seed": "1"}, ValueError, "seed must be an integer: got '1'"),
        ({"name": "Selection"}, ValueError, "map Selection has wrong fields: "),
        ({"name": "Shuffle", "version": 2}, ValueError, "version must be 1, the derivation here"),
    ],
)
def test_a_wrong_file_is_refused(values, error, match):
    with pytest.raises(error, match=re.escape(match)) as caught:
        map_from_dict(values)
    assert "CheckedMap" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "fields", "error", "match"),
    [
        ("Shuffle", {"seed": -1}, ValueError, "seed must be at least 0: got -1"),
        ("Shuffle", {"seed": 2**64}, ValueError, "seed must be below 2**64"),
        ("Shuffle", {"seed": 1.0}, TypeError, "seed must be an integer: got 1.0"),
        ("Shuffle", {"seed": True}, TypeError, "seed must be an integer: got True"),
        ("Shuffle", {"version": 1.0}, TypeError, "version must be an integer: got 1.0"),
        ("Shuffle", {"version": 0}, ValueError, "version must be at least 1: got 0"),
        ("Shuffle", {"substream": 2**24}, ValueError, "substream must be below 16777216"),
        ("Shuffle", {"substream": -1}, ValueError, "substream must be at least 0: got -1"),
        ("Shuffle", {"scope": "none"}, ValueError, "scope must be one of ('group', 'all')"),
        ("Shuffle", {"shared": 1}, ValueError, "shared must be one of (True, False): got 1"),
        ("OneHot", {"signed": 1.0}, ValueError, "signed must be one of (True, False): got 1.0"),
        ("OneHot", {"tiled": None}, ValueError, "tiled must be one of (True, False): got None"),
        ("OneHot", {"window": 0}, ValueError, "window must be at least 1: got 0"),
        ("OneHot", {"window": 2.0}, TypeError, "window must be an integer: got 2.0"),
        ("Circulant", {"block": 0}, ValueError, "block must be at least 1: got 0"),
        ("Circulant", {"block": 2, "shape": 4}, TypeError, "shape must be a tuple of integers"),
        ("Wavelet", {"shape": (4,)}, ValueError, "shape must have two axes: got (4,)"),
        ("Wavelet", {"positions": (1, 1)}, ValueError, "positions must all be different"),
        ("OneHot", {"stored": numpy.ones(2)}, ValueError, "stored must be one of (True, False)"),
        ("Fastfood", {"order": "lefty"}, ValueError, "order must be one of ('paper', 'le')"),
        ("Fastfood", {"blocks": 2}, ValueError, "blocks must be one of ('single', 'stacked')"),
        ("Fastfood", {"values": ["sign"]}, ValueError, "values must be one of ('normal', 'sign')"),
        ("Gaussian", {"normalize": "none"}, ValueError, "normalize must be one of ('isometric', "),
        ("Fourier", {"shape": (2, 3, 4)}, ValueError, "shape must have two axes: got (2, 3, 4)"),
        ("Fourier", {"shape": 4}, TypeError, "shape must be a tuple of integers: got 4"),
        ("Fourier", {"shape": (0, 4)}, ValueError, "shape[0] must be at least 1: got 0"),
        ("Fourier", {"frequencies": ()}, TypeError, "frequencies must be a tuple of integers"),
        ("Fourier", {"frequencies": (1, 1)}, ValueError, "frequencies must all be different"),
        ("Fourier", {"frequencies": (-1,)}, ValueError, "frequencies[0] must be at least 0"),
        ("Broadcast", {"along": "rows"}, ValueError, "along must be one of ('all', 'inputs', "),
        ("Selection", {"positions": 3}, TypeError, "positions must be a tuple of integers: got 3"),
        ("Selection", {"positions": (0.5,)}, TypeError, "positions[0] must be an integer: got 0.5"),
        ("Composed", {"first": 1, "second": 2}, TypeError, "first must be a superlora.maps.Map"),
        (
            "Composed",
            {"first": maps.Shuffle(), "second": maps.Shuffle(scope="all")},
            ValueError,
            "second must be a map of one group",
        ),
        (
            "Composed",
            {"first": maps.Shuffle(), "second": maps.Shuffle(), "between": "inside"},
            ValueError,
            "between must be 'before', 'after' or an integer: got 'inside'",
        ),
        (
            "Composed",
            {"first": maps.Shuffle(), "second": maps.Shuffle(), "between": True},
            TypeError,
            "between must be an integer: got True",
        ),
        ("BlockDiagonal", {"parts": ()}, TypeError, "parts must be a tuple of maps: got ()"),
        ("BlockDiagonal", {"parts": maps.OneHot()}, TypeError, "parts must be a tuple of maps"),
        ("BlockDiagonal", {"parts": (1,)}, TypeError, "parts[0] must be a superlora.maps.Map"),
    ],
)
def test_wrong_fields_are_refused(make, fields, error, match):
    with pytest.raises(error, match=re.escape(match)):
        getattr(maps, make)(**fields)


@pytest.mark.parametrize(
    ("fixed", "before", "size", "match"),
    [
        (maps.Identity(), 3, 4, "size must be at most 3, the entries of x: got 4"),
        (maps.Shuffle(), 3, 4, "size must be at most 3, the entries of x: got 4"),
        (maps.OneHot(), 4, 3, "size must be at least 4, the entries before OneHot: got 3"),
        (maps.Fourier(), 4, 3, "size must be at least 4, the entries before Fourier: got 3"),
        (maps.OneHot(window=2), 4, 3, "size must be at least 4, the entries before OneHot: got 3"),
        (maps.Wavelet(shape=(1, 3)), 4, 3, "at least 4, the entries before Wavelet: got 3"),
        (maps.Wavelet(), 2, 4, "shape must be given for a map outside a plan: got None"),
        (maps.Wavelet(shape=(2, 3)), 2, 5, "shape must have 5 entries, those of the group"),
        (maps.Wavelet(shape=(1, 5), positions=(5,)), 1, 5, "positions must be below 5"),
        (maps.Circulant(block=2), 2, 4, "shape must be given for a map outside a plan: got None"),
        (maps.Circulant(block=2, shape=(2, 2)), 2, 5, "shape must have 5 entries, those of"),
        (maps.Circulant(block=2, shape=(2, 2)), 3, 4, "x must have 2 entries, those of the ker"),
        (
            maps.Circulant(block=4, shape=(4, 6)),
            6,
            24,
            "block must divide both widths of the weight: got 4 and (4, 6)",
        ),
        (maps.Fourier(shape=(2, 3)), 2, 5, "shape must have 5 entries, those of the group"),
        (maps.Fourier(frequencies=(0, 1)), 3, 5, "frequencies must be 3, one for each entry"),
        (maps.Fourier(frequencies=(0, 5)), 2, 5, "frequencies must be below 5"),
        (maps.Broadcast(along="inputs"), 3, 4, "size must be a multiple of 3, the entries of x"),
        (maps.Broadcast(), 2, 4, "x must have one entry to be broadcast along all: got 2"),
        (maps.Selection(positions=(0, 1)), 3, 3, "positions must be 3, one for each entry"),
        (maps.Selection(positions=(0, 3)), 3, 2, "positions must be below 3, the entries"),
        (maps.Composed(first=maps.OneHot(), second=maps.OneHot(), between=2), 3, 4, "at least 3"),
        (maps.BlockDiagonal(parts=(maps.OneHot(),) * 3), 2, 9, "parts must be at most 2"),
        (maps.BlockDiagonal(parts=(maps.OneHot(),) * 2), 5, 4, "size must be at least 3"),
        (maps.Gaussian(), 2, 2**28, "size must be at most 134217728 for a dense Gaussian"),
        (maps.Fastfood(), 2, 2**60, "size must be at most 2**48, the positions of a permutation"),
    ],
)
def test_sizes_that_a_map_cannot_serve_are_refused_before_memory_is_spent(
    fixed, before, size, match
):
    with pytest.raises(ValueError, match=re.escape(match)):
        fixed.check(before, size)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=re.escape(match)):
            fixed.apply(numpy.ones(before), size)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        if size < 1000:
            with pytest.raises(ValueError, match="must") as caught:
                fixed.adjoint(numpy.ones(size), before)
            context = f"; of the map from {before} to {size} entries"
            assert isinstance(fixed, maps.Identity) or str(caught.value).endswith(context)
    finally:
        tracemalloc.stop()


CHECKED = pytest.mark.parametrize(("fixed", "before", "size"), rows(KINDS))


@CHECKED
@pytest.mark.parametrize("dtype", ["int64", "bool", "complex128"])
def test_numbers_that_are_no_floats_are_refused(xp, fixed, before, size, dtype):
    with pytest.raises(TypeError, match=rf"x must have a floating-point dtype: got .*{dtype}"):
        fixed.apply(xp.array(numpy.ones(before, dtype)), size)
    with pytest.raises(TypeError, match=rf"y must have a floating-point dtype: got .*{dtype}"):
        fixed.adjoint(xp.array(numpy.ones(size, dtype)), before)


def test_numbers_of_eight_bits_are_refused():
    torch = pytest.importorskip("torch")
    x = torch.ones(4).to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"x must have numbers of at least 16 bits: got .*float8"):
        maps.OneHot().apply(x, 8)


@CHECKED
def test_what_is_no_vector_is_refused(xp, fixed, before, size):
    for shape in [(), (0,), (before, 1), (1, before)]:
        with pytest.raises(
            ValueError, match=re.escape(f"x must be a vector of entries: got shape {shape}")
        ):
            fixed.apply(xp.array(numpy.ones(shape)), size)
        with pytest.raises(ValueError, match="y must be a vector of entries"):
            fixed.adjoint(xp.array(numpy.ones(shape)), before)


@every_kind
def test_what_is_no_array_is_refused(fixed, before, size):
    for value in ([1.0] * before, 1.0, None):
        with pytest.raises(TypeError, match="arrays must be of numpy"):
            fixed.apply(value, size)


@every_kind
def test_sizes_and_slices_that_are_no_counts_are_refused(fixed, before, size):
    x, y = draw(before), draw(size)
    for wrong, error in [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)]:
        with pytest.raises(error, match="size must be"):
            fixed.apply(x, wrong)
        with pytest.raises(error, match="size must be"):
            fixed.adjoint(y, wrong)
    for start, stop in [(2, 2), (3, 2), (0, size + 1)]:
        with pytest.raises(ValueError, match=f"must be a slice of {size} entries: got {start}"):
            fixed.apply_slice(x, size, start, stop)
    for start, stop, error in [(-1, 2, ValueError), (0.0, 1, TypeError), (0, 1.5, TypeError)]:
        with pytest.raises(error, match=r"(start|stop) must be"):
            fixed.apply_slice(x, size, start, stop)


def test_the_identity_refuses_what_is_no_vector(xp):
    for shape in [(), (2, 3)]:
        with pytest.raises(ValueError, match="x must be a vector of entries"):
            maps.Identity().apply(xp.array(numpy.ones(shape)), 1)
    with pytest.raises(ValueError, match="size must be at least 1: got -1"):
        maps.Identity().apply(xp.array(draw(3)), -1)


def test_parts_are_bound_without_the_groups_shape():
    place = maps.Place(1, ((4, 6),), True)
    fourier = maps.Fourier(seed=1)
    assert fourier.bind(place).shape == (4, 6)
    assert maps.Composed(first=fourier, second=maps.Shuffle()).bind(place).first.shape == (4, 6)
    inside = maps.Composed(first=fourier, second=maps.OneHot(), between=9).bind(place)
    assert inside.first.shape is None
    halves = maps.BlockDiagonal(parts=(fourier, fourier)).bind(place)
    assert [part.shape for part in halves.parts] == [None, None]
    assert halves.apply(draw(6), 24).shape == (24,)
    two = maps.Place(0, ((4, 6), (4, 6)), True)
    for fixed in (fourier, maps.Wavelet(), maps.Circulant(block=2)):
        assert fixed.bind(place).shape == (4, 6)
        assert dataclasses.replace(fixed, shape=(2, 12)).bind(place).shape == (2, 12)
        with pytest.raises(ValueError, match="must have one whole weight a group"):
            fixed.bind(two)
    assert maps.Circulant(block=2).fixed_entries(place) == 12
    with pytest.raises(ValueError, match="block must divide both widths"):
        maps.Circulant(block=4).fixed_entries(place)


def test_a_composition_takes_as_many_entries_as_its_broadcast():
    place, broadcast = maps.Place(0, ((4, 6),), True), maps.Broadcast(along="inputs")
    first = maps.Composed(first=broadcast, second=maps.Shuffle())
    assert first.fixed_entries(place) == 4
    second = maps.Composed(first=maps.Shuffle(), second=broadcast, between="before")
    assert second.fixed_entries(place) == 4
    assert maps.Composed(first=maps.OneHot(), second=maps.Shuffle()).fixed_entries(place) is None
    assert (
        maps.Composed(first=broadcast, second=maps.OneHot(), between=8).fixed_entries(place) is None
    )


def test_the_same_map_twice_draws_twice():
    for part in [
        maps.OneHot(),
        maps.Composed(first=maps.OneHot(), second=maps.Shuffle()),
        maps.BlockDiagonal(parts=(maps.Fastfood(),)),
        maps.Separable(before=(2, 2), after=(4, 4)),
    ]:
        for count in (2, 3):
            fixed = maps.BlockDiagonal(parts=(part,) * count)
            runs = fixed.apply(numpy.tile(draw(4), count), 16 * count).reshape(count, 16)
            for index in range(1, count):
                assert abs(runs[index] - runs[0]).max() > 1e-3
    assert maps.BlockDiagonal(parts=(Mixing(1),) * 2).apply(draw(4), 6).shape == (6,)
