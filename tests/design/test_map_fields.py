"""The fields of a spec that say a map: what is refused, in words and before memory is spent."""

from __future__ import annotations

import json
import time
import tracemalloc

import pytest

import superlora as sl
from superlora import maps
from tests.design.test_large_model import ENTRIES, LLAMA

ONE = {"0.q": (6, 4)}
TWO = {"0.q": (6, 4), "0.v": (6, 4)}
HUGE = {"q": (10**12, 10**12)}
FASTFOOD = maps.Fastfood()
VECTOR = {"order": 1, "rank": "full"}
COMPOSED = maps.Composed(first=maps.OneHot(), second=FASTFOOD, between=10**15)

FIELDS = {
    "ratio zero": ({"map": FASTFOOD, "ratio": 0}, r"ratio must be in \(0, 1\]: got 0"),
    "ratio above one": ({"map": FASTFOOD, "ratio": 1.5}, r"ratio must be in \(0, 1\]: got 1\.5"),
    "ratio nan": ({"map": FASTFOOD, "ratio": float("nan")}, r"ratio must be .*got nan"),
    "ratio of a shuffle": ({"map": maps.Shuffle(), "ratio": 0.5}, r"ratio must be 1 with map=Shuf"),
    "size and ratio": ({"map": FASTFOOD, "size": 5, "ratio": 0.5}, "size must .* without a ratio"),
    "size of the identity": ({"size": 5}, r"size must come with a map .*map=Identity\(\)"),
    "size of modes": ({"map": maps.Separable(), "size": 5}, r"size must come with .*Separable\(\)"),
    "size zero": ({"map": FASTFOOD, "size": 0}, "size must be at least 1: got 0"),
    "modes beyond": ({"map": maps.Separable(modes=(2,))}, "modes must be below 2"),
    "modes of no plan": (
        {"map": maps.Separable(before=(2, 2), after=(3, 3))},
        r"map=Separable\(\) must leave before and after",
    ),
    "orders of splits": (
        {"map": maps.Separable(), "order": (1, 2), "splits": 2},
        r"order must be one number with map=Separable\(\)",
    ),
    "Hadamard product of modes": (
        {"map": maps.Separable(), "combine": "hadamard", "splits": 2},
        r"combine must be 'kronecker' with map=Separable\(\).*got 'hadamard'",
    ),
    "no factor size": ({"factor_map": FASTFOOD}, "factor_size must be given with a factor_map"),
    "factor size zero": (
        {"factor_map": FASTFOOD, "factor_size": 0},
        "factor_size must be at least 1: got 0",
    ),
    "factor size alone": ({"factor_size": 5}, "factor_size and factor_scope must come with"),
    "factor scope alone": ({"factor_scope": "block"}, "factor_size and factor_scope must come"),
    "factor scope unknown": (
        {"factor_map": FASTFOOD, "factor_size": 5, "factor_scope": "group"},
        "factor_scope must be one of 'all', 'block': got 'group'",
    ),
    "factor map of all groups": (
        {"factor_map": maps.Shuffle(scope="all"), "factor_size": 5},
        "factor_map must be a map of one vector",
    ),
    "factor map of modes": (
        {"factor_map": maps.Separable(), "factor_size": 5},
        "factor_map must be a map of one vector",
    ),
    "override without a map": ({"overrides": {"v": {"ratio": 0.5}}}, r"overrides\['v'\]: ratio"),
}


@pytest.mark.parametrize(("fields", "message"), FIELDS.values(), ids=FIELDS)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        sl.Spec(**fields)


