"""Fields that no plan can have: refused by name, with the rule and what was got."""

from __future__ import annotations

import pytest

import superlora as sl

TWO = {"q": (6, 4), "v": (6, 4)}

BLOCKS = "must name a core or a factor of one of 1 splits, as in '0.core' or '0.factor1': got"
SINGULAR = "must be the factor of one weight's outputs or inputs to hold its singular vectors"
HADAMARD = {"splits": 2, "combine": "hadamard"}

VALUES = {
    "terms 0": ({"terms": 0}, ValueError, "terms must be at least 1: got 0"),
    "terms 17": ({"terms": 17}, ValueError, "terms must be at most 16: got 17"),
    "terms True": ({"terms": True}, TypeError, "terms must be an integer: got True"),
    "combine": (
        {"combine": "sum"},
        ValueError,
        "combine must be one of 'kronecker', 'hadamard': got 'sum'",
    ),
    "dense_from": ({"dense_from": "third"}, ValueError, "dense_from must be one of .*got 'third'"),
    "seed -1": ({"seed": -1}, ValueError, "seed must be at least 0: got -1"),
    "seed 2**64": ({"seed": 2**64}, ValueError, rf"seed must be below 2\*\*64: got {2**64}"),
    "seed 1.0": ({"seed": 1.0}, TypeError, r"seed must be an integer: got 1\.0"),
    "first_split alone": (
        {"first_split": 2},
        ValueError,
        "first_split must come with a Kronecker product of at least two splits: got splits=1",
    ),
    "first_split, hadamard": (
        {"first_split": 2, **HADAMARD},
        ValueError,
        "first_split must come with a Kronecker product .*got splits=2, combine='hadamard'",
    ),
    "first_split 0": (
        {"first_split": 0, "splits": 2},
        ValueError,
        "first_split must be at least 1: got 0",
    ),
    "first_split 2.0": (
        {"first_split": 2.0, "splits": 2},
        TypeError,
        r"first_split must be an integer: got 2\.0",
    ),
    "orders": (
        {"order": (2, 3)},
        ValueError,
        r"order must have one entry for each of 1 splits: got \(2, 3\)",
    ),
    "order 0": (
        {"order": (2, 0), "splits": 2},
        ValueError,
        r"order\[1\] must be at least 1: got 0",
    ),
    "order 17": (
        {"order": (2, 17), "splits": 2},
        ValueError,
        r"order\[1\] must be at most 16: got 17",
    ),
    "no order": ({"order": ()}, ValueError, r"order must have one entry .*: got \(\)"),
    "cores": (
        {"core": ("full", "full")},
        ValueError,
        r"core must have one entry for each of 1 splits: got \('full', 'full'\)",
    ),
    "a core": (
        {"core": ("full", "half"), "splits": 2},
        ValueError,
        r"core\[1\] must be one of 'identity', 'diagonal', 'full', 'train', None: got 'half'",
    ),
    "folds, hadamard": (
        {"fold": ((2, 3), (2, 3)), **HADAMARD},
        ValueError,
        r"fold must have one tuple for each of 2 splits of a Kronecker product: got .*'hadamard'",
    ),
    "folds": (
        {"fold": ((2, 3),), "splits": 2},
        ValueError,
        r"fold must have one tuple for each of 2 splits of a Kronecker product: got \(\(2, 3\),\)",
    ),
    "folds and a size": (
        {"fold": ((2, 3), 4), "splits": 2},
        TypeError,
        r"fold\[1\] must be a tuple of mode sizes: got 4",
    ),
    "folds of unequal modes": (
        {"fold": ((2, 3), (2, 3, 4)), "splits": 2},
        ValueError,
        r"fold\[1\] must have 2 modes, the order: got \(2, 3, 4\)",
    ),
    "folds with 0": (
        {"fold": ((2, 3), (0, 3)), "splits": 2},
        ValueError,
        r"fold\[1\]\[0\] must be at least 1: got 0",
    ),
    "empty folds": ({"fold": ((), ()), "splits": 2}, ValueError, r"must have 2 modes.*got \(\)"),
    "frozen a list": ({"frozen": ["0.core"]}, TypeError, "frozen must be a mapping .*got"),
    "frozen None": ({"frozen": None}, TypeError, "frozen must be a mapping .*got None"),
    "frozen a number": ({"frozen": {0: "random"}}, TypeError, "frozen must be a mapping .*got"),
    "frozen source": (
        {"frozen": {"0.factor0": "zeros"}},
        ValueError,
        r"frozen\['0\.factor0'\] must be one of 'random', .*: got 'zeros'",
    ),
    "frozen source None": (
        {"frozen": {"0.factor0": None}},
        ValueError,
        r"frozen\['0\.factor0'\] must be one of .*got None",
    ),
    "tied a string": ({"tied": "0.core"}, TypeError, "tied must be a list of blocks.*got '0.core'"),
    "tied None": ({"tied": None}, TypeError, "tied must be a list of blocks.*got None"),
    "tied a set": ({"tied": {"0.core"}}, TypeError, "tied must be a list of blocks.*got"),
    "tied a number": ({"tied": [0]}, ValueError, f"tied {BLOCKS} 0"),
    "singular core": (
        {"core": "full", "frozen": {"0.core": "singular"}},
        ValueError,
        rf"frozen\['0\.core'\] {SINGULAR}",
    ),
    **{
        f"singular, {label}": (
            {**fields, "frozen": {"0.factor0": "singular_root"}},
            ValueError,
            rf"frozen\['0\.factor0'\] {SINGULAR}",
        )
        for label, fields in {
            "groups": {"groups": 1},
            "layer": {"groups": "layer"},
            "tied": {"tied": ["0.factor0"]},
            "balanced": {"fold": "balanced"},
            "kronecker": {"splits": 2},
            "stack of order 2": {"fold": "stack"},
            "layer mode": {"fold": "stack", "order": 3},
            "explicit": {"fold": (6, 4)},
            "natural of order 3": {"order": 3},
        }.items()
    },
}
# One digit each, in ASCII: another spelling of a block must not slip through and do nothing.
for wrong in ("1.core", "0.factor2", "factor0", "0.plane", "", "0.core ", "00.core", "٠.core"):
    VALUES[f"frozen {wrong!r}"] = ({"frozen": {wrong: "ones"}}, ValueError, f"frozen {BLOCKS}")
    VALUES[f"tied {wrong!r}"] = ({"tied": [wrong]}, ValueError, f"tied {BLOCKS}")


