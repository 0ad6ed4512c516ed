"""What maps promise in numbers: isometry, conditioning, range, memory, and a format of seeds."""

from __future__ import annotations

import dataclasses
import time
import tracemalloc
import zlib

import numpy
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from superlora import maps
from tests.maps.map_cases import CASES, KINDS, draw, rows

ORDERS = pytest.mark.parametrize("order", ["paper", "le"])


def applied(fixed, before, size):
    """Return the matrix that `apply` gives, a column at a time."""
    return numpy.stack([fixed.apply(unit, size) for unit in numpy.eye(before)], axis=1)


@ORDERS
@pytest.mark.parametrize("blocks", ["single", "stacked"])
@pytest.mark.parametrize(("before", "size"), [(3, 13), (5, 8), (8, 3), (1, 4)])
def test_fastfood_is_isometric_in_the_mean_over_its_numbers(
    monkeypatch, order, blocks, before, size
):
    # F x is linear in G, whose entries are independent and of variance 1: the mean of |F x|² is
    # the sum over F with one 1 in G.
    unit, x = numpy.zeros(64, numpy.float32), draw(before)
    monkeypatch.setattr(maps.Fastfood, "_draw_values", lambda _, start, stop: unit[start:stop])
    for normalize, expected in [("isometric", 1.0), ("variance", size / before)]:
        fixed = maps.Fastfood(order=order, blocks=blocks, normalize=normalize, stored=False)
        total = 0.0
        for position in range(64):
            unit[:] = 0
            unit[position] = 1
            total += numpy.sum(fixed.apply(x, size) ** 2)
        assert_allclose(total, expected * (x @ x), rtol=1e-12)


@pytest.mark.parametrize("order", ["paper", "le"])
@pytest.mark.parametrize("before", [1, 3, 8, 16])
def test_signs_give_an_exact_isometry_to_a_power_of_two(order, before):
    for fixed, size in [
        (maps.Fastfood(seed=2, order=order, values="sign"), 16),
        (maps.Fastfood(seed=2, order=order, values="sign", blocks="stacked"), 48),
    ]:
        matrix = applied(fixed, before, size)
        assert_allclose(matrix.T @ matrix, numpy.eye(before), atol=1e-13)


EXACT = [
    (maps.OneHot(seed=4), 7, 23),
    (maps.OneHot(seed=4, signed=False), 5, 5),
    (maps.OneHot(seed=4, tiled=False), 7, 23),
    (maps.OneHot(seed=4, tiled=False, signed=False), 1, 9),
    (maps.OneHot(seed=4, window=3), 7, 23),
    (maps.OneHot(seed=4, window=4), 9, 9),
    (maps.Shuffle(seed=4), 23, 23),
    (maps.Wavelet(seed=4, shape=(4, 6)), 7, 24),
    (maps.Fourier(seed=4, shape=(5, 7), frequencies=(1, 9, 13), normalize="isometric"), 3, 35),
    (maps.Separable(inner=maps.Fastfood(values="sign"), before=(3, 5), after=(4, 8)), 15, 32),
    (maps.Separable(inner=maps.OneHot(), before=(3, 2), after=(5, 3)), 6, 15),
    (maps.BlockDiagonal(parts=(maps.OneHot(),) * 3), 7, 23),
    (maps.Composed(first=maps.OneHot(), second=maps.Shuffle()), 7, 23),
]


@pytest.mark.parametrize(("fixed", "before", "size"), rows(EXACT))
def test_the_columns_are_orthonormal(fixed, before, size):
    matrix = applied(fixed, before, size)
    assert_allclose(matrix.T @ matrix, numpy.eye(before), atol=1e-13)
    assert_allclose(fixed.gain(before, size), before / size, rtol=1e-14)


def test_every_input_is_taken_as_often_as_any_other_but_for_one():
    for dealt in ({"tiled": True}, {"tiled": False}, {"window": 3}):
        fixed = maps.OneHot(seed=1, **dealt, signed=False, normalize=None)
        counts = fixed.adjoint(numpy.ones(103), 10)
        assert sorted(counts.tolist()) == [10.0] * 7 + [11.0] * 3


