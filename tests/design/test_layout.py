"""Layouts: a spec joined with weights gives folds, splits, ranks and blocks, or an error."""

from __future__ import annotations

import math
import warnings

import numpy
import pytest
from hypothesis import given

import superlora as sl
from superlora.design.layout import Layout
from superlora.design.network import row_slice
from tests import oracles
from tests.strategies import Mixing, extended_plans, make_plan, plans

ONE = {"q": (6, 4)}
TWO = {"blocks.0.q": (6, 4), "blocks.1.q": (6, 4)}
MIXED = {"blocks.0.q": (6, 4), "blocks.0.v": (2, 4), "blocks.1.q": (5, 8)}


def group_of(spec, shapes=ONE, index=0):
    return make_plan(spec, shapes).layout.groups[index]


@pytest.mark.parametrize(
    ("spec", "shapes", "folds"),
    [
        (sl.Spec(), MIXED, [(6, 4), (2, 4), (5, 8)]),
        (sl.Spec(order=3), {"q": (12, 7)}, [(3, 4, 7)]),
        (sl.Spec(order=4), {"q": (12, 8)}, [(3, 4, 2, 4)]),
        (sl.Spec(order=5), {"q": (12, 6)}, [(2, 2, 3, 2, 3)]),
        (sl.Spec(order=1), MIXED, [(24,), (8,), (40,)]),
        (sl.Spec(order=1, groups=2), MIXED, [(36,), (36,)]),
        (sl.Spec(groups=1, fold="stack"), TWO, [(12, 4)]),
        (sl.Spec(groups=3, fold="stack"), TWO, [(4, 4)] * 3),
        (sl.Spec(groups="layer", fold="stack"), {"0.q": (6, 4), "0.v": (2, 4)}, [(8, 4)]),
        (sl.Spec(groups=1, fold="stack", order=3), TWO, [(2, 6, 4)]),
        (sl.Spec(groups="layer", fold="stack", order=3), TWO, [(1, 6, 4)] * 2),
        (sl.Spec(groups=1, fold="balanced"), TWO, [(6, 8)]),
        (sl.Spec(groups=5, fold="balanced"), TWO, [(2, 5)] * 3 + [(3, 3)] * 2),
        (sl.Spec(groups=5, fold="balanced", cut="pad"), TWO, [(2, 5)] * 5),
        (sl.Spec(groups=1, fold="aligned"), TWO, [(12, 4)]),
        (sl.Spec(groups=1, fold="aligned", order=3), MIXED, [(3, 6, 4)]),
        (sl.Spec(groups=1, fold=(7, 7)), TWO, [(7, 7)]),
        (sl.Spec(groups=1, fold=(4, 5), map=Mixing(), ratio=0.4), TWO, [(4, 5)]),
        (sl.Spec(groups=1, fold="balanced", map=Mixing(), ratio=0.4), TWO, [(4, 5)]),
    ],
)
def test_each_kind_of_fold(spec, shapes, folds):
    layout = make_plan(spec, shapes).layout
    assert [group.fold for group in layout.groups] == folds


@pytest.mark.parametrize(
    ("spec", "blocks"),
    [
        (sl.Spec(rank=2), {"factor0": (6, 2), "factor1": (4, 2)}),
        (sl.Spec(rank=4), {"factor0": (6, 4), "factor1": (4, 4)}),
        (sl.Spec(rank=5), {"core": (6, 4)}),
        (sl.Spec(rank="full"), {"core": (6, 4)}),
        (sl.Spec(rank=("full", "full")), {"core": (6, 4)}),
        (sl.Spec(rank=2, order=1), {"core": (24,)}),
        (sl.Spec(rank="full", order=1), {"core": (24,)}),
        (sl.Spec(rank=2, core="full"), {"core": (2, 2), "factor0": (6, 2), "factor1": (4, 2)}),
        (sl.Spec(rank=5, core="full"), {"core": (5, 4), "factor0": (6, 5)}),
        (sl.Spec(rank=(2, 2)), {"factor0": (6, 2), "factor1": (4, 2)}),
        (sl.Spec(rank=(2, 3)), {"core": (2, 3), "factor0": (6, 2), "factor1": (4, 3)}),
        (sl.Spec(rank=(2, "full")), {"core": (2, 4), "factor0": (6, 2)}),
        (sl.Spec(rank=("full", 3)), {"core": (6, 3), "factor1": (4, 3)}),
        (sl.Spec(rank=7, core="identity"), {"core": (6, 4)}),
        (
            sl.Spec(rank=3, order=3),
            {"core": (2, 3, 3), "factor1": (3, 3), "factor2": (4, 3)},
        ),
        (
            sl.Spec(rank=5, order=3, core="identity"),
            {"factor0": (2, 5), "factor1": (3, 5), "factor2": (4, 5)},
        ),
    ],
)
def test_the_blocks_of_one_split(spec, blocks):
    group = group_of(spec)
    assert group.splits[0].block_shapes == blocks