PLANS = {
    "natural fold": (sl.Spec(map=FASTFOOD, ratio=0.5), ONE, r"fold must .*map=Fastfood.*'natural'"),
    "stack": (sl.Spec(map=FASTFOOD, fold="stack", groups=1), TWO, "fold must .*got 'stack'"),
    "aligned": (sl.Spec(map=FASTFOOD, fold="aligned", groups=1), TWO, "fold must .*got 'aligned'"),
    "fold too small": (
        sl.Spec(map=FASTFOOD, fold=(3, 3), ratio=0.9),
        ONE,
        "fold must cover the group: expected at least 22 entries",
    ),
    "fold too large": (
        sl.Spec(map=FASTFOOD, fold=(30, 3), ratio=0.5),
        ONE,
        r"fold\[0\] must be at most 4",
    ),
    "fold of another size": (
        sl.Spec(map=FASTFOOD, fold=(3, 3), size=10),
        ONE,
        "fold must cover the group: expected at least 10 entries",
    ),
    "one-hot too large": (
        sl.Spec(map=maps.OneHot(), size=100, **VECTOR),
        ONE,
        r"map=OneHot\(\) must serve 100 entries to 24: ",
    ),
    "Fourier too large": (
        sl.fourierft(25),
        ONE,
        r"map=Fourier\(\) must serve 25 entries to 24: ",
    ),
    "Fourier of another shape": (
        sl.Spec(map=maps.Fourier(shape=(5, 5)), size=3, **VECTOR),
        ONE,
        r"map=Fourier\(\) must serve 3 entries to 24: shape must have 24",
    ),
    "Fourier of two weights": (sl.fourierft(3, groups=1), TWO, r"map=Fourier\(\) must have one"),
    "wavelets of two weights": (sl.waveft(3, groups=1), TWO, r"map=Wavelet\(\) must have one"),
    "wavelets too many": (sl.waveft(25), ONE, r"map=Wavelet\(\) must serve 25 entries to 24: "),
    "circulants of two weights": (
        sl.c3a(2, groups=1),
        TWO,
        r"map=Circulant\(\) must have one whole weight",
    ),
    "circulants of a ratio": (
        sl.c3a(2, ratio=0.5),
        ONE,
        r"ratio and size must be left to map=Circulant\(\), which takes 12 entries: got 0.5",
    ),
    "circulants that do not fit": (
        sl.c3a(4),
        ONE,
        r"block must divide both widths of the weight: got 4 and \(6, 4\)",
    ),
    "broadcast over two weights": (
        sl.Spec(map=maps.Broadcast(), groups=1, **VECTOR),
        TWO,
        r"map=Broadcast\(\) must have one whole weight",
    ),
    "broadcast of a ratio": (
        sl.Spec(map=maps.Broadcast(), ratio=0.5, **VECTOR),
        ONE,
        r"ratio and size must be left to map=Broadcast\(\), which takes 1 entries: got 0.5",
    ),
    "modes of too many groups": (
        sl.lora(1, map=maps.Separable(inner=maps.Fastfood(shared=False)), ratio=0.5),
        {f"{index}.q": (4, 4) for index in range(4097)},
        r"groups must be at most 4096 with map=Separable\(\) of an inner map that is not shared",
    ),
    "broadcast of a cover": (
        sl.Spec(rank=1, map=maps.Broadcast(along="inputs"), fold="balanced"),
        {"q": (7, 5)},
        r"map=Broadcast\(\) must serve 9 entries to 35: ",
    ),
    "selection of another length": (
        sl.Spec(map=maps.Selection(positions=(0, 1)), size=3, **VECTOR),
        ONE,
        r"map=Selection\(\) must serve 3 entries to 24: positions must be 24",
    ),
    "mode that its map cannot serve": (
        sl.lora(1, map=maps.Separable(inner=maps.Selection(positions=(0,) * 6)), ratio=0.5),
        ONE,
        r"mode 1 of map=Separable\(\) must serve 3 entries to 4: positions must be 4",
    ),
    "mode too large for a dense matrix": (
        sl.lora(1, map=maps.Separable(inner=maps.Gaussian()), ratio=0.5),
        {"q": (28672, 28672)},
        r"mode 0 of map=Separable\(\) must serve 20,275 entries to 28,672: ",
    ),
    "one vector for fewer factors": (
        sl.unilora(100, 1),
        TWO,
        r"factor_map for '0\.0\.theta' must serve 100 entries to 20: ",
    ),
    "vectors longer than a small block": (
        sl.lora(1, factor_map=maps.OneHot(), factor_size=5, factor_scope="block"),
        {"q": (100, 100), "v": (100, 3)},
        r"factor_map for '1\.0\.factor1' must serve 5 entries to 3: ",
    ),
    "factor map of another size": (
        sl.lora(1, factor_map=maps.Shuffle(), factor_size=5),
        ONE,
        r"factor_map for '0\.0\.theta' must serve 5 entries to 10: ",
    ),
}