@pytest.mark.parametrize(("before", "size"), [(1000, 5321), (700, 701), (64, 6400)])
@pytest.mark.parametrize("window", [1, 10, 64, 5000])
def test_near_outputs_of_a_window_read_near_inputs(before, size, window):
    fixed = maps.OneHot(seed=1, window=window, signed=False, normalize=None)
    read = fixed.apply(numpy.arange(float(before)), size)
    run = min(window, before) * (size // before)
    for start in range(0, size, run):
        assert numpy.ptp(read[start : start + run]) <= window
    if window > 1:  # and are not in order
        assert (numpy.diff(read[:run]) < 0).any()


def squares(make, before, size, seeds):
    """Return ``|F x|² / |x|²`` for many seeds."""
    x = numpy.full(before, before**-0.5)
    return numpy.array([numpy.sum(make(seed).apply(x, size) ** 2) for seed in range(seeds)])


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: maps.Gaussian(seed=seed),
        lambda seed: maps.Gaussian(seed=seed, structured=True),
        lambda seed: maps.Fastfood(seed=seed),
        lambda seed: maps.Fastfood(seed=seed, order="le", blocks="stacked"),
        lambda seed: maps.Separable(inner=maps.Fastfood(seed=seed), before=(2, 3), after=(5, 8)),
        lambda seed: maps.Separable(inner=maps.Gaussian(seed=seed), before=(2, 3), after=(5, 8)),
    ],
)
def test_a_random_map_is_isometric_in_the_mean(make):
    found = squares(make, 6, 40, 300)
    assert abs(found.mean() - 1) < 4 * found.std() / len(found) ** 0.5
    assert found.std() > 0.05
    assert_allclose(make(0).gain(6, 40), 6 / 40, rtol=1e-14)


def test_the_signs_of_le_spread_a_constant_and_those_of_the_paper_do_not():
    # With p = N = n = 64 the paper's order sees one number of G, that of Le et al. all 64.
    paper = squares(lambda seed: maps.Fastfood(seed=seed), 64, 64, 1500)
    le = squares(lambda seed: maps.Fastfood(seed=seed, order="le"), 64, 64, 500)
    assert 1.2 < paper.std() < 1.6
    assert 0.24 < le.std() < 0.38


@pytest.mark.parametrize(("before", "size"), [(5, 13), (8, 8), (13, 5), (1, 6)])
@pytest.mark.parametrize("values", ["normal", "sign"])
def test_the_papers_order_is_the_transpose_of_les(before, size, values):
    paper = maps.Fastfood(seed=6, values=values)
    le = maps.Fastfood(seed=6, values=values, order="le")
    # Each divides by the square root of its own number of outputs.
    ratio = (before / size) ** 0.5
    assert_allclose(applied(paper, before, size) / ratio, applied(le, size, before).T, atol=1e-12)
    y = draw(size)
    assert_allclose(paper.adjoint(y, before), le.apply(y, before) * ratio, atol=1e-12)


def test_signs_are_better_conditioned_than_normal_numbers():
    # They depend on the draw: 2.8 and 1.1, 41 and 1.6, 3.8e3 and 263 in another one.
    bounds = {100: ((2, 5), (1, 1.2)), 500: ((10, 200), (1, 2.5)), 1000: ((5e2, 1e6), (50, 2e3))}
    for before, limits in bounds.items():
        found = []
        for values, (low, high) in zip(("normal", "sign"), limits, strict=True):
            matrix = applied(maps.Fastfood(seed=0, values=values), before, 1000)
            found.append(numpy.linalg.cond(matrix))
            assert low < found[-1] < high
        assert found[0] > 2 * found[1]