def test_each_split_has_its_own_sizes_and_ranks():
    plan = sl.Plan(sl.Spec(rank=("full", (2, 1)), splits=2), {"q": (6, 8)})
    assert plan.factor_shapes == {
        "0.0.core": (2, 2),
        "0.1.core": (2, 1),
        "0.1.factor0": (3, 2),
        "0.1.factor1": (4, 1),
    }


@given(plans())
def test_counts_and_names_agree(plan):
    layout = plan.layout
    assert plan.num_parameters == sum(map(math.prod, plan.factor_shapes.values()))
    assert plan.num_dense == sum(rows * columns for rows, columns in plan.shapes.values())
    assert list(plan.shapes) == list(layout.grouping.pieces)
    named = {block for name in plan.shapes for block in plan.blocks_of(name)}
    assert named == set(plan.factor_shapes)
    for name in plan.shapes:
        groups = {str(piece.group) for piece in layout.grouping.pieces[name]}
        mine = [block for block in plan.factor_shapes if block.split(".")[0] in groups]
        assert sorted(plan.blocks_of(name)) == sorted(mine)


@given(extended_plans())
def test_blocks_have_the_documented_names_shapes_and_sources(plan):
    expected = oracles.blocks_of(plan)
    assert plan.layout.block_shapes == {name: shape for name, (shape, _) in expected.items()}
    assert plan.layout.frozen == {name: source for name, (_, source) in expected.items() if source}
    assert plan.factor_shapes.keys() | plan.frozen_shapes.keys() == expected.keys()
    assert not plan.factor_shapes.keys() & plan.frozen_shapes.keys()
    assert plan.num_parameters == sum(map(math.prod, plan.factor_shapes.values()))


@given(extended_plans())
def test_the_blocks_of_a_weight_are_those_that_it_is_made_of(plan):
    for name, shape in plan.shapes.items():
        blocks = plan.blocks_of(name)
        assert len(set(blocks)) == len(blocks)
        ones = {block: numpy.ones(plan.layout.block_shapes[block]) for block in blocks}
        assert plan.delta(ones, name).shape == shape


def expected_split(asked, sizes, core):
    """Return (ranks, factored, trainable core) as the documentation of `Spec` has it."""
    order = len(sizes)
    dense = (sizes, (False,) * order, True)
    if asked == "full" or order == 1:
        return dense
    per_mode = asked if isinstance(asked, tuple) else (asked,) * order
    even = len(set(per_mode)) == 1 and "full" not in per_mode
    if core == "identity" or (core is None and order == 2 and even):
        # A matrix has no rank above its smaller size; a CP tensor may have.
        above = order == 2 and per_mode[0] > min(sizes)
        return dense if above else (per_mode, (True,) * order, False)
    whole = [rank == "full" or rank > size for rank, size in zip(per_mode, sizes, strict=True)]
    ranks = tuple(map(lambda w, r, s: s if w else r, whole, per_mode, sizes))
    return ranks, tuple(not mode for mode in whole), True


@given(plans())
def test_a_rank_is_as_asked_or_the_mode_is_whole(plan):
    for group in plan.layout.groups:
        for split, asked in zip(group.splits, plan.spec.split_ranks, strict=True):
            expected = expected_split(asked, split.sizes, plan.spec.core)
            assert (split.ranks, split.factored, split.core == "full") == expected
            if isinstance(asked, int) and len(split.sizes) > 1:
                assert split.capped == (not all(split.factored))


