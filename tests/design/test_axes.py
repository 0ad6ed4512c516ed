"""Weights of any number of axes: what a shape means, and where their entries lie."""

from __future__ import annotations

import numpy
import pytest

import superlora as sl
from tests.strategies import make_plan

CONV = sl.Axes(out=64, in_=3, window=(7, 7))
EXPERTS = sl.Axes(stack=8, out=6, in_=4)


@pytest.mark.parametrize(
    ("axes", "shape", "matrix"),
    [
        (sl.Axes(6, 4), (6, 4), (6, 4)),
        (sl.Axes(out=64, in_=3, window=7), (64, 3, 7), (64, 21)),
        (CONV, (64, 3, 7, 7), (64, 147)),
        (EXPERTS, (8, 6, 4), (48, 4)),
        (sl.Axes(stack=[2, 3], out=6, in_=4, window=[5]), (2, 3, 6, 4, 5), (36, 20)),
        (sl.Axes(numpy.int64(6), numpy.int64(4), numpy.int32(5)), (6, 4, 5), (6, 20)),
    ],
)
def test_axes_have_an_order_and_are_a_matrix_inside(axes, shape, matrix):
    assert axes.shape == shape
    assert axes.matrix == matrix
    assert axes.entries == numpy.prod(shape)
    assert axes.plain == (len(shape) == 2)
    assert {type(size) for size in shape} == {int}


def test_shapes_of_two_and_of_four_axes_say_what_they_are():
    assert sl.Axes.of((6, 4)) == sl.Axes.of([6, 4]) == sl.Axes(out=6, in_=4)
    assert sl.Axes.of((64, 3, 7, 7)) == CONV
    assert sl.Axes.of(EXPERTS) is EXPERTS


@pytest.mark.parametrize(
    ("shape", "error", "message"),
    [
        ((6,), ValueError, r"shape must be \(output width, .*: got \(6,\)$"),
        (
            (8, 6, 4),
            ValueError,
            r"got \(8, 6, 4\); write superlora.Axes\(stack=8, out=6, in_=4\) or "
            r"superlora.Axes\(out=8, in_=6, window=4\)",
        ),
        ((2, 8, 6, 4, 4), ValueError, "say which axes they are, as superlora.Axes"),
        ("abcd", ValueError, "got 'abcd'"),
        ((6, 4, 0, 1), ValueError, r"shape\[2\] must be at least 1: got 0"),
    ],
)
def test_a_shape_that_is_not_clear_is_refused_with_what_to_write(shape, error, message):
    with pytest.raises(error, match=message):
        sl.Axes.of(shape)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"window": 0}, ValueError, "window must be at least 1: got 0"),
        ({"stack": (2, -1)}, ValueError, "stack must be at least 1: got -1"),
        ({"stack": 2.5}, TypeError, "stack must be an integer: got 2.5"),
        ({"window": "77"}, TypeError, "window must be an integer"),
        ({"out": True}, TypeError, "out must be an integer: got True"),
    ],
)
def test_sizes_that_are_none_are_refused(fields, error, message):
    with pytest.raises(error, match=message):
        sl.Axes(**{"out": 6, "in_": 4, **fields})


def test_a_plan_shows_shapes_as_given_and_keeps_matrices_inside():
    plan = sl.Plan(sl.lora(2), {"q": (6, 4), "conv": (64, 3, 7, 7), "experts": EXPERTS})
    assert plan.shapes == {"q": (6, 4), "conv": (64, 3, 7, 7), "experts": (8, 6, 4)}
    assert plan.layout.shapes == {"q": (6, 4), "conv": (64, 147), "experts": (48, 4)}
    assert plan.layout.axes == {"q": sl.Axes(6, 4), "conv": CONV, "experts": EXPERTS}
    assert plan.num_dense == 6 * 4 + 64 * 147 + 8 * 6 * 4