@pytest.mark.parametrize(
    "fixed",
    [
        maps.Fastfood(),
        maps.Fastfood(order="le", blocks="stacked", normalize="variance"),
        maps.Gaussian(structured=True),
        maps.OneHot(),
    ],
)
def test_half_precision_holds_a_coherent_input(xp, fixed):
    n = 1 << 16
    single = xp.to_numpy(fixed.apply(xp.array(numpy.ones(n, numpy.float32)), n))
    half = xp.to_numpy(fixed.apply(xp.array(numpy.ones(n, numpy.float16)), n))
    assert half.dtype == numpy.float16
    assert numpy.isfinite(half).all()
    assert_allclose(half, single, rtol=1e-3, atol=1e-5)
    back = xp.to_numpy(fixed.adjoint(xp.array(numpy.ones(n, numpy.float16)), n))
    assert numpy.isfinite(back).all()
    double = xp.to_numpy(fixed.apply(xp.array(numpy.ones(n)), n))
    assert_allclose(single, double, rtol=1e-4, atol=2e-6 * abs(double).max())


def kept_by(fixed):
    """Return how many bytes a map and its parts keep."""
    total = sum(array.nbytes for array in vars(fixed).get("_constants", {}).values())
    for value in vars(fixed).values():
        parts = value.values() if isinstance(value, dict) else value
        parts = parts if isinstance(value, (tuple, dict)) else (value,)
        total += sum(kept_by(part) for part in parts if isinstance(part, maps.Map))
    return total


MEMORY = [
    *((fixed, 500, 3001) for fixed, *_ in KINDS[:6]),
    (maps.Fastfood(stored=False), 500, 3001),
    (maps.OneHot(stored=False, signed=False), 500, 3001),
    (maps.OneHot(window=100), 500, 3001),
    (maps.Wavelet(shape=(3, 1001)), 500, 3003),
    (maps.Circulant(block=10, shape=(30, 100)), 300, 3000),
    (maps.Shuffle(stored=False), 3001, 3001),
    (maps.Gaussian(), 10_000, 2000),
    (maps.Fourier(), 500, 3001),
    (maps.Shuffle(), 3001, 3001),
    (maps.Selection(positions=(3,) * 3001), 500, 3001),
    (maps.BlockDiagonal(parts=(maps.OneHot(), maps.Fastfood())), 500, 3001),
    (maps.Composed(first=maps.OneHot(), second=maps.Shuffle()), 500, 3001),
    (maps.Separable(before=(20, 25), after=(50, 60)), 500, 3000),
]


@pytest.mark.parametrize(("fixed", "before", "size"), rows(MEMORY))
def test_a_map_keeps_as_many_bytes_as_it_says(fixed, before, size):
    fixed = dataclasses.replace(fixed)
    said = fixed.nbytes(before, size)
    for start, stop in [(0, size), (5, 700), (size - 700, size), (13, 14)]:
        fixed.apply_slice(draw(before), size, start, stop)
    fixed.adjoint(draw(size), before)
    assert kept_by(fixed) <= said * 1.15
    assert kept_by(fixed) >= said * 0.85
    once = kept_by(fixed)
    fixed.apply(draw(before), size)
    assert kept_by(fixed) == once


@pytest.mark.parametrize(
    "fixed",
    [
        maps.OneHot(),
        maps.OneHot(window=2),
        maps.Fastfood(blocks="stacked"),
        maps.Fastfood(blocks="stacked", order="le"),
        maps.Gaussian(structured=True),
    ],
)
@pytest.mark.parametrize("before", [1, 2, 7, 16])
def test_many_tiny_tiles_are_not_walked_one_by_one(fixed, before):
    fixed = dataclasses.replace(fixed)
    began = time.perf_counter()
    fixed.adjoint(fixed.apply(draw(before), 10**6), before)
    assert time.perf_counter() - began < 1.0


def test_a_row_of_zeros_is_not_stretched(monkeypatch):
    draw_all = maps.Fastfood._draw_values
    # One in 160,000 numbers is rounded to 0; with one input it is a row of its own.
    monkeypatch.setattr(
        maps.Fastfood, "_draw_values", lambda *args: draw_all(*args) * numpy.float32([0, 1] * 4)
    )
    found = maps.Gaussian(structured=True).apply(numpy.ones(1), 8)
    assert_array_equal(found != 0, [False, True] * 4)
    assert numpy.isfinite(found).all()