@pytest.mark.parametrize(("fields", "error", "message"), VALUES.values(), ids=VALUES)
def test_a_value_that_no_plan_can_have_is_refused_by_name(fields, error, message):
    with pytest.raises(error, match=message) as caught:
        sl.Spec(**fields)
    assert type(caught.value) is error
    assert " must " in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"frozen": (("0.factor0", "random"), ("0.factor0", "ones"))},
        {"overrides": (("q", {"rank": 2}), ("q", {"rank": 3}))},
    ],
    ids=["frozen", "overrides"],
)
def test_pairs_that_say_two_things_of_one_key_are_refused_or_the_first_counts(fields):
    try:
        spec = sl.Spec(**fields)
    except (TypeError, ValueError):
        return
    assert sl.Spec.from_dict(spec.to_dict()) == spec
    assert spec.of("q").rank in (4, 2)


NO_BLOCK = "must name blocks that every group has: group 0 has no"
PLANS = {
    "all frozen": (
        sl.Spec(frozen={"0.factor0": "random", "0.factor1": "ones"}),
        "frozen must leave every product a trainable block: group 0 has none",
    ),
    "one product all frozen": (
        sl.Spec(order=1, rank="full", terms=2, frozen={"0.core": "random"}),
        "frozen must leave every product a trainable block: group 0 has none",
    ),
    "frozen, no core": (sl.Spec(frozen={"0.core": "ones"}), f"frozen {NO_BLOCK} '0.core'"),
    "tied, no core": (sl.Spec(tied=["0.core"]), f"tied {NO_BLOCK} '0.core'"),
    "tied, dense": (sl.Spec(rank="full", tied=["0.factor0"]), f"tied {NO_BLOCK} '0.factor0'"),
    "singular rank": (
        sl.tinylora(5, 3),
        "rank.* must be at most 4, the s.* of .*: got 5",
    ),
    "singular rank of an identity core": (
        sl.Spec(rank=5, frozen={"0.factor0": "singular"}),
        "rank must be at most 4, the singular vectors of 'q': got 5 .* block '0.factor0'",
    ),
    "folds too small": (
        sl.Spec(fold=((1, 2), (2, 2)), splits=2),
        "fold must cover the group: expected at least 24 entries, got",
    ),
    "folds too large": (
        sl.Spec(fold=((4, 2), (4, 2)), splits=2),
        r"fold\[0\] must be at most 6, .* the 24 entries: got 16",
    ),
    "diagonal of unequal ranks": (
        sl.Spec(rank=(2, "full"), core="diagonal"),
        r"core='diagonal' must have one rank for all modes of split 0: got \(2, 'full'\)",
    ),
    "tinylora of a layer": (
        sl.tinylora().replace(groups="layer", frozen={}),
        "needs a layer number in every weight's name",
    ),
}


