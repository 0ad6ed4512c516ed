"""Models of 8, 70 and 405 billion parameters are planned with integers alone, and few of them."""

from __future__ import annotations

import sys
import tracemalloc

import pytest

import superlora as sl
from superlora import _backend, maps
from superlora.design import contraction, fold_shape
from superlora.design.network import row_slice
from tests.strategies import make_plan

# Layers, width, width inside the MLP, outputs of keys and values.
LLAMAS = {
    "8B": (32, 4096, 14336, 1024),
    "70B": (80, 8192, 28672, 1024),
    "405B": (126, 16384, 53248, 1024),
}
WIDTH = LLAMAS["70B"][1]


def weights_of(model, spec=None):
    """Return the shapes of a model's linear layers, of one shape only for a stack."""
    layers, width, hidden, keys = LLAMAS[model]
    linears = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (hidden, width),
        "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
    }
    if spec is not None and spec.fold == "stack" and spec.groups != "weight":
        linears = {name: shape for name, shape in linears.items() if shape == (width, width)}
    return {
        f"model.layers.{layer}.{name}": shape
        for layer in range(layers)
        for name, shape in linears.items()
    }


LLAMA = weights_of("70B")
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
    "lokr-both": sl.lokr(rank=8, decompose_both=True),
    "lora_fa": sl.lora_fa(rank=16),
    "lotr": sl.lotr(rank=16),
    "fact_tt": sl.fact_tt(rank=16),
    "fact_tk": sl.fact_tk(rank=16),
    "fourierft": sl.fourierft(size=1000),
    "did": sl.did(size=1000),
    "said": sl.said(size=1000),
    "unilora": sl.unilora(size=256),
    "nola": sl.nola(size=64),
    "fastfood": sl.Spec(rank=8, groups=1, fold="balanced", map=maps.Fastfood(), ratio=0.1),
    "one-hot": sl.dense(groups=2, map=maps.OneHot(), ratio=0.01),
    "separable": sl.lora(rank=8, map=maps.Separable(), ratio=0.3),
    "shuffle": sl.Spec(rank=2, groups=3, fold="balanced", map=maps.Shuffle(scope="all")),
    "vera": sl.vera(rank=256),
    "lora_xs": sl.lora_xs(rank=8),
    "tinylora": sl.tinylora(),
    "tinylora-tied": sl.tinylora(tied=["0.factor0"]),
    "share_lora": sl.share_lora(rank=16),
    "tied_lora": sl.tied_lora(rank=64),
    "gralora": sl.gralora(rank=8, blocks=4),
    "monarch": sl.monarch(blocks=8),
    "miss": sl.miss(rank=64),
    "cdka": sl.cdka(terms=2),
    "metatt": sl.metatt(rank=8),
    "tt_lora": sl.tt_lora(rank=8, order=6),
    "train": sl.Spec(rank=8, order=5, core="train", groups=7, fold="balanced"),
    "terms": sl.Spec(rank=("full", 1), splits=2, terms=4, tied=["0.core"]),
    "overrides": sl.lora(
        rank=16,
        alpha=32,
        overrides={
            r"model\.layers\.\d*7\..*": {"rank": 4, "fold": "aligned", "groups": "layer"},
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
    cached = (fold_shape.divisors, fold_shape.balanced, fold_shape.cover, contraction._contract)
    for function in cached:
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


every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
every_model = pytest.mark.parametrize("model", LLAMAS)


@pytest.mark.usefixtures("_no_arrays")
@every_spec
@every_model
def test_planning_and_its_table_are_integers_only(spec, model):
    weights = weights_of(model, spec)
    plan = make_plan(spec, weights)
    text = plan.describe()
    assert plan.num_dense == sum(rows * columns for rows, columns in weights.values())
    assert f"{len(weights)} weights, {plan.num_parameters:,} trainable" in text
    assert 0 < plan.num_parameters <= plan.num_dense


def operations(spec, model, *, table=True):
    """Count the calls that a plan takes, and its table if asked for, for each weight."""
    weights = weights_of(model, spec)
    calls, _ = count_calls(
        lambda: make_plan(spec, weights).describe() if table else make_plan(spec, weights)
    )
    return calls / len(weights)


@pytest.mark.usefixtures("_no_arrays", "_empty_caches")
@every_spec
def test_a_plan_takes_few_operations(spec):
    assert operations(spec, "8B", table=False) < 200


@pytest.mark.usefixtures("_no_arrays", "_empty_caches")
@every_spec
def test_a_plan_and_its_table_take_few_operations(spec):
    """Milliseconds, and in proportion to the number of weights: no machine's noise decides."""
    # The table plans how an update is applied once for each kind of group and shape.
    small, large = operations(spec, "8B"), operations(spec, "405B")
    assert large <= small
    assert large < 200


@pytest.mark.usefixtures("_no_arrays", "_empty_caches")
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_planning_takes_few_operations(spec):
    weights = weights_of("70B", spec)
    calls, plan = count_calls(lambda: make_plan(spec, weights))
    # Frozen, tied and overridden blocks are named and checked one by one, and maps bound.
    named = bool(spec.frozen or spec.tied or spec.overrides) * len(plan.layout.block_shapes)
    mapped = bool(spec.factor_map or spec.map != maps.Identity()) * len(weights)
    assert calls < 30 * len(weights) + 10 * named + 100 * mapped


@pytest.mark.usefixtures("_no_arrays")
@every_spec
@pytest.mark.parametrize("model", ["8B", "70B", pytest.param("405B", marks=pytest.mark.slow)])
def test_a_plan_and_its_table_take_little_memory(spec, model):
    weights = weights_of(model, spec)
    tracemalloc.start()
    try:
        make_plan(spec, weights).describe()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 6_000 * len(weights)  # bytes; a weight's factors alone would take more


def test_the_counts_are_those_of_the_formulas():
    widths = sum(rows + columns for rows, columns in LLAMA.values())
    assert make_plan(SPECS["lora"], LLAMA).num_parameters == 16 * widths
    assert make_plan(SPECS["dense"], LLAMA).num_parameters == ENTRIES
    aligned = make_plan(SPECS["aligned"], LLAMA)
    assert all(WIDTH % group.fold[-1] == 0 for group in aligned.layout.groups)
    assert all(row_slice(aligned.layout, name) is not None for name in LLAMA)


@pytest.mark.usefixtures("_no_arrays")
def test_the_watch_over_array_libraries_can_fail():
    import numpy

    with pytest.raises(AssertionError, match="must not reach"):
        make_plan(sl.lora(rank=1), {"q": (2, 2)}).init(like=numpy.float32)