def test_a_slice_of_a_scalar_takes_its_own_memory():
    tracemalloc.start()
    try:
        assert_array_equal(maps.Broadcast().apply_slice(numpy.ones(1), 10**12, 7, 9), [1.0, 1.0])
        maps.OneHot().apply_slice(numpy.ones(3), 10**12, 10**11, 10**11 + 9)
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
    finally:
        tracemalloc.stop()


# First output, sum of outputs times their places, and checksum, for inputs 1, 2, 3, ...
VALUES = [
    (-3.0877120313042035, -4.367434568051536, 2082894113),
    (-0.5547001962252291, -22.742708045234398, 2431447694),
    (-1.1547005383792515, -14.777810114122513, 3686230143),
    (-1.1547005383792515, 13.08508351533277, 668438851),
    (-4.588900754335892, 13.384774554505952, 2520449497),
    (-2.0149192638474824, -6.736276637607329, 3225714206),
    (1.25, -6.0, 2591569787),
    (1.0, 405.0, None),
    (3.0, 22.0, None),
    (4.0, 33.0, 3792134487),
    (1.4142135623730951, 108.56788491819711, 3549954378),
    (-0.2639992024290029, -75.44615762442511, 3431024461),
    (-0.5773502691896257, -34.868421093355536, 1848586676),
    (1.5, 104.5, 444922471),
    (0.5, 43.0, None),
]


@pytest.mark.parametrize("index", range(len(KINDS)))
def test_what_a_seed_stands_for_is_a_format(xp, index):
    fixed, before, size = KINDS[index]
    found = xp.to_numpy(fixed.apply(xp.array(numpy.arange(1.0, before + 1)), size))
    first, total, checksum = VALUES[index]
    assert_allclose([found[0], found @ numpy.arange(size)], [first, total], rtol=1e-12)
    assert fixed.checksum(before, size) == checksum


@pytest.mark.parametrize(
    ("fixed", "before", "value", "total", "checksum"),
    [
        (maps.Fastfood(seed=9), 70_000, 0.04615694103252359, 215.7477887246909, 3190422325),
        (
            maps.Fastfood(seed=9, order="le", blocks="stacked"),
            70_000,
            0.704834204461506,
            -32.583971383448514,
            2332844035,
        ),
        (maps.OneHot(seed=9), 70_000, -0.6828514514970243, -155.28465700425107, 1611470129),
        (
            maps.OneHot(seed=9, tiled=False),
            70_000,
            -0.7068552259904459,
            136.76800072682332,
            2639114036,
        ),
        (
            maps.OneHot(seed=9, window=4096),
            70_000,
            0.20940508408297268,
            94.0377032425562,
            477519671,
        ),
        (
            maps.OneHot(seed=9, window=50_000),
            70_000,
            -0.23933446135662473,
            -33.89521990365417,
            2622425887,
        ),
        (
            maps.Wavelet(seed=9, shape=(3, 46_667)),
            70_000,
            0.3285144351010708,
            11.56929577477365,
            3874320900,
        ),
        (maps.Fourier(seed=9), 70_000, 0.0005796441674681476, 0.10101359660408495, 4214003933),
        (maps.Shuffle(seed=9), 140_001, -0.9996442472299877, -19.57457304739532, 3874320900),
        (
            maps.Gaussian(seed=9, structured=True),
            70_000,
            0.705494531624631,
            -32.65945697232188,
            2282568518,
        ),
    ],
)
def test_it_is_one_at_large_sizes_too(fixed, before, value, total, checksum):
    size = 140_001
    found = fixed.apply(numpy.cos(numpy.arange(before)), size)
    assert_allclose(found[100_000], value, rtol=1e-9)
    assert_allclose(found @ numpy.sin(numpy.arange(size)), total, rtol=1e-9)
    assert fixed.checksum(before, size) == checksum


