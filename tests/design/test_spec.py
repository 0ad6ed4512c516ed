"""`Spec`: what it accepts, what it refuses and in which words, and its way through JSON."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import superlora as sl
from tests.strategies import Mixing, Permuting, extended_plans, plans

NUMBERS = "must be a number: got"


@given(plans(), plans(mapped=True), extended_plans())
def test_a_spec_survives_json(plan, mapped, extended):
    for spec in (plan.spec, mapped.spec, extended.spec):
        again = sl.Spec.from_dict(json.loads(json.dumps(spec.to_dict())))
        assert again == spec
        assert hash(again) == hash(spec)
        assert again.scaling == spec.scaling
        assert type(again.map) is type(spec.map)


@given(plans(), plans(mapped=True), extended_plans())
def test_a_spec_is_shown_as_it_can_be_written(plan, mapped, extended):
    names = {"Spec": sl.Spec, "Mixing": Mixing, "Permuting": Permuting, **vars(sl.maps)}
    for spec in (plan.spec, mapped.spec, extended.spec):
        assert eval(repr(spec), names) == spec
    assert repr(sl.Spec()) == "Spec()"
    assert repr(sl.lora(2, alpha=16)) == "Spec(rank=2, alpha=16)"


def test_the_dict_of_a_spec_is_plain():
    spec = sl.Spec(rank=((2, "full"), 3), splits=2, fold=(4, 6), map=Permuting(seed=7), ratio=0.5)
    assert spec.to_dict() == {
        "rank": [[2, "full"], 3],
        "order": 2,
        "splits": 2,
        "groups": "weight",
        "fold": [4, 6],
        "core": None,
        "combine": "kronecker",
        "terms": 1,
        "first_split": None,
        "dense_from": "rank",
        "frozen": {},
        "frozen_terms": 0,
        "tied": [],
        "seed": 0,
        "ratio": 0.5,
        "size": None,
        "map": {"name": "Permuting", "seed": 7},
        "factor_map": None,
        "factor_size": None,
        "factor_scope": "all",
        "alpha": None,
        "rslora": False,
        "scale": None,
        "cut": "even",
        "overrides": {},
    }


def test_absent_fields_take_their_defaults():
    assert sl.Spec.from_dict({"rank": 2}) == sl.Spec(rank=2)
    assert sl.Spec.from_dict({"map": {"name": "Mixing"}}).map == Mixing()
    assert sl.Spec.from_dict({"map": Mixing(3)}).map == Mixing(3)


def test_a_spec_is_frozen_and_hashable_also_when_made_of_lists():
    spec = sl.Spec(rank=[[2, 3], "full"], splits=2, fold=[4, 6])
    assert spec.rank == ((2, 3), "full")
    assert spec.fold == (4, 6)
    assert {spec: 1}[sl.Spec(rank=((2, 3), "full"), splits=2, fold=(4, 6))] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.order = 3


def test_replace_changes_a_copy_and_checks_it():
    spec = sl.lora(rank=4)
    assert spec.replace(rank=8) == sl.lora(rank=8)
    assert spec == sl.lora(rank=4)
    with pytest.raises(ValueError, match="rank must be at least 1: got 0"):
        spec.replace(rank=0)


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        ({}, 1.0),
        ({"scale": 0.25}, 0.25),
        ({"scale": 0}, 0),
        ({"scale": -2.0}, -2.0),
        ({"rank": 8, "alpha": 16}, 2.0),
        ({"rank": 16, "alpha": 1.0}, 1 / 16),
        ({"rank": ("full", 8), "splits": 2, "alpha": 4}, 0.5),
        ({"rank": (("full", 8, 8),), "order": 3, "alpha": 4}, 0.5),
    ],
)
def test_the_scale_is_alpha_by_rank_or_given_or_one(fields, scaling):
    assert sl.Spec(**fields).scaling == scaling


@pytest.mark.parametrize(
    ("fields", "split_ranks"),
    [
        ({"rank": 3, "splits": 2}, (3, 3)),
        ({"rank": "full", "splits": 3}, ("full",) * 3),
        ({"rank": ("full", 2), "splits": 2}, ("full", 2)),
        ({"rank": (2, 3)}, ((2, 3),)),
        ({"rank": ((2, 3),)}, ((2, 3),)),
        ({"rank": ((2, 3), 4), "splits": 2}, ((2, 3), 4)),
        ({"rank": ("full", 2, 2), "order": 3}, (("full", 2, 2),)),
        ({"rank": ("full",), "order": 1}, (("full",),)),
    ],
)
def test_ranks_are_spread_over_the_splits(fields, split_ranks):
    assert sl.Spec(**fields).split_ranks == split_ranks


def test_one_entry_a_split_is_a_rank_also_with_one_split():
    # "A tuple has one entry a split, each an integer, "full", or a tuple": K = 1 is no exception.
    for splits in (2, 1):
        assert sl.Spec(rank=(4,) * splits, splits=splits).split_ranks == (4,) * splits


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be at least 1: got 0"),
        ({"rank": -2}, ValueError, "rank must be at least 1: got -2"),
        ({"rank": True}, TypeError, "rank must be an integer: got True"),
        ({"rank": 4.0}, TypeError, r"rank must be an integer: got 4\.0"),
        ({"rank": None}, TypeError, "rank must be an integer: got None"),
        ({"rank": "half"}, ValueError, "rank must be one of 'full'.* got 'half'"),
        ({"rank": (2, 0)}, ValueError, r"rank\[0\]\[1\] must be at least 1: got 0"),
        ({"rank": (2, 1.5)}, TypeError, r"rank\[0\]\[1\] must be an integer: got 1\.5"),
        ({"rank": (2, "all")}, ValueError, r"rank\[0\]\[1\] must be one of 'full'.* got 'all'"),
        ({"rank": (2, (3, 4))}, ValueError, r"one entry for each of 1 splits: got \(2, \(3, 4\)\)"),
        ({"rank": ((2, (3,)),)}, TypeError, r"rank\[0\]\[1\] must be an integer: got \(3,\)"),
        (
            {"rank": (2, 3, 4)},
            ValueError,
            r"one entry for each of . (modes|splits): got \(2, 3, 4\)",
        ),
        ({"rank": ()}, ValueError, r"rank.* must have one entry for each of .*: got \(\)"),
        (
            {"rank": (2, 3, 4), "splits": 2},
            ValueError,
            r"rank must have one entry for each of 2 splits: got \(2, 3, 4\)",
        ),
        (
            {"rank": (2, (3,)), "splits": 2},
            ValueError,
            r"rank\[1\] must have one entry for each of 2 modes: got \(3,\)",
        ),
        (
            {"rank": ("full", 0), "splits": 2},
            ValueError,
            r"rank\[1\] must be at least 1: got 0",
        ),
        ({"order": 0}, ValueError, "order must be at least 1: got 0"),
        ({"order": 2.0}, TypeError, r"order must be an integer: got 2\.0"),
        ({"order": 17}, ValueError, "order must be at most 16: got 17"),
        ({"splits": 17}, ValueError, "splits must be at most 16: got 17"),
        ({"splits": 0}, ValueError, "splits must be at least 1: got 0"),
        ({"splits": True}, TypeError, "splits must be an integer: got True"),
        ({"groups": 0}, ValueError, "groups must be at least 1: got 0"),
        ({"groups": -4}, ValueError, "groups must be at least 1: got -4"),
        ({"groups": 2.0}, TypeError, r"groups must be .*an integer: got 2\.0"),
        ({"groups": True}, TypeError, "groups must be .*an integer: got True"),
        ({"groups": "model"}, ValueError, "groups must be one of 'weight', 'layer'.*got 'model'"),
        ({"fold": "square"}, ValueError, "fold must be one of 'natural'.* got 'square'"),
        ({"fold": 4}, TypeError, "fold must be one of .* or a tuple of mode sizes: got 4"),
        ({"fold": None}, TypeError, "fold must be one of .*: got None"),
        ({"fold": (2, 3, 4)}, ValueError, r"fold must have 2 modes, the order: got \(2, 3, 4\)"),
        ({"fold": (2, 0)}, ValueError, r"fold\[1\] must be at least 1: got 0"),
        ({"fold": (2.0, 3)}, TypeError, r"fold\[0\] must be an integer: got 2\.0"),
        ({"core": "half"}, ValueError, "core must be one of 'identity', .*'train', None: got"),
        ({"cut": "odd"}, ValueError, "cut must be one of 'even', 'pad': got 'odd'"),
        ({"map": "Identity"}, TypeError, r"map must be a superlora\.maps\.Map: got 'Identity'"),
        ({"map": Mixing}, TypeError, r"map must be a superlora\.maps\.Map: got <class"),
        *[
            ({"map": Mixing(), "ratio": ratio}, ValueError, r"ratio must be in \(0, 1\]: got")
            for ratio in (0, 0.0, -0.5, 1.5, math.inf, math.nan, True, "0.5", None)
        ],
        ({"ratio": 0.5}, ValueError, r"ratio must be 1 with map=Identity\(\).*got 0\.5"),
        ({"alpha": 16, "scale": 1.0}, ValueError, r"alpha must not be given beside scale=1\.0"),
        ({"alpha": 16, "rank": (2, 3)}, ValueError, r"one integer rank: got rank=\(2, 3\)"),
        ({"alpha": 16, "rank": "full"}, ValueError, "alpha must come with one integer rank: got"),
        ({"alpha": math.nan}, ValueError, "alpha must be finite: got nan"),
        ({"alpha": math.inf}, ValueError, "alpha must be finite: got inf"),
        ({"alpha": "16"}, TypeError, f"alpha {NUMBERS} '16'"),
        ({"scale": math.nan}, ValueError, "scale must be finite: got nan"),
        ({"scale": -math.inf}, ValueError, "scale must be finite: got -inf"),
        ({"scale": True}, TypeError, f"scale {NUMBERS} True"),
        ({"scale": (1.0,)}, TypeError, f"scale {NUMBERS} "),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(fields, error, message):
    with pytest.raises(error, match=message) as caught:
        sl.Spec(**fields)
    assert type(caught.value) is error
    assert " must " in str(caught.value)
    assert "got " in str(caught.value)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"ranks": 4}, ValueError, r"spec must have only the fields .*: got also \['ranks'\]"),
        ([("rank", 4)], TypeError, "spec must be a mapping: got list"),
        ({"rank": 0}, ValueError, "rank must be at least 1: got 0"),
        ({"map": {"name": "Nowhere"}}, ValueError, "map must be one of .*Identity.*got 'Nowhere'"),
        ({"map": {}}, ValueError, "map must be one of .*: got None"),
        ({"map": "Identity"}, TypeError, "map must be a mapping with a name: got 'Identity'"),
        ({"map": {"name": "Mixing", "size": 3}}, ValueError, "map Mixing has wrong fields: .*size"),
    ],
)
def test_a_dict_that_is_no_spec_is_refused(values, error, message):
    with pytest.raises(error, match=message):
        sl.Spec.from_dict(values)


@given(st.sampled_from([sl.lora, sl.lokr, sl.lonkr, sl.lotr, sl.fact_tt, sl.fact_tk, sl.lorta]))
def test_a_preset_passes_its_changes_on(preset):
    assert preset(rank=3, scale=0.5) == preset(rank=3).replace(scale=0.5)
    assert preset(rank=3) != preset(rank=4)
    with pytest.raises(TypeError, match="scales"):
        preset(rank=3, scales=0.5)