@pytest.mark.parametrize(
    ("spec", "shapes", "message"),
    [
        (sl.Spec(), {}, "shapes must name at least one weight: got none"),
        (sl.Spec(), {"q": (0, 4)}, r"shapes\['q'\]\[0\] must be at least 1: got 0"),
        (sl.Spec(), {"q": (6,)}, r"shapes\['q'\] must be .*: got \(6,\)"),
        (
            sl.Spec(groups=25, fold="balanced"),
            ONE,
            "groups must be at most 24, the number of entries: got 25",
        ),
        (
            sl.Spec(groups=10, fold="balanced", cut="pad"),
            {"q": (6, 2)},
            "groups must leave every padded group at least one of 12 .*got 10 groups of 2",
        ),
        (sl.Spec(groups="layer", fold="balanced"), ONE, "needs a layer number .*: got 'q'"),
        (
            sl.Spec(fold=(4, 5)),
            ONE,
            r"fold must cover the group: expected at least 24 entries, got \(4, 5\) with 20",
        ),
        (sl.Spec(fold=(7, 4)), ONE, r"fold\[0\] must be at most 6, .* the 24 entries: got 7"),
        (sl.Spec(fold=(24, 2)), ONE, r"fold\[0\] must be at most 12.*: got 24"),
        (
            sl.Spec(fold=(4, 4), groups=1, map=Mixing(), ratio=0.25),
            TWO,
            r"fold\[0\] must be at most 3, .* the 12 entries: got 4",
        ),
        (
            sl.Spec(groups=1),
            TWO,
            "fold='natural' must have one whole weight a group: got groups=1; use fold=",
        ),
        (sl.Spec(groups=3), TWO, "fold='natural' must have one whole weight a group: got groups=3"),
        (sl.Spec(map=Mixing()), ONE, "fold must be 'balanced' or a tuple with map=Mixing"),
        (
            sl.Spec(groups=1, fold="stack"),
            MIXED,
            r"fold='stack' must have weights of one input width .*: got widths \[4, 8\]",
        ),
        (
            sl.Spec(groups=5, fold="stack"),
            TWO,
            r"fold='stack' must have .* cut between rows: got widths \[4\] cut within a row",
        ),
        (sl.Spec(fold="stack", order=4), ONE, "must have order 2 or 3: got order 4"),
        (
            sl.Spec(fold="stack", order=3, groups=1),
            MIXED,
            r"order 3 must have .* of one shape .*: got \[\(2, 4\), \(5, 8\), \(6, 4\)\]",
        ),
        (
            sl.Spec(fold="stack", order=3, groups=3),
            TWO,
            r"order 3 must have whole weights .*: got \[\(6, 4\)\] cut by a group boundary",
        ),
        (
            sl.Spec(fold="aligned", groups=1),
            {"q": (6, 4), "v": (6, 3)},
            "fold='aligned' must find a divisor above 1 .*: got 1; use fold='balanced'",
        ),
        (
            sl.Spec(fold="aligned", groups=5),
            TWO,
            "fold='aligned' must find a divisor above 1 .* group boundaries: got 1",
        ),
        (
            sl.krona(),
            {"q": (7, 5)},
            "splits must leave every split more than one entry: got split 0 of size 1 in every "
            "mode for a fold of 35 entries",
        ),
        (sl.Spec(splits=3, rank="full"), {"q": (2, 2)}, "got split 0 of size 1 in every mode"),
        (
            sl.Spec(rank=(2, 5), core="full"),
            ONE,
            r"rank.* must be at most 4, the size of mode 1 of split 0: got 5",
        ),
        (sl.Spec(rank=(5, 5)), ONE, r"rank.* must be at most 4, the size of mode 1 of split 0"),
        (sl.Spec(rank=(2,), order=1), ONE, r"rank\[0\]\[0\] must be 1 or 'full' .*: got 2"),
        (
            sl.Spec(rank=(2, 3), core="identity"),
            ONE,
            r"core='identity' must have one rank for all modes of split 0: got \(2, 3\)",
        ),
        (
            sl.Spec(rank=(2, "full"), core="identity"),
            ONE,
            r"core='identity' must have one rank for all modes of split 0: got \(2, 'full'\)",
        ),
    ],
)
def test_a_spec_that_cannot_serve_the_weights_is_refused(spec, shapes, message):
    with pytest.raises(ValueError, match=message):
        sl.Plan(spec, shapes)


