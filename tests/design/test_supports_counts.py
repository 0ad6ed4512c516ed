"""Parameters of the presets of several merge operations, their table, and a plan of many."""

from __future__ import annotations

import itertools

import pytest

import superlora as sl
from superlora import maps
from tests.design.test_large_model import LLAMA, count_calls

LAYERS = {"blocks.0.q": (6, 4), "blocks.0.o": (4, 6), "head": (5, 5)}

COUNTS = {
    "scale_weight": lambda r, o, i: {r: r * (o + i), "vector": o, "constant": 1, "none": 0},
    "add_weight": lambda r, o, i: {r: r * (o + i), "vector": o, "constant": 1, "none": 0},
    "weight_to_bias": lambda r, o, i: {r: r * (i + 1), "vector": i, "constant": 1, "none": 0},
    "scale_bias": lambda r, o, i: {r: r * (o + 1), "vector": o, "constant": 1, "none": 0},
    "add_bias": lambda r, o, i: {r: r * (o + 1), "vector": o, "constant": 1, "none": 0},
}


@pytest.mark.parametrize("rank", [1, 2, 9])
def test_glora_counts_what_its_options_say(rank):
    options = [list(COUNTS[op](rank, 1, 1)) for op in COUNTS]
    checked = 0
    for chosen in itertools.product(*options):
        design = dict(zip(COUNTS, chosen, strict=True))
        if set(chosen) == {"none"}:
            with pytest.raises(ValueError, match="must not be 'none'"):
                sl.glora(5, **design)
            continue
        if sum(option != "none" for option in chosen) in (1, 5) or checked % 7 == 0:
            expected = sum(
                COUNTS[op](rank, *shape)[option]
                for shape in LAYERS.values()
                for op, option in design.items()
            )
            assert sl.Plan(sl.glora(5, **design), LAYERS).num_parameters == expected
        checked += 1
    assert checked == 4**5 - 1


PRESETS = {
    "glora": (sl.glora(3), lambda o, i: 6 * (o + i) + 3 * (i + 1) + 2 * o),
    "glora, matrix": (
        sl.glora(3, product="matrix"),
        lambda o, i: 3 * 2 * i + 3 * (o + i) + 3 * (i + 1) + 2 * o,
    ),
    "bitfit": (sl.bitfit(), lambda o, i: o),
    "ssf": (sl.ssf(), lambda o, i: 2 * o),
    "ia3": (sl.ia3(), lambda o, i: o),
    "repadapter": (sl.repadapter(3), lambda o, i: 2 * 3 * i + i),
    "prompt_add": (sl.prompt_add(), lambda o, i: i),
}


@pytest.mark.parametrize("key", PRESETS)
def test_presets_have_the_parameters_that_they_say(key):
    design, count = PRESETS[key]
    assert sl.Plan(design, LAYERS).num_parameters == sum(count(*s) for s in LAYERS.values())


VIT = {
    f"blocks.{block}.{name}": shape
    for block in range(12)
    for name, shape in {
        "qkv": (2304, 768),
        "proj": (768, 768),
        "fc1": (3072, 768),
        "fc2": (768, 3072),
    }.items()
}


def test_published_counts_of_a_vit():
    stored = {rank: sl.Plan(sl.glora(rank), VIT).num_parameters for rank in (2, 4, 8)}
    assert stored == {2: 884_832, 4: 1_603_776, 8: 3_041_664}
    assert sl.Plan(sl.bitfit(), VIT).num_parameters == 82_944


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"add_weight": "matrix"}, "support of 'add_weight' must be a rank or one of"),
        ({"add_weight": 0}, "add_weight's rank must be at least 1"),
        ({"product": "outer"}, "product must be 'hadamard' or 'matrix': got 'outer'"),
        ({"product": "matrix", "scale_weight": "vector"}, "'right_weight' must be a rank or"),
    ],
)
def test_glora_refuses_other_options(options, message):
    with pytest.raises(ValueError, match=message):
        sl.glora(2, **options)


def test_the_table_shows_the_operations():
    shapes = {"q": (6, 4), "v": (6, 4)}
    assert sl.Plan(sl.glora(2, scale_bias="none", add_weight="vector"), shapes).describe() == (
        "operations      groups  entries  map        fold   splits (size:rank)        parameters"
        "  applied\n"
        "scale_weight    2       24       Identity   6 x 4  6:2 x 4:2, identity core  40        "
        "  factored, formed from 3 tokens\n"
        "add_weight      2       24       Broadcast  6      6                         12        "
        "  formed\n"
        "weight_to_bias  2       4        Identity   4 x 1  4:2 x 1:2, identity core  20        "
        "  formed\n"
        "add_bias        2       6        Identity   6      6                         12        "
        "  formed\n"
        "2 weights, 84 trainable parameters for 48 entries (175.0000%)\n"
        "note: realised ratio 0.25, that of the map"
    )
    stack = sl.Spec(rank=1, groups=1, fold="stack")
    joint = sl.Plan({("scale_weight", "add_weight"): stack}, shapes)
    assert "scale_weight + add_weight  1       96" in joint.describe()
    assert "operations" not in sl.Plan(sl.lora(2), shapes).describe()


@pytest.mark.parametrize(
    "design", [sl.glora(8), sl.ssf(), sl.ia3(["down_proj"])], ids=["glora", "ssf", "ia3"]
)
def test_a_large_model_takes_few_operations(design):
    """In proportion to the number of supports: no machine's noise decides."""
    calls, plan = count_calls(lambda: sl.Plan(design, LLAMA))
    assert len(plan.layout.supports) == len(LLAMA) == 560
    counted = len(plan.layout.groups)
    fixed = sum(not isinstance(own.map, maps.Identity) for own in plan.layout.specs)
    assert calls < 30 * counted + 100 * fixed
    assert count_calls(plan.describe)[0] < 30 * counted
    few = {name: shape for name, shape in LLAMA.items() if ".1." in name}
    calls_of_few, plan_of_few = count_calls(lambda: sl.Plan(design, few))
    assert calls / len(plan.shapes) < 1.1 * calls_of_few / len(plan_of_few.shapes)