@pytest.mark.parametrize(("spec", "message"), PLANS.values(), ids=PLANS)
def test_a_spec_that_cannot_serve_the_weights_is_refused(spec, message):
    with pytest.raises(ValueError, match=message) as caught:
        sl.Plan(spec, TWO)
    assert " must " in str(caught.value) or " needs " in str(caught.value)


def test_a_rank_beyond_the_singular_vectors_is_lowered_and_called_capped():
    plan = sl.Plan(sl.lora_xs(rank=5), {"q": (6, 4), "v": (6, 7)})
    assert plan.factor_shapes == {"0.0.core": (4, 4), "1.0.core": (5, 5)}
    assert [group.splits[0].capped for group in plan.layout.groups] == [True, False]


def test_a_block_that_one_group_lacks_is_refused_and_the_group_is_named():
    spec = sl.Spec(rank=3, tied=["0.factor0"])
    with pytest.raises(ValueError, match=r"tied must .* group 1 has no '0\.factor0'.*\['core'\]"):
        sl.Plan(spec, {"q": (6, 4), "v": (2, 4)})


# VeRA's own setting, rank 1024 beside a width of 768: the rank of fixed factors is not
# bounded by the sizes, every number of the diagonal says something of its own.
@pytest.mark.parametrize("shape", [(6, 4), (2, 40)])
def test_a_diagonal_between_frozen_factors_may_be_longer_than_the_sizes(shape):
    plan = sl.Plan(sl.vera(rank=8), {"q": shape})
    assert plan.num_parameters == 8 + shape[0]


@pytest.mark.parametrize(
    ("factor", "shape", "first", "second"),
    [
        (None, (768, 768), (24, 24), (32, 32)),
        (8, (768, 768), (8, 8), (96, 96)),
        (16, (128, 250), (8, 10), (16, 25)),
        (7, (49, 50), (7, 5), (7, 10)),
        (1, (12, 6), (1, 1), (12, 6)),
    ],
)
def test_the_first_split_is_bounded(factor, shape, first, second):
    if first == (1, 1):
        with pytest.raises(ValueError, match="splits must leave every split more than one entry"):
            sl.Plan(sl.lokr(rank=1, factor=factor), {"q": shape})
        return
    (group,) = sl.Plan(sl.lokr(rank=1, factor=factor), {"q": shape}).layout.groups
    assert [split.shape for split in group.splits] == [first, second]


@pytest.mark.parametrize(
    ("dense_from", "dense"),
    [("rank", {5: False, 12: False, 13: True}), ("half", {9: False, 10: True, 13: True})],
)
def test_from_which_rank_a_matrix_is_dense(dense_from, dense):
    for rank, expected in dense.items():
        plan = sl.Plan(sl.lora(rank=rank, dense_from=dense_from), {"q": (20, 12)})
        assert ("0.0.core" in plan.factor_shapes) == expected


@pytest.mark.parametrize(
    ("orders", "sizes"),
    [
        ((5, 5), [(2, 3, 2, 3, 2)]),
        ((4, 5), [(6, 2, 3, 2)]),
        ((3, 5), [(6, 6, 2)]),
        ((2, 5), [(12, 6)]),
        ((1, 5), [(72,)]),
    ],
)
def test_the_first_modes_of_a_split_of_lower_order_join_the_most(orders, sizes):
    fold = ((2, 3, 2, 3, 2), (1, 1, 1, 1, 2))
    spec = sl.Spec(rank="full", order=orders, splits=2, fold=fold)
    plan = sl.Plan(spec, {"q": (12, 12)})  # sizes of 1 are as asked for: no warning
    split = plan.layout.groups[0].splits[0]
    assert [split.sizes] == sizes
    assert split.shape == fold[0]
    assert plan.factor_shapes["0.0.core"] == sizes[0]


def test_a_split_may_be_a_number_if_its_sizes_are_given():
    """As the peers' LoKr of two prime widths has it."""
    plan = sl.Plan(sl.Spec(rank=("full", 2), fold=((1, 1), (6, 4)), splits=2), {"q": (6, 4)})
    assert plan.factor_shapes == {"0.0.core": (1, 1), "0.1.factor0": (6, 2), "0.1.factor1": (4, 2)}
    with pytest.warns(UserWarning, match="no Kronecker structure where a split has size 1"):
        lokr = sl.Plan(sl.lokr(2), {"q": (7, 13)})
    assert [split.shape for split in lokr.layout.groups[0].splits] == [(1, 1), (7, 13)]
    assert "note: no Kronecker structure" in lokr.describe()


def test_what_a_fold_cannot_serve_is_named():
    with pytest.raises(ValueError, match="of 35 entries; use fewer splits; in the group of 'odd'"):
        sl.Plan(sl.krona(), {"q": (6, 4), "odd": (7, 5)})