def test_a_rank_too_large_is_called_by_its_whole_index():
    spec = sl.Spec(rank=((2, 2), (2, 9)), splits=2, core="full")
    with pytest.raises(ValueError, match=r"rank\[1\]\[1\] must be at most 2, .*: got 9"):
        sl.Plan(spec, {"q": (6, 4)})


def test_slices_beyond_the_entries_are_refused_in_any_mode():
    # Rows 2 … 5 of the last factor would hold nothing and never learn.
    with pytest.raises(ValueError, match=r"fold\[1\] must be at most 24"):
        sl.Plan(sl.Spec(fold=(1, 30)), ONE)


def test_pad_stacks_whole_weights_where_the_groups_divide_the_total():
    for groups in (1, 2):
        even, pad = (
            sl.Plan(sl.lotr(rank=2, groups=groups, cut=cut), TWO) for cut in ("even", "pad")
        )
        assert even.factor_shapes == pad.factor_shapes


def test_a_capped_core_is_no_contradiction():
    assert group_of(sl.Spec(rank=((5, 2), 9), splits=2), {"q": (30, 8)}).splits[1].capped


@pytest.mark.parametrize("spec", ["lora", None, sl.Spec])
def test_a_plan_must_have_a_spec(spec):
    with pytest.raises(TypeError, match=r"spec must be a superlora\.Spec or a mapping .*: got "):
        sl.Plan(spec, ONE)


def test_an_unknown_weight_is_refused():
    plan = sl.Plan(sl.lora(rank=1), {f"{i}.q": (2, 2) for i in range(7)})
    with pytest.raises(KeyError, match=r"no weight is named 'k'; .* '0\.q', .* and 2 more"):
        plan.blocks_of("k")


def test_splits_of_size_one_in_a_mode_are_warned_of_once_where_the_plan_is_made():
    with pytest.warns(UserWarning, match="no Kronecker structure") as caught:
        sl.Plan(sl.krona(), {"q": (7, 4), "v": (7, 4)})
    assert [str(item.message) for item in caught] == [
        "no Kronecker structure where a split has size 1: split 0 in mode 0; "
        "use fewer splits or fold='balanced'"
    ]
    assert caught[0].filename == __file__


def test_modes_of_size_one_are_nobodys_fault():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sl.Plan(sl.krona(), {"q": (1, 4)})
        sl.Plan(sl.lora(rank=1), {"q": (1, 1)})


def test_a_layout_is_a_plan_without_arrays():
    layout = Layout(sl.lora(rank=2), ONE)
    assert layout.num_parameters == sl.Plan(sl.lora(rank=2), ONE).num_parameters == 20


@pytest.mark.parametrize(
    ("spec", "shapes", "name", "aligned"),
    [
        (sl.lora(rank=2), ONE, "q", True),
        (sl.lonkr(rank=1, splits=2), ONE, "q", True),
        (sl.lotr(rank=2), TWO, "blocks.1.q", True),
        (sl.Spec(order=3, rank=2), ONE, "q", True),
        (sl.Spec(order=4, rank=2), {"q": (6, 8)}, "q", True),
        (sl.dense(), ONE, "q", False),
        (sl.Spec(groups=1, fold="aligned", order=3), MIXED, "blocks.1.q", True),
        (sl.Spec(groups=2, fold="balanced"), MIXED, "blocks.1.q", False),
        (sl.Spec(groups=1, fold=(6, 8)), TWO, "blocks.0.q", False),
        (sl.Spec(fold="balanced", map=Mixing()), ONE, "q", False),
    ],
)
def test_an_aligned_fold_has_rows_of_its_own(spec, shapes, name, aligned):
    assert (row_slice(make_plan(spec, shapes).layout, name) is not None) == aligned


@given(plans(kinds=("aligned",)))
def test_the_last_mode_of_an_aligned_fold_divides_every_input_width(plan):
    for name, (_, columns) in plan.shapes.items():
        pieces = plan.layout.grouping.pieces[name]
        assert all(columns % plan.layout.groups[piece.group].fold[-1] == 0 for piece in pieces)
        assert (row_slice(plan.layout, name) is not None) == (len(pieces) == 1)