@pytest.mark.parametrize(("spec", "shapes", "message"), PLANS.values(), ids=PLANS)
def test_maps_that_do_not_fit(spec, shapes, message):
    with pytest.raises(ValueError, match=message):
        sl.Plan(spec, shapes)


ABSURD = {
    "said": (sl.said(10**12), TWO),
    "did": (sl.did(10**12), TWO),
    "cubes": (sl.lora(1, order=8, fold=(100,) * 8, core="identity", map=FASTFOOD), TWO),
    "selection": (
        sl.Spec(rank=1, fold=(10**6, 10**6), map=maps.Selection(positions=(5,) * 24)),
        ONE,
    ),
    "factor size": (sl.lora(2, factor_map=FASTFOOD, factor_size=10**15), TWO),
    "rank of mapped factors": (sl.unilora(5, rank=10**9, dense_from="never"), TWO),
    "rank of factors with vectors": (sl.nola(5, rank=10**9, dense_from="never"), TWO),
    "between": (sl.Spec(map=COMPOSED, size=5, **VECTOR), ONE),
    "between in parts": (
        sl.Spec(map=maps.BlockDiagonal(parts=(COMPOSED,)), size=5, **VECTOR),
        ONE,
    ),
    "between in F_in": (sl.lora(2, factor_map=COMPOSED, factor_size=5), TWO),
    "weights": (sl.dense(order=1, map=FASTFOOD, size=5), HUGE),
}


@pytest.mark.parametrize(("spec", "shapes"), ABSURD.values(), ids=ABSURD)
def test_absurd_sizes_are_refused_at_once(spec, shapes):
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"must (take|make|serve)"):
        sl.Plan(spec, shapes)
    assert time.perf_counter() - start < 1
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def mapped(fixed, groups, ratio=0.1, **changes):
    return sl.Spec(rank=4, groups=groups, fold="balanced", map=fixed, ratio=ratio, **changes)


LARGE = {
    "fourierft": sl.fourierft(),
    "waveft": sl.waveft(),
    "c3a": sl.c3a(),
    "did": sl.did(),
    "said": sl.said(),
    "unilora": sl.unilora(10_000),
    "nola": sl.nola(),
    "fastfood": mapped(FASTFOOD, 1),
    "fastfood of its own": mapped(maps.Fastfood(shared=False), 560),
    "one-hot": mapped(maps.OneHot(), 1),
    "separable": sl.lora(4, map=maps.Separable(), ratio=0.1),
    "structured": mapped(maps.Gaussian(structured=True), 1),
    "parts": mapped(maps.BlockDiagonal(parts=(FASTFOOD,) * 64), 1),
    "shuffle of all": mapped(maps.Shuffle(scope="all"), 2000, ratio=1),
}


@pytest.mark.parametrize("spec", LARGE.values(), ids=LARGE)
def test_a_large_model_is_planned_at_once(spec):
    tracemalloc.start()
    start = time.process_time()
    plan = sl.Plan(spec, LLAMA)
    text = plan.describe()
    blocks = [plan.blocks_of(name) for name in list(LLAMA)[:20]]
    used = time.process_time() - start
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert used < 5  # of a contended machine, and with its memory traced
    assert memory < 1 << 25
    assert plan.num_dense == ENTRIES
    assert f"{plan.num_parameters:,} trainable parameters" in text
    assert all(blocks)