@pytest.mark.parametrize(
    ("spec", "axes", "folds"),
    [
        (sl.lora(2), CONV, [(64, 147)]),
        (sl.Spec(order=4, rank=2), CONV, [(8, 8, 7, 21)]),
        (sl.lora(2), EXPERTS, [(6, 4)] * 8),
        (sl.lora(2), sl.Axes(stack=(2, 3), out=6, in_=4, window=5), [(6, 20)] * 6),
        (sl.dense(), EXPERTS, [(24,)] * 8),
        (sl.Spec(fold="stack", order=3), EXPERTS, [(8, 6, 4)]),
        (sl.Spec(fold="stack", order=3), sl.Axes(6, 4, 5, (2, 3)), [(6, 6, 20)]),
        (sl.Spec(fold="stack"), EXPERTS, [(48, 4)]),
        (sl.Spec(fold="balanced"), EXPERTS, [(12, 16)]),
        (sl.Spec(fold="aligned"), EXPERTS, [(48, 4)]),
        (sl.Spec(fold=(16, 12)), EXPERTS, [(16, 12)]),
        (sl.Spec(groups=4, fold="stack", order=3), EXPERTS, [(2, 6, 4)] * 4),
    ],
)
def test_folds_of_weights_with_a_window_or_a_stack(spec, axes, folds):
    layout = make_plan(spec, {"w": axes}).layout
    assert [group.fold for group in layout.groups] == folds
    assert len(layout.grouping.pieces["w"]) == len(folds)


def test_a_group_stacks_the_entries_of_all_its_weights():
    spec = sl.Spec(rank=2, order=3, groups="layer", fold="stack")
    shapes = {"0.w1": EXPERTS, "0.w3": EXPERTS, "0.q": (6, 4), "1.w1": EXPERTS}
    assert [group.fold for group in sl.Plan(spec, shapes).layout.groups] == [(17, 6, 4), (8, 6, 4)]


def test_the_groups_of_a_stack_lie_in_the_order_of_its_weights():
    shapes = {"a": (6, 4), "e": sl.Axes(stack=2, out=6, in_=4), "b": (3, 4)}
    plan = sl.Plan(sl.lora(1), shapes)
    assert [plan.blocks_of(name)[0] for name in shapes] == [
        "0.0.factor0",
        "1.0.factor0",
        "3.0.factor0",
    ]
    assert plan.blocks_of("e") == tuple(f"{g}.0.factor{m}" for g in (1, 2) for m in (0, 1))


@pytest.mark.parametrize(
    ("spec", "axes", "message"),
    [
        (
            sl.Spec(groups=1),
            EXPERTS,
            "fold='natural' must have one whole weight a group: .*; in the group of 'w'",
        ),
        (
            sl.Spec(groups=3, fold="stack", order=3),
            EXPERTS,
            "must have whole weights of one shape in each group: .* cut by a group boundary",
        ),
        (sl.lora_xs(2).replace(order=3, fold="stack", frozen={"0.factor2": "singular"}), EXPERTS,
         "must have one matrix a group .*: 'w' has 8; use fold='natural'"),
        ({"left_weight": sl.lora(1)}, EXPERTS,
         "'left_weight' must have weights of no stack: got .* for 'w'"),
        ({"add_bias": sl.dense()}, EXPERTS,
         "'add_bias' must have weights of no stack: got .* for 'w'"),
        ({"right_weight": sl.lora(1)}, CONV,
         r"'right_weight' must have weights of two axes: got \(64, 3, 7, 7\) for 'w'"),
        (sl.prompt_add(), CONV, "'weight_to_bias' must have weights of two axes"),
    ],
)  # fmt: skip
def test_what_a_weight_with_more_axes_cannot_have_is_refused(spec, axes, message):
    with pytest.raises(ValueError, match=message):
        sl.Plan(spec, {"w": axes})


def test_the_table_says_which_matrices_they_are():
    shapes = {"q": (6, 4), "a": CONV, "b": CONV, "experts": EXPERTS}
    lines = sl.Plan(sl.lora(2), shapes).describe().splitlines()
    assert lines[1].split()[:5] == ["9", "24", "6", "x", "4"]
    assert lines[2].split()[:5] == ["2", "9,408", "64", "x", "147"]
    assert lines[3].startswith("4 weights, 1,024 trainable parameters for 19,032 entries")
    assert lines[4:] == [
        "note: 2 of shape (64, 3, 7, 7), each as a matrix of 64 x 147",
        "note: 1 of shape (8, 6, 4), as 8 matrices of 6 x 4",
    ]
