"""Overrides: which weights take which fields, their groups, scales and names."""

from __future__ import annotations

import json

import pytest

import superlora as sl
from tests.strategies import Mixing

NAMES = ("blocks.0.q", "blocks.0.v", "blocks.1.q", "blocks.1.v", "head")
SHAPES = dict.fromkeys(NAMES, (6, 4))


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("q", {"blocks.0.q", "blocks.1.q"}),
        ("0.q", {"blocks.0.q"}),
        ("blocks.0.q", {"blocks.0.q"}),
        (r"blocks\.\d\.v", {"blocks.0.v", "blocks.1.v"}),
        (r"0\..", {"blocks.0.q", "blocks.0.v"}),
        ("q|head", {"blocks.0.q", "blocks.1.q", "head"}),
        (".*", set(NAMES)),
        ("^blocks.*v$", {"blocks.0.v", "blocks.1.v"}),
        ("(?i:HEAD)", {"head"}),
        ("(?i)HEAD", {"head"}),
        ("(?x) q  # the queries", {"blocks.0.q", "blocks.1.q"}),
        (r"(.)\.\1", set()),
        ("ead", set()),  # an end begins after a dot
        ("blocks", set()),  # and goes to the end
        ("0", set()),
        ("", set()),
    ],
)
def test_a_pattern_matches_a_whole_name_or_its_end_after_a_dot(pattern, matched):
    spec = sl.lora(rank=2, overrides={pattern: {"rank": 3}})
    assert {name for name in NAMES if spec.override_of(name) == pattern} == matched
    assert {name for name in NAMES if spec.of(name) == sl.lora(rank=3)} == matched
    assert {name for name in NAMES if spec.of(name) == sl.lora(rank=2)} == set(NAMES) - matched
    if matched:
        plan = sl.Plan(spec, SHAPES)
        assert {
            name
            for name in NAMES
            if all(plan.factor_shapes[block][1] == 3 for block in plan.blocks_of(name))
        } == matched
    else:
        with pytest.raises(ValueError, match=r"overrides must match weights of their own: .*none"):
            sl.Plan(spec, SHAPES)


def test_the_first_that_matches_counts():
    orders = [{"q": {"rank": 3}, ".*": {"rank": 1}}, {".*": {"rank": 1}, "q": {"rank": 3}}]
    first, second = (sl.lora(rank=2, overrides=overrides) for overrides in orders)
    assert (first.of("0.q").rank, first.of("0.v").rank) == (3, 1)
    assert (second.of("0.q").rank, second.of("0.v").rank) == (1, 1)
    with pytest.raises(ValueError, match="overrides must match weights of their own: 'q' matched"):
        sl.Plan(second, SHAPES)


@pytest.mark.parametrize(
    ("fields", "changes", "scaling"),
    [
        ({"alpha": 8}, {"rank": 4}, 2.0),  # alpha by the weight's own rank
        ({"alpha": 8}, {"alpha": 2}, 1.0),
        ({"alpha": 8}, {"scale": 0.5}, 0.5),
        ({"scale": 3}, {"alpha": 8}, 4.0),
        ({"scale": 3}, {"rank": 4}, 3.0),
        ({}, {"scale": -1}, -1.0),
        ({}, {"scale": 0}, 0.0),
        ({"alpha": 8}, {"scale": None}, 1.0),
        ({"alpha": 8}, {"rank": "full", "scale": 2}, 2.0),
        ({"scale": 0}, {"rank": 4}, 0.0),
    ],
)
def test_scale_and_alpha_take_each_others_place(fields, changes, scaling):
    spec = sl.Spec(rank=2, **fields, overrides={"q": changes})
    assert spec.of("0.q").scaling == scaling
    layout = sl.Plan(spec, SHAPES).layout
    assert layout.scaling("blocks.0.q") == scaling
    assert layout.scaling("head") == spec.scaling


def test_weights_of_equal_fields_make_groups_among_themselves():
    overrides = {
        "blocks.1.q": {"rank": 3},
        "head": {"rank": 3},
        "blocks.1.v": {"groups": 1, "fold": "balanced"},
    }
    spec = sl.Spec(rank=2, groups=1, fold="balanced", overrides=overrides)
    plan = sl.Plan(spec, SHAPES)
    # What an override changes to what it was is no design of its own.
    assert plan.layout.grouping.members == (
        ("blocks.0.q", "blocks.0.v", "blocks.1.v"),
        ("blocks.1.q", "head"),
    )
    assert list(plan.shapes) == list(NAMES)
    assert plan.blocks_of("blocks.1.v") == ("0.0.factor0", "0.0.factor1")
    assert plan.blocks_of("head") == ("1.0.factor0", "1.0.factor1")


def test_groups_are_numbered_design_by_design_in_order_of_appearance():
    plan = sl.Plan(sl.lora(rank=2, overrides={"q": {"rank": 3}}), SHAPES)
    numbers = {name: plan.layout.grouping.pieces[name][0].group for name in NAMES}
    assert numbers == {
        "blocks.0.q": 0,
        "blocks.1.q": 1,
        "blocks.0.v": 2,
        "blocks.1.v": 3,
        "head": 4,
    }