@pytest.mark.parametrize("spec", [*LARGE.values(), *(spec for spec, _ in ABSURD.values())])
def test_a_mapped_spec_survives_json(spec):
    again = sl.Spec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert hash(again) == hash(spec)


def notes_of(spec, shapes=TWO):
    lines = sl.Plan(spec, shapes).describe().splitlines()
    notes = [line.removeprefix("note: ") for line in lines if line.startswith("note: ")]
    return [note for note in notes if not note.startswith("maps keep ")]


@pytest.mark.parametrize(
    ("spec", "kept"),
    [
        (sl.lora(2), None),
        (sl.did(100), 2 * 32768 * 13),
        (sl.did(100, map=maps.Fastfood(order="le", stored=False)), None),
        (sl.nola(5, 2), 4 * 4 * 5 * 200),
    ],
    ids=["no map", "two maps", "not kept", "factors"],
)
def test_the_table_says_what_the_maps_keep_in_memory(spec, kept):
    lines = sl.Plan(spec, {"q": (100, 200), "v": (200, 100)}).describe().splitlines()
    notes = [line for line in lines if "maps keep" in line]
    text = f"note: maps keep {(kept or 0) / 1e6:,.1f} MB in memory, and nothing in a file"
    assert notes == ([text] if kept else [])


DESCRIBED = {
    "ratio": (mapped(FASTFOOD, 1, 0.25).replace(rank=1), ["realised ratio 0.25, asked 0.25"]),
    "size": (sl.did(12), ["realised ratio 0.5, asked 12 entries"]),
    "fold": (sl.said(12), ["realised ratio 0.5, that of the fold"]),
    "map": (
        sl.Spec(map=maps.Broadcast(along="inputs"), **VECTOR),
        ["realised ratio 0.25, that of the map"],
    ),
    "modes": (
        sl.lora(1, map=maps.Separable(), ratio=0.25),
        ["realised ratio 0.25, asked 0.25"],
    ),
    "shuffle": (
        sl.Spec(rank=1, groups=1, fold=(7, 7), map=maps.Shuffle()),
        ["the folds cover 49 entries; 1 are cropped"],
    ),
    "factor map": (
        sl.unilora(5, 2),
        ["40 entries of 4 blocks are made of 5 parameters: OneHot"],
    ),
    "one of two": (
        sl.lora(1, overrides={"v": {"map": FASTFOOD, "ratio": 0.5, "fold": "balanced"}}),
        ["realised ratio 0.5, asked 0.5"],
    ),
    "two maps": (
        sl.Spec(
            rank=1,
            fold="balanced",
            map=FASTFOOD,
            ratio=0.5,
            overrides={"v": {"map": maps.OneHot(), "ratio": 0.25}},
        ),
        ["realised ratio of Fastfood 0.5, asked 0.5", "realised ratio of OneHot 0.25, asked 0.25"],
    ),
}


@pytest.mark.parametrize(("spec", "notes"), DESCRIBED.values(), ids=DESCRIBED)
def test_the_table_is_true_of_maps(spec, notes):
    assert notes_of(spec) == notes


def test_the_table_names_the_maps():
    override = {"v": {"map": maps.Shuffle(), "fold": "natural"}}
    lines = sl.Plan(sl.lora(1, overrides=override), TWO).describe().splitlines()
    assert lines[:3] == [
        "groups  entries  map       fold   splits (size:rank)        parameters  applied",
        "1       24       Identity  6 x 4  6:1 x 4:1, identity core  10          "
        "factored, formed from 14 tokens",
        "1       24       Shuffle   6 x 4  6:1 x 4:1, identity core  10          formed",
    ]


def test_one_vector_starts_at_zero_where_the_update_is_linear_in_it():
    for spec in (
        sl.lora_fa(2, factor_map=maps.OneHot(), factor_size=5),
        sl.dense(factor_map=FASTFOOD, factor_size=5),
    ):
        (theta,) = sl.Plan(spec, TWO).init().values()
        assert not theta.any()
    (theta,) = sl.Plan(sl.unilora(5, 2), TWO).init().values()
    assert theta.all()
