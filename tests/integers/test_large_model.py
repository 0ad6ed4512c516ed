"""A 70-billion-parameter model is planned with integers alone, and few of them."""

from __future__ import annotations

import sys
import time
import tracemalloc

import pytest

import superlora as sl
from superlora import _backend, shapes
from tests.strategies import make_plan

LAYERS, WIDTH, HIDDEN, KEYS = 80, 8192, 28672, 1024
LINEARS = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (KEYS, WIDTH),
    "self_attn.v_proj": (KEYS, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (HIDDEN, WIDTH),
    "mlp.up_proj": (HIDDEN, WIDTH),
    "mlp.down_proj": (WIDTH, HIDDEN),
}
LLAMA = {
    f"model.layers.{layer}.{name}": shape
    for layer in range(LAYERS)
    for name, shape in LINEARS.items()
}
ENTRIES = 68_451_041_280

SPECS = {
    "dense": sl.dense(),
    "lora": sl.lora(rank=16, alpha=32),
    "lokr": sl.lokr(rank=8),
    "krona": sl.krona(),
    "lonkr": sl.lonkr(rank=4, splits=4),
    "cp": sl.Spec(rank=32, order=5, core="identity", groups=1, fold="balanced"),
    "lorta": sl.lorta(rank=16, order=3),
    "aligned": sl.Spec(rank=16, order=4, groups="layer", fold="aligned"),
    "even": sl.lora(rank=4, groups=101, fold="balanced", splits=2),
    "pad": sl.lora(rank=4, groups=97, fold="balanced", cut="pad"),
    "loha": sl.loha(rank=8),
    "vera": sl.vera(rank=256),
    "lora_xs": sl.lora_xs(rank=8),
    "tinylora": sl.tinylora(tied=["0.factor0"]),
    "terms": sl.Spec(rank=("full", 1), splits=2, terms=4, tied=["0.core"]),
    "overrides": sl.lora(
        rank=16,
        alpha=32,
        overrides={
            r"model\.layers\.7\d\..*": {"rank": 4, "fold": "aligned", "groups": "layer"},
            "(q|k)_proj": {"rank": 8},
            "mlp.*": {"rank": 2, "groups": 7, "fold": "balanced"},
        },
    ),
}


@pytest.fixture
def _no_arrays(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a plan must not reach for an array library")

    monkeypatch.setattr(_backend, "_library", refuse)


@pytest.fixture
def _empty_caches():
    for function in (shapes.divisors, shapes.balanced, shapes.cover):
        function.cache_clear()


def count_calls(function):
    """Count the Python functions that a call enters."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        result = function()
    finally:
        sys.setprofile(before)
    return calls, result


@pytest.mark.usefixtures("_no_arrays", "_empty_caches")
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_planning_is_integers_only_and_quick(spec):
    start = time.perf_counter()
    plan = make_plan(spec, LLAMA)
    text = plan.describe()
    assert time.perf_counter() - start < 5
    assert plan.num_dense == ENTRIES
    assert f"{len(LLAMA)} weights, {plan.num_parameters:,} trainable" in text
    assert 0 < plan.num_parameters <= ENTRIES


@pytest.mark.usefixtures("_no_arrays", "_empty_caches")
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_planning_takes_few_operations(spec):
    calls, plan = count_calls(lambda: make_plan(spec, LLAMA))
    # Frozen, tied and overridden blocks are named and checked one by one.
    named = bool(spec.frozen or spec.tied or spec.overrides) * len(plan.layout.block_shapes)
    assert calls < 30 * len(LLAMA) + 10 * named


@pytest.mark.usefixtures("_no_arrays")
def test_planning_takes_little_memory():
    tracemalloc.start()
    try:
        plan = make_plan(SPECS["lorta"], LLAMA)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert plan.num_parameters < 1_000_000
    assert peak < 4_000_000  # bytes; the factors alone would take 4 * num_parameters


def test_the_counts_are_those_of_the_formulas():
    widths = sum(rows + columns for rows, columns in LLAMA.values())
    assert make_plan(SPECS["lora"], LLAMA).num_parameters == 16 * widths
    assert make_plan(SPECS["dense"], LLAMA).num_parameters == ENTRIES
    aligned = make_plan(SPECS["aligned"], LLAMA)
    assert all(WIDTH % group.fold[-1] == 0 for group in aligned.layout.groups)
    assert all(aligned.layout.row_slice(name) is not None for name in LLAMA)


@pytest.mark.usefixtures("_no_arrays")
def test_the_watch_over_array_libraries_can_fail():
    import numpy

    with pytest.raises(AssertionError, match="must not reach"):
        make_plan(sl.lora(rank=1), {"q": (2, 2)}).init(like=numpy.float32)
