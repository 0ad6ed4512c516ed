"""The table of a plan, and its notes on what a user may not expect."""

from __future__ import annotations

import pytest

import superlora as sl
from superlora.design.cost_rule import application
from tests.strategies import Mixing, make_plan


def rows_of(plan):
    return [line.split() for line in plan.describe().splitlines()]


def test_alike_groups_share_a_row():
    shapes = {"0.q": (6, 4), "0.v": (6, 4), "1.q": (8, 4)}
    assert sl.Plan(sl.lora(rank=2), shapes).describe().splitlines() == [
        "groups  entries  fold   splits (size:rank)        parameters  applied",
        "2       24       6 x 4  6:2 x 4:2, identity core  40          "
        "factored, formed from 12 tokens",
        "1       32       8 x 4  8:2 x 4:2, identity core  24          "
        "factored, formed from 14 tokens",
        "3 weights, 64 trainable parameters for 80 entries (80.0000%)",
    ]


def test_a_row_says_how_its_updates_are_applied():
    shapes = {"q": (600, 40), "v": (600, 40), "down": (40, 600)}
    plan = sl.Plan(sl.lora(rank=2, groups=1, fold="aligned"), shapes)
    found = list(dict.fromkeys(str(application(plan.layout, name)) for name in ("q", "down")))
    assert len(found) == 2
    assert plan.describe().splitlines()[1].endswith(f"  {found[0]} or {found[1]}")
    # What changes a bias meets no inputs.
    bias = sl.Plan({"add_bias": sl.lora(rank=1)}, shapes)
    assert all(row.endswith("  formed") for row in bias.describe().splitlines()[1:3])


def test_every_split_shows_its_sizes_and_ranks():
    plan = sl.Plan(sl.Spec(rank=("full", (2, 1)), splits=2), {"q": (6, 8)})
    assert "2 x 2 (x) 3:2 x 4:1" in plan.describe()


def test_large_numbers_have_separators():
    shapes = {f"blocks.{i}.{part}": (768, 768) for i in range(12) for part in "qv"}
    text = sl.Plan(sl.lorta(rank=5), shapes).describe()
    assert "14,155,776  216 x 256 x 256  216:5 x 256:5 x 256:5  3,765" in text
    assert "24 weights, 3,765 trainable parameters for 14,155,776 entries (0.0266%)" in text


@pytest.mark.parametrize(
    ("spec", "shapes", "notes"),
    [
        (sl.lora(rank=2), {"q": (6, 4)}, []),
        (
            sl.lora(rank=5),
            {"q": (6, 4), "v": (6, 8)},
            ["rank 5 is too large for a mode in 1 of 2 groups; it is un-factored there"],
        ),
        (
            sl.fact_tk(rank=3),
            {"0.q": (6, 4), "1.q": (6, 4)},
            ["rank 3 is too large for a mode in 1 of 1 groups; it is un-factored there"],
        ),
        (
            sl.lora(rank=1, groups=1, fold="balanced"),
            {"q": (1, 97)},
            ["the folds cover 100 entries; 3 are cropped"],
        ),
        (
            sl.lora(rank=1, groups=2, fold="stack", cut="pad"),
            {"q": (4, 4)},
            [],
        ),
        (
            sl.lora(rank=1, groups=3, fold="balanced", cut="pad"),
            {"q": (10, 10)},
            ["the folds cover 108 entries; 8 are cropped"],
        ),
        (
            sl.krona(),
            {"q": (7, 4)},
            ["no Kronecker structure where a split has size 1: split 0 in mode 0"],
        ),
        (
            sl.lora(rank=1, groups=1, fold="balanced", map=Mixing(), ratio=0.3),
            {"q": (10, 10)},
            ["realised ratio 0.3, asked 0.3"],
        ),
        (
            sl.lora(rank=1, groups=1, fold="balanced", map=Mixing(), ratio=0.31),
            {"q": (10, 10)},
            ["realised ratio 0.36, asked 0.31"],
        ),
    ],
)
def test_what_a_user_may_not_expect_is_noted(spec, shapes, notes):
    lines = make_plan(spec, shapes).describe().splitlines()
    found = [line.removeprefix("note: ") for line in lines if line.startswith("note: ")]
    assert found == notes


def test_a_vector_is_not_said_to_exceed_its_rank():
    # A dense vector ignores an integer rank; 4 does not exceed a mode of 24 entries.
    assert "exceeds" not in sl.Plan(sl.Spec(rank=4, order=1), {"q": (6, 4)}).describe()


def test_the_representation_is_one_line():
    plan = sl.Plan(sl.lora(rank=2), {"q": (600, 40)})
    assert repr(plan) == "Plan(1 weights, 1 groups, 1,280 of 24,000 parameters)"
