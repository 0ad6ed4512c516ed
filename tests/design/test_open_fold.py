"""Folds whose sizes leave one of the outputs and one of the inputs open, for any weight."""

from __future__ import annotations

import json

import pytest

import superlora as sl
from superlora import maps

SHAPES = {"q": (6, 4), "v": (12, 8), "fc": (4, 20)}
HADAMARD = {"splits": 2, "combine": "hadamard"}


@pytest.mark.parametrize(
    ("fields", "folds"),
    [
        ({"fold": (None, None)}, [(6, 4), (12, 8), (4, 20)]),
        ({"fold": (2, None, 2, None)}, [(2, 3, 2, 2), (2, 6, 2, 4), (2, 2, 2, 10)]),
        ({"fold": (None, 2, None, 4)}, [(3, 2, 1, 4), (6, 2, 2, 4), (2, 2, 5, 4)]),
        ({"fold": (2, None, None)}, [(2, 3, 4), (2, 6, 8), (2, 2, 20)]),
        ({"fold": (2, None, 2, None), **HADAMARD}, [(2, 3, 2, 2), (2, 6, 2, 4), (2, 2, 2, 10)]),
        ({"fold": (None, None), "splits": 2}, [(6, 4), (12, 8), (4, 20)]),
        ({"fold": (2, None, None), "map": maps.Shuffle()}, [(2, 3, 4), (2, 6, 8), (2, 2, 20)]),
    ],
)
def test_what_is_left_of_a_weights_sides(fields, folds):
    modes = len(fields["fold"])
    plan = sl.Plan(sl.Spec(rank="full", order=modes, **fields), SHAPES)
    assert [group.fold for group in plan.layout.groups] == folds
    assert plan.num_dense == sum(rows * columns for rows, columns in SHAPES.values())


def test_a_size_of_one_split_is_left_by_all():
    spec = sl.Spec(rank="full", splits=2, fold=((None, 2), (2, None)))
    plan = sl.Plan(spec, SHAPES)
    found = [[split.shape for split in group.splits] for group in plan.layout.groups]
    assert found == [[(3, 2), (2, 2)], [(6, 2), (2, 4)], [(2, 2), (2, 10)]]


def test_one_side_may_be_left_and_the_other_said():
    plan = sl.Plan(sl.Spec(rank=2, order=3, fold=(2, None, 4)), {"q": (6, 4), "v": (8, 4)})
    assert [group.fold for group in plan.layout.groups] == [(2, 3, 4), (2, 4, 4)]
    with pytest.raises(
        ValueError, match=r"fold must divide the 8 inputs of a weight: got \(2, None"
    ):
        sl.Plan(sl.Spec(rank=2, order=3, fold=(2, None, 4)), {"q": (6, 8)})


def test_an_open_fold_survives_json():
    spec = sl.Spec(rank="full", splits=2, fold=[[None, 2], [2, None]])
    assert spec.fold == ((None, 2), (2, None))
    again = sl.Spec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert hash(again) == hash(spec)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"fold": (None, None, 2, 2), "order": 4},
            r"fold must have None once at most for the outputs: got 2 in \(None, None, 2, 2\)",
        ),
        (
            {"fold": ((2, None), (2, None)), "splits": 2},
            r"fold must have None once at most for the inputs: got 2 in \(\(2, None\), ",
        ),
        ({"fold": (None, 2, None), "order": 2}, "fold must have 2 modes, the order"),
        (
            {"fold": (None, None), "map": maps.Fastfood()},
            "fold must have no None with map=Fastfood, whose fold is not the weights' own",
        ),
    ],
)
def test_an_open_fold_that_says_nothing_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        sl.Spec(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fold": (4, None, None), "order": 3}, r"fold must divide the 6 outputs of a weight: got"),
        ({"fold": (2, None), "order": 2}, r"fold must divide the 6 outputs .*: got \(2, None\)"),
        ({"groups": 1}, r"fold=\(None, None\) must have one whole weight a group: got groups=1"),
        ({"groups": "layer"}, "must have one whole weight a group: got groups='layer'"),
    ],
)
def test_an_open_fold_that_cannot_serve_the_weights_is_refused(fields, message):
    shapes = {"0.q": (6, 4), "0.v": (6, 4)}
    with pytest.raises(ValueError, match=message):
        sl.Plan(sl.Spec(**{"fold": (None, None), **fields}), shapes)
