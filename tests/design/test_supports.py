"""Merge operations as a design: what is grouped, shared, left out, named, counted and refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import pytest

import superlora as sl
from superlora import maps
from superlora.design.supports import design_from_dict, design_of, without
from superlora.presets.operations import support

LAYERS = {"blocks.0.q": (6, 4), "blocks.0.o": (4, 6), "head": (5, 5)}
OUTPUTS = {name: rows for name, (rows, _) in LAYERS.items()}
INPUTS = {name: columns for name, (_, columns) in LAYERS.items()}


@pytest.mark.parametrize(
    ("operation", "shape"),
    [
        ("add_weight", (6, 4)),
        ("scale_weight", (6, 4)),
        ("right_weight", (4, 4)),
        ("left_weight", (6, 6)),
        ("weight_to_bias", (4, 1)),
        ("scale_bias", (6, 1)),
        ("add_bias", (6, 1)),
    ],
)
def test_every_operation_has_a_support_of_its_shape(operation, shape):
    assert sl.support_shape(operation, (6, 4)) == shape
    plan = sl.Plan({operation: sl.lora(1, dense_from="never")}, {"blocks.0.q": (6, 4)})
    assert plan.shapes == {f"{operation}.blocks.0.q": shape}
    assert plan.layout.supports == {"blocks.0.q": {operation: f"{operation}.blocks.0.q"}}
    assert plan.layout.layers == {"blocks.0.q": (6, 4)}
    assert plan.num_parameters == sum(shape)
    assert plan.num_dense == 24


def test_supports_come_operation_by_operation_and_layer_by_layer():
    plan = sl.Plan({"add_bias": sl.dense(), "scale_weight": sl.lora(1)}, LAYERS)
    names = [f"{op}.{layer}" for op in ("add_bias", "scale_weight") for layer in LAYERS]
    assert list(plan.shapes) == names
    assert plan.factor_shapes == {
        "0.0.core": (6,),
        "1.0.core": (4,),
        "2.0.core": (5,),
        "3.0.factor0": (6, 1),
        "3.0.factor1": (4, 1),
        "4.0.factor0": (4, 1),
        "4.0.factor1": (6, 1),
        "5.0.factor0": (5, 1),
        "5.0.factor1": (5, 1),
    }


def test_a_layer_that_is_the_model_itself_has_an_empty_name():
    plan = sl.Plan(sl.ssf(), {"": (6, 4)})
    assert plan.layout.supports[""] == {
        "scale_weight": "scale_weight.",
        "scale_bias": "scale_bias.",
        "add_bias": "add_bias.",
    }
    assert plan.num_parameters == 12


def test_a_spec_alone_is_a_plan_of_its_weights_as_ever():
    for spec in (sl.lora(2), sl.lotr(2)):
        shapes = dict.fromkeys(LAYERS, (6, 4))
        plan, mapped = sl.Plan(spec, shapes), sl.Plan({"add_weight": spec}, shapes)
        assert plan.shapes == shapes
        assert plan.factor_shapes == mapped.factor_shapes
        assert plan.layout.supports == {name: {"add_weight": name} for name in shapes}


def test_operations_of_one_key_make_up_groups_among_themselves():
    weight = sl.Spec(rank=2, groups=1, fold="balanced")
    plan = sl.Plan(
        {
            ("scale_weight", "add_weight"): weight,
            ("weight_to_bias", "add_bias"): sl.dense(groups=1, map=maps.OneHot(), size=3),
        },
        LAYERS,
    )
    entries = sum(rows * columns for rows, columns in LAYERS.values())
    assert [group.size for group in plan.layout.groups] == [
        2 * entries,
        sum(OUTPUTS.values()) + sum(INPUTS.values()),
    ]
    assert plan.layout.grouping.members[0] == tuple(
        f"{op}.{layer}" for op in ("scale_weight", "add_weight") for layer in LAYERS
    )
    apart = sl.Plan({"scale_weight": weight, "add_weight": weight}, LAYERS)
    assert [group.size for group in apart.layout.groups] == [entries, entries]


def test_what_is_shared_has_no_entries_of_its_own():
    plan = sl.Plan(sl.ssf(), LAYERS)
    own = sl.Plan({"scale_weight": support("scale_weight", "vector")}, LAYERS)
    for layer, rows in OUTPUTS.items():
        (block,) = plan.blocks_of(f"scale_weight.{layer}")
        assert plan.blocks_of(f"scale_bias.{layer}") == (block,)
        assert plan.factor_shapes[block] == (rows,)
    assert plan.num_parameters == own.num_parameters + sum(OUTPUTS.values())


def test_a_shared_vector_keeps_the_scale_of_its_source():
    vector = support("scale_weight", "vector", scale=0.7, overrides={"head": {"scale": -3.0}})
    plan = sl.Plan({"scale_weight": vector, "scale_bias": "scale_weight"}, LAYERS)
    scales = {layer: plan.layout.scaling(f"scale_bias.{layer}") for layer in LAYERS}
    assert scales == {"blocks.0.q": 0.7, "blocks.0.o": 0.7, "head": -3.0}


def test_what_scales_the_inputs_leaves_the_bias_alone():
    plan = sl.Plan(sl.ia3(inputs=["o"]), LAYERS)
    assert plan.num_parameters == 6 + 6 + 5
    shared = {layer for layer, own in plan.layout.supports.items() if "scale_bias" in own}
    assert shared == {"blocks.0.q", "head"}
    only = sl.Plan(sl.ia3(inputs=[".*"]), LAYERS)
    assert all(list(own) == ["scale_weight"] for own in only.layout.supports.values())


def test_overrides_match_operation_and_layer_or_the_end_of_that():
    spec = sl.lora(1, overrides={"add_weight.*o": None, "head": {"rank": 2}, "q": None})
    design = {("scale_weight", "add_weight"): spec, "add_bias": sl.dense(overrides={"head": None})}
    plan = sl.Plan(design, LAYERS)
    assert plan.layout.supports == {
        "blocks.0.q": {"add_bias": "add_bias.blocks.0.q"},
        "blocks.0.o": {
            "scale_weight": "scale_weight.blocks.0.o",
            "add_bias": "add_bias.blocks.0.o",
        },
        "head": {"scale_weight": "scale_weight.head", "add_weight": "add_weight.head"},
    }
    assert plan.num_parameters == 10 + 2 * 2 * 10 + 6 + 4


def test_none_leaves_a_weight_out_of_a_plan_of_one_spec():
    plan = sl.Plan(sl.lora(1, overrides={"q|head": None}), LAYERS)
    assert plan.shapes == {"blocks.0.o": (4, 6)}
    assert plan.layout.layers == LAYERS
    assert plan.num_dense == 24
    grouped = sl.lora(1, groups=1, fold="balanced", overrides={"head": None})
    assert [group.size for group in sl.Plan(grouped, LAYERS).layout.groups] == [48]


DESIGNS = {
    "glora": sl.glora(2),
    "matrix": sl.glora(2, product="matrix", add_bias="constant"),
    "ssf": sl.ssf(),
    "ia3": sl.ia3(inputs=["o"]),
    "repadapter": sl.repadapter(1, alpha=3),
    "tuples": {
        ("scale_weight", "add_weight"): sl.Spec(rank=2, groups=1, fold="balanced"),
        ("weight_to_bias", "scale_bias", "add_bias"): sl.dense(
            groups=1, map=maps.Fastfood(seed=3), size=7
        ),
    },
    "overrides": {"scale_weight": sl.lora(2, overrides={"head": None, "q": {"rank": 1}})},
}


@pytest.mark.parametrize("key", DESIGNS)
def test_a_design_comes_back_from_its_dict_and_from_json(key):
    design = design_of(DESIGNS[key])
    assert isinstance(design, sl.Supports)
    plain = design.to_dict()
    for values in (plain, json.loads(json.dumps(plain))):
        found = design_from_dict(values)
        assert found == design == sl.Supports.from_dict(values)
        assert hash(found) == hash(design)
        assert found.to_dict() == plain
    own, other = sl.Plan(DESIGNS[key], LAYERS), sl.Plan(found, LAYERS)
    assert own.factor_shapes == other.factor_shapes
    assert own.layout.supports == other.layout.supports
    assert design_of(design) is design


@pytest.mark.parametrize("key", DESIGNS)
def test_supports_are_read_as_the_mapping_that_they_are_of(key):
    design = sl.Supports(DESIGNS[key])
    given = dict(DESIGNS[key])
    assert dict(design) == given
    assert len(design) == len(given)
    assert all(design[operations] == given[operations] for operations in given)
    assert "nothing" not in design
    names = {"Supports": sl.Supports, "Spec": sl.Spec, **vars(maps)}
    for again in (
        sl.Supports(design),
        sl.Supports(given),
        eval(repr(design), names),
        copy.deepcopy(design),
        pickle.loads(pickle.dumps(design)),
    ):
        assert again == design
        assert hash(again) == hash(design)
    with pytest.raises(dataclasses.FrozenInstanceError):
        design.designs = ()


def test_supports_keep_their_order_but_for_what_is_shared():
    weight, bias = sl.lora(2), sl.dense()
    design = sl.Supports({"add_bias": bias, "scale_bias": "add_bias", "scale_weight": weight})
    assert list(design) == ["add_bias", "scale_weight", "scale_bias"]
    assert list(design) == list(design.operations)
    shared = {"scale_bias": "add_bias", "add_bias": bias, "scale_weight": weight}
    assert design == sl.Supports(shared)
    assert design != sl.Supports({**shared, "add_bias": sl.dense(scale=2)})
    turned = {"scale_weight": weight, "add_bias": bias}  # whose groups are numbered otherwise
    assert sl.Supports(turned) != sl.Supports(dict(reversed(turned.items())))
    assert sl.Supports({("add_bias",): bias}) == sl.Supports({"add_bias": bias})


def test_an_operation_is_changed_in_a_mapping():
    design = sl.Supports({**sl.ssf(), "add_bias": sl.dense(scale=0.5)})
    assert design["add_bias"] == sl.dense(scale=0.5)
    assert design["scale_bias"] == "scale_weight"


def test_every_preset_returns_a_spec_or_supports():
    kinds = {name: getattr(sl, name).__annotations__["return"] for name in sl.presets.__all__}
    assert set(kinds.values()) == {"Spec", "Supports"}
    several = {"bitfit", "glora", "ia3", "prompt_add", "repadapter", "ssf"}
    assert {name for name, kind in kinds.items() if kind == "Supports"} == several
    assert all(isinstance(getattr(sl, name)(), sl.Supports) for name in several)


def test_a_spec_comes_back_as_a_spec():
    assert design_from_dict(sl.lora(3).to_dict()) == sl.lora(3)
    assert design_of(sl.lora(3)) == sl.lora(3)


REFUSED = {
    "unknown": ({"scale_wieght": sl.dense()}, "did you mean 'scale_weight'"),
    "no string": ({3: sl.dense()}, "operations must be among"),
    "twice in a tuple": ({("add_bias", "add_bias"): sl.dense()}, "every operation once"),
    "twice": (
        {("scale_weight", "add_weight"): sl.dense(), "add_weight": sl.lora(1)},
        "every operation once",
    ),
    "shared and own": (
        {("add_bias", "scale_bias"): sl.dense(), "scale_bias": "add_bias"},
        "every operation once",
    ),
    "nothing": ({}, "an operation with a superlora.Spec"),
    "shares what is not there": (
        {"add_weight": sl.dense(), "scale_bias": "add_bias"},
        r"spec\['scale_bias'\] must name an operation with a design of its own: got 'add_bias'",
    ),
    "shares with itself": ({"add_weight": sl.dense(), "add_bias": "add_bias"}, "of its own"),
    "shares what shares": (
        {**sl.ssf(), "add_bias": "scale_bias"},
        "must name an operation with a design of its own: got 'scale_bias'",
    ),
    "shares a matrix": (
        {"scale_weight": sl.lora(2), "scale_bias": "scale_weight"},
        "must share a vector, of order 1 and a group a weight",
    ),
    "shares one group": (
        {"add_bias": sl.dense(groups=1), "scale_bias": "add_bias"},
        "must share a vector",
    ),
    "shares one number": (
        {"scale_weight": support("scale_weight", "constant"), "scale_bias": "scale_weight"},
        "must share a vector",
    ),
    "entries that do not agree": (
        {"scale_weight": sl.dense(), "scale_bias": "scale_weight"},
        "'scale_weight.blocks.0.q' must have 6 entries for 'scale_bias.blocks.0.q': got 24",
    ),
    "inputs for outputs": (
        {"weight_to_bias": sl.dense(), "add_bias": "weight_to_bias"},
        "'weight_to_bias.blocks.0.q' must have 6 entries for 'add_bias.blocks.0.q': got 4",
    ),
    "nothing left of one": (
        {"add_bias": sl.dense(overrides={".*": None}), "add_weight": sl.lora(1)},
        "overrides must not leave out all of 'add_bias.blocks.0.q'",
    ),
    "nothing left": (sl.lora(1, overrides={".*": None}), "overrides must not leave out all of"),
    "an override of nothing": (
        {"add_bias": sl.dense(overrides={"fc1": None})},
        "overrides must match weights of their own: 'fc1' matched none of",
    ),
}


@pytest.mark.parametrize(("design", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(design, message):
    with pytest.raises(ValueError, match=message):
        sl.Plan(design, LAYERS)


@pytest.mark.parametrize(
    "design", [3, None, [sl.dense()], {"add_bias": None}, {"add_bias": 2}, {(): sl.dense()}]
)
def test_wrong_kinds(design):
    with pytest.raises(TypeError, match=r"spec(\[.*\])? must be a superlora\.Spec"):
        sl.Plan(design, LAYERS)
    with pytest.raises(TypeError, match="the name of an operation"):
        sl.Plan({("scale_bias", "add_weight"): "add_bias", "add_bias": sl.dense()}, LAYERS)


@pytest.mark.parametrize(
    "values",
    [
        {"supports": 3},
        {"supports": []},
        {"supports": [[["add_bias"], 3]]},
        {"supports": [["add_bias", sl.dense().to_dict()]]},
        {"supports": [[["add_bias"], sl.dense().to_dict()]] * 2},
        {"supports": [[["nothing"], sl.dense().to_dict()]]},
        {"supports": [[[["add_bias"]], sl.dense().to_dict()]]},
        3,
    ],
)
def test_a_dict_that_is_no_design_is_refused(values):
    with pytest.raises((TypeError, ValueError)):
        design_from_dict(values)
    with pytest.raises((TypeError, ValueError)):
        sl.Supports.from_dict(values)


def test_the_dict_of_a_spec_is_not_one_of_supports():
    with pytest.raises(ValueError, match=r"^supports must have the key 'supports' alone: got \["):
        sl.Supports.from_dict(sl.lora().to_dict())
    with pytest.raises(TypeError, match=r"^supports must be a mapping: got int$"):
        sl.Supports.from_dict(3)


def test_without_an_operation():
    design = design_of(sl.glora(2))
    gone = without(design, "scale_bias", LAYERS, all_of=True)
    assert gone.operations == tuple(op for op in design.operations if op != "scale_bias")
    part = without(design, "scale_bias", ["head"])
    assert part.operations == design.operations
    left = {n for n, own in sl.Plan(part, LAYERS).layout.supports.items() if "scale_bias" in own}
    assert left == {"blocks.0.q", "blocks.0.o"}
    twice = sl.Plan(without(part, "scale_bias", ["blocks.0.q", "head"]), LAYERS)
    left = {n for n, own in twice.layout.supports.items() if "scale_bias" in own}
    assert left == {"blocks.0.o"}
    assert without(part, "scale_bias", ["head"]) == part
    joint = design_of({("scale_bias", "add_bias"): sl.dense(groups=1)})
    assert without(joint, "scale_bias", LAYERS, all_of=True).operations == ("add_bias",)
    assert without(joint, "left_weight", LAYERS, all_of=True) == joint
    with pytest.raises(ValueError, match="'scale_bias' must have a layer that it changes"):
        without(sl.Supports({"scale_bias": sl.dense()}), "scale_bias", LAYERS, all_of=True)


def test_entries_that_another_operation_takes_stay():
    design = design_of({"scale_bias": sl.dense(), "add_bias": "scale_bias"})
    for kept in (without(design, "scale_bias", LAYERS, all_of=True),):
        assert "add_bias" in sl.Plan(kept, LAYERS).layout.supports["head"]
    plan = sl.Plan(without(design, "scale_bias", ["head"]), LAYERS)
    assert "add_bias" in plan.layout.supports["head"]


@pytest.mark.parametrize(
    ("design", "message"),
    [
        (
            {"right_weight": sl.Spec(rank=2, fold=(70, 50)), "add_weight": sl.lora(2)},
            r"^right_weight: fold\[0\] must be at most",
        ),
        ({"add_bias": sl.lora(rank=((3, 3),))}, r"^add_bias: rank\[0\]\[1\] must be at most 1"),
        (
            {("left_weight", "add_bias"): sl.Spec(rank=2, order=3, groups=1, fold="stack")},
            "^left_weight, add_bias: fold='stack'",
        ),
    ],
)
def test_errors_of_sizes_name_the_operation(design, message):
    with pytest.raises(ValueError, match=message):
        sl.Plan(design, {"q": (6, 4), "v": (8, 4)})