def test_tied_blocks_are_shared_within_a_design_only():
    spec = sl.Spec(rank=2, tied=["0.factor1"], overrides={"q": {"rank": 3}})
    plan = sl.Plan(spec, SHAPES)
    shared = {name: plan.blocks_of(name)[1] for name in NAMES}
    assert len(set(shared.values())) == 2
    assert shared["blocks.0.q"] == shared["blocks.1.q"] != shared["head"] == shared["blocks.1.v"]


def test_every_field_can_be_overridden_and_survives_json():
    changes = {
        "rank": [["full", 2], 1],
        "order": 2,
        "splits": 2,
        "groups": 1,
        "fold": [[2, 2], [6, 4]],
        "core": ["full", None],
        "combine": "kronecker",
        "terms": 2,
        "dense_from": "half",
        "frozen": {"1.core": "random"},
        "tied": ["0.core"],
        "seed": 5,
        "ratio": 0.5,
        "map": Mixing(3),
        "alpha": None,
        "scale": 0.25,
        "cut": "pad",
    }
    spec = sl.lora(rank=2, overrides={"v": changes, "head": {}})
    again = sl.Spec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.of("0.v") == sl.Spec(**changes)
    assert again.of("head") == sl.lora(rank=2)
    assert spec.replace(overrides={}) == sl.lora(rank=2)
    assert spec.replace(scale=3).of("0.v").scaling == 0.25


REFUSED = {
    "a list": (["q"], TypeError, "overrides must be a mapping with strings as keys: got"),
    "a string": ("q", TypeError, "overrides must be a mapping with strings as keys: got 'q'"),
    "None": (None, TypeError, "overrides must be a mapping with strings as keys: got None"),
    "a number as key": ({3: {}}, TypeError, "overrides must be a mapping .*got"),
    "a number": ({"q": 3}, TypeError, r"overrides\['q'\] must be a mapping .*got 3"),
    "a number as field": ({"q": {3: 1}}, TypeError, r"overrides\['q'\] must be a mapping .*got"),
    "no expression": (
        {"(": {"rank": 2}},
        ValueError,
        r"overrides\['\('\] must be a valid regular expression: missing \)",
    ),
    "an unknown field": (
        {"q": {"ranks": 2}},
        ValueError,
        r"overrides\['q'\] must change fields of a spec: got \['ranks'\]",
    ),
    "nested": (
        {"q": {"overrides": {"v": {}}}},
        ValueError,
        r"overrides\['q'\] must change fields of a spec: got \['overrides'\]",
    ),
    "a wrong value": ({"q": {"rank": 0}}, ValueError, r"overrides\['q'\]: rank must be at least 1"),
    "a wrong kind": ({"q": {"rank": {}}}, TypeError, r"overrides\['q'\]: rank must be an integer"),
    "alpha and scale": (
        {"q": {"alpha": 1, "scale": 1}},
        ValueError,
        r"overrides\['q'\]: alpha must not be given beside scale=1: got 1",
    ),
    "alpha without a rank": (
        {"q": {"rank": "full", "alpha": 1}},
        ValueError,
        r"overrides\['q'\]: alpha must come with one integer rank: got rank='full'",
    ),
    "a frozen block": (
        {"q": {"frozen": {"0.core": "dust"}}},
        ValueError,
        r"overrides\['q'\]: frozen\['0\.core'\] must be one of .*got 'dust'",
    ),
    "a contradiction": (
        {"q": {"order": 3, "fold": (6, 4)}},
        ValueError,
        r"overrides\['q'\]: fold must have 3 modes, the order: got \(6, 4\)",
    ),
}


@pytest.mark.parametrize(("overrides", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_wrong_overrides_are_refused_by_pattern(overrides, error, message):
    with pytest.raises(error, match=message) as caught:
        sl.Spec(overrides=overrides)
    assert type(caught.value) is error


def test_a_scale_of_zero_cannot_be_overridden():
    with pytest.raises(ValueError, match=r"overrides\['q'\] must not change the scale"):
        sl.lora(rank=2, scale=0, overrides={"q": {"scale": 1}})


def test_patterns_that_no_weight_takes_are_all_named():
    spec = sl.lora(rank=2, overrides={"k": {"rank": 3}, "q": {"rank": 3}, "o": {}})
    with pytest.raises(ValueError, match=r"overrides must .*'k', 'o' matched none of 'blocks\.0"):
        sl.Plan(spec, SHAPES)


def test_an_error_of_one_designs_weights_is_that_of_the_design():
    with pytest.raises(ValueError, match="groups must be at most 24, the number of entries: got"):
        sl.Plan(
            sl.lora(rank=2, overrides={"head": {"groups": 25, "fold": "balanced"}}),
            SHAPES,
        )