SEEDED = [case for case in KINDS if hasattr(case[0], "seed")]


@pytest.mark.parametrize(("fixed", "before", "size"), rows(SEEDED))
def test_a_checksum_tells_draws_apart(fixed, before, size):
    others = [
        dataclasses.replace(fixed, seed=fixed.seed + 1),
        dataclasses.replace(fixed, seed=2**64 - 1),
        fixed.part(1),
        fixed.part(2**24 - 1),
    ]
    found = {other.checksum(before, size) for other in [fixed, *others]}
    assert len(found) == 5
    assert all(0 <= number < 2**32 for number in found)
    assert dataclasses.replace(fixed).checksum(before, size) == fixed.checksum(before, size)
    again = dataclasses.replace(fixed, shared=False).bind(maps.Place(1, (), False))
    assert again.checksum(before, size) == others[2].checksum(before, size)


@pytest.mark.parametrize(("fixed", "before", "size"), rows(CASES))
def test_a_checksum_is_of_bytes_in_one_order(fixed, before, size):
    constants = fixed.constants(before, size)
    if not constants:
        assert fixed.checksum(before, size) is None
        return
    data = b"".join(
        name.encode()
        + numpy.asarray(values).astype("<i8" if values.dtype.kind == "i" else "<f8").tobytes()
        for name, values in constants.items()
    )
    assert fixed.checksum(before, size) == zlib.crc32(data)


@pytest.mark.parametrize(
    ("fixed", "sizes", "others"),
    [
        (maps.Fastfood(), (5, 16), (5, 17)),
        (maps.OneHot(), (5, 16), (6, 16)),
        (maps.OneHot(tiled=False), (5, 16), (5, 17)),
        (maps.OneHot(window=2), (5, 16), (6, 16)),
        (maps.Gaussian(), (5, 16), (5, 17)),
        (maps.Gaussian(structured=True), (4, 16), (5, 16)),
        (maps.Fourier(), (5, 16), (6, 16)),
        (maps.Shuffle(), (16, 16), (17, 17)),
        (maps.BlockDiagonal(parts=(maps.OneHot(), maps.Shuffle())), (6, 6), (8, 8)),
    ],
)
def test_a_checksum_is_of_one_size(fixed, sizes, others):
    assert fixed.checksum(*sizes) != fixed.checksum(*others)


def test_a_checksum_of_a_large_map_takes_no_memory_of_its_size():
    tracemalloc.start()
    try:
        one_hots = [maps.OneHot(), maps.OneHot(tiled=False), maps.OneHot(window=10**7)]
        for fixed in [maps.Fastfood(), *one_hots, maps.Shuffle()]:
            assert fixed.checksum(10**8, 10**8) is not None
        assert maps.Gaussian(structured=True).checksum(10**8, 10**8) is not None
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


def test_groups_draw_their_own_only_where_they_do_not_share():
    places = [maps.Place(group, ((4, 4),), True) for group in (0, 1)]
    for fixed, before, size in KINDS:
        if "seed" not in repr(fixed):
            continue
        x = draw(before)
        first, second = (fixed.bind(place).apply(x, size) for place in places)
        assert_array_equal(first, second)
        apart = unshared(fixed)
        first, second = (apart.bind(place).apply(x, size) for place in places)
        assert abs(first - second).max() > 1e-3
        assert_array_equal(first, apart.bind(places[0]).apply(x, size))


def unshared(fixed):
    """Return a map with ``shared=False`` in all its parts."""
    changes = {}
    for item in dataclasses.fields(fixed):
        value = getattr(fixed, item.name)
        if isinstance(value, maps.Map):
            changes[item.name] = unshared(value)
        elif item.name == "parts":
            changes[item.name] = tuple(map(unshared, value))
        elif item.name == "shared":
            changes[item.name] = False
    return dataclasses.replace(fixed, **changes)
