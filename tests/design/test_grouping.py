"""Groups: every entry of every weight in one place."""

from __future__ import annotations

import math

import numpy
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import superlora as sl
from superlora.design.grouping import Piece, check_shapes, group_weights, layers_of
from tests.oracles import entries, groups_of
from tests.strategies import bounds_of, weight_shapes

groupings = st.one_of(st.sampled_from(["weight", "layer"]), st.integers(1, 30))
cuts = st.sampled_from(["even", "pad"])


def held_entries(grouping, shapes):
    """List for each group what its positions hold."""
    held = [[None] * size for size in grouping.sizes]
    for name, (rows, columns) in shapes.items():
        own = [(name, row, column) for row in range(rows) for column in range(columns)]
        for piece in grouping.pieces[name]:
            for position in range(piece.start, piece.stop):
                assert held[piece.group][position] is None
                held[piece.group][position] = own.pop(0)
        assert own == []
    return held


@given(weight_shapes(), groupings, cuts)
def test_every_entry_lies_in_one_place_in_order(shapes, groups, cut):
    total = len(entries(shapes))
    if isinstance(groups, int):
        assume(groups <= total)
        assume(bounds_of(total, groups, cut)[-2] < total)
    grouping = group_weights(shapes, groups, cut)
    assert held_entries(grouping, shapes) == groups_of(shapes, groups, cut)


@given(weight_shapes(), groupings, cuts)
def test_members_and_whole_agree_with_the_pieces(shapes, groups, cut):
    total = len(entries(shapes))
    if isinstance(groups, int):
        assume(groups <= total)
        assume(bounds_of(total, groups, cut)[-2] < total)
    grouping = group_weights(shapes, groups, cut)
    for group, members in enumerate(grouping.members):
        expected = [
            n for n, pieces in grouping.pieces.items() if group in [p.group for p in pieces]
        ]
        assert list(members) == expected
        whole = all(
            sum(p.stop - p.start for p in grouping.pieces[name] if p.group == group)
            == math.prod(shapes[name])
            for name in members
        )
        axes = {name: sl.Axes.of(shape) for name, shape in shapes.items()}
        assert grouping.matrices(group, axes) == (tuple(shapes[n] for n in members), whole)
    padded = isinstance(groups, int) and cut == "pad" and total % groups > 0
    padding = (math.ceil(total / groups),) * groups if padded else grouping.sizes
    assert grouping.room == padding


@given(st.integers(1, 10**15), st.integers(1, 300))
def test_even_sizes_differ_by_one_at_most_the_larger_first(total, groups):
    assume(groups <= total)
    sizes = group_weights({"q": (1, total)}, groups).sizes
    assert sum(sizes) == total
    assert max(sizes) - min(sizes) <= 1
    assert list(sizes) == sorted(sizes, reverse=True)


def test_even_sizes_are_those_of_array_split():
    for total in range(1, 40):
        for groups in range(1, total + 1):
            expected = tuple(map(len, numpy.array_split(numpy.arange(total), groups)))
            assert group_weights({"q": (1, total)}, groups).sizes == expected


def test_pad_gives_every_group_one_size_and_drops_the_tail():
    grouping = group_weights({"q": (2, 5), "v": (1, 7)}, 3, "pad")
    assert grouping.room == (6, 6, 6)
    assert grouping.sizes == (6, 6, 5)
    assert grouping.pieces["q"] == (Piece(0, 0, 6), Piece(1, 0, 4))
    assert grouping.pieces["v"] == (Piece(1, 4, 6), Piece(2, 0, 5))


def test_pad_and_even_coincide_where_the_groups_divide_the_total():
    shapes = {"q": (4, 5), "v": (2, 5)}
    even, pad = (group_weights(shapes, 3, cut) for cut in ("even", "pad"))
    assert even.sizes == pad.sizes == (10, 10, 10)
    assert even.pieces == pad.pieces


def test_the_order_of_the_weights_is_the_order_of_concatenation():
    first, second = {"q": (2, 2), "v": (3, 2)}, {"v": (3, 2), "q": (2, 2)}
    assert group_weights(first, 1).pieces == {"q": (Piece(0, 0, 4),), "v": (Piece(0, 4, 10),)}
    assert group_weights(second, 1).pieces == {"v": (Piece(0, 0, 6),), "q": (Piece(0, 6, 10),)}


def test_layers_stand_in_the_order_of_their_first_weight_also_when_interleaved():
    shapes = {"b.1.q": (1, 2), "b.0.q": (1, 3), "b.1.v": (1, 4), "b.0.v": (1, 5)}
    grouping = group_weights(shapes, "layer")
    assert grouping.members == (("b.1.q", "b.1.v"), ("b.0.q", "b.0.v"))
    assert grouping.sizes == (6, 8)
    assert list(grouping.pieces) == list(shapes)
    assert grouping.pieces["b.0.v"] == (Piece(1, 3, 8),)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("encoder.layer.3.attention.query", "encoder.layer.3"),
        ("blocks.12.mlp.0.weight", "blocks.12"),
        ("0.q", "0"),
        ("model.h10.5", "model.h10.5"),
        ("stage2.blocks.7.qkv", "stage2.blocks.7"),
    ],
)
def test_the_layer_is_the_path_up_to_the_first_whole_number(name, layer):
    assert layers_of([name]) == {name: layer}


SWIN = [
    *(f"layers.{s}.blocks.{b}.{m}" for s, n in enumerate((2, 2, 1)) for b in range(n)
      for m in ("attn.qkv", "mlp.fc1")),
    "layers.0.downsample.reduction",
]  # fmt: skip
VIT = [f"blocks.{b}.{m}" for b in range(3) for m in ("attn.qkv", "mlp.0", "mlp.2")]
EXPERTS = [f"layers.{b}.mlp.experts.{e}.w{w}" for b in (0, 1) for e in (0, 1) for w in (1, 2)]
MIXTRAL = [*EXPERTS, *(f"layers.{b}.self_attn.q_proj" for b in (0, 1))]
T5 = [
    *(f"encoder.block.{b}.layer.0.SelfAttention.q" for b in (0, 1)),
    *(f"encoder.block.{b}.layer.1.DenseReluDense.wi" for b in (0, 1)),
]
UNET = [
    f"down.{d}.attentions.{a}.transformer_blocks.0.{m}"
    for d in (0, 1) for a in (0, 1) for m in ("attn1.to_q", "attn1.to_out.0", "ff.net.0.proj")
]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "layers"),
    [
        (SWIN, {f"layers.{b}" for b in ("0", "0.blocks.0", "0.blocks.1")}
         | {f"layers.{b}" for b in ("1.blocks.0", "1.blocks.1", "2.blocks.0")}),
        (VIT, {"blocks.0", "blocks.1", "blocks.2"}),
        (VIT[:2], {"blocks.0"}),
        (EXPERTS, {"layers.0", "layers.1"}),
        (MIXTRAL, {"layers.0", "layers.1"}),
        (T5, {"encoder.block.0", "encoder.block.1"}),
        (UNET, {f"down.{d}.attentions.{a}" for d in (0, 1) for a in (0, 1)}),
        (["features.1.0.mlp.0", "features.1.1.mlp.0"], {"features.1.0", "features.1.1"}),
        (["blocks.0.1.attn.qkv", "blocks.0.2.attn.qkv"], {"blocks.0.1", "blocks.0.2"}),
        (["enc.0.q", "enc.1.q", "dec.0.q"], {"enc.0", "enc.1", "dec.0"}),
    ],
)  # fmt: skip
def test_the_layer_is_an_item_of_the_innermost_list_of_items_built_alike(names, layers):
    found = layers_of(names)
    assert list(found) == names
    assert set(found.values()) == layers
    assert all(name.startswith(f"{layer}.") for name, layer in found.items())


@pytest.mark.parametrize("name", ["head", "h10.q", "blocks.3a.q", "conv1"])
def test_a_name_without_a_layer_number_is_refused(name):
    message = f"groups='layer' needs a layer number in every weight's name.*: got '{name}'"
    with pytest.raises(ValueError, match=message):
        group_weights({name: (2, 2)}, "layer")


@pytest.mark.parametrize(
    ("shapes", "error", "message"),
    [
        ({}, ValueError, "shapes must name at least one weight: got none"),
        ({3: (2, 2)}, TypeError, "shapes must have strings as names: got 3"),
        ({"q": (2,)}, ValueError, r"shapes\['q'\] must be \(output .*\): got \(2,\)"),
        ({"q": (2, 2, 2)}, ValueError, r"shapes\['q'\] must be .*: got \(2, 2, 2\)"),
        ({"q": 4}, ValueError, r"shapes\['q'\] must be .*: got 4"),
        ({"v": (1, 1), "q": (0, 2)}, ValueError, r"shapes\['q'\]\[0\] must be at least 1: got 0"),
        ({"q": (2, -1)}, ValueError, r"shapes\['q'\]\[1\] must be at least 1: got -1"),
        ({"q": (2, 3.0)}, TypeError, r"shapes\['q'\]\[1\] must be an integer: got 3\.0"),
        ({"q": (True, 3)}, TypeError, r"shapes\['q'\]\[0\] must be an integer: got True"),
    ],
)
def test_shapes_that_are_none_are_refused(shapes, error, message):
    with pytest.raises(error, match=message):
        check_shapes(shapes)


def test_shapes_may_be_lists():
    assert check_shapes({"q": [2, 3]}) == {"q": sl.Axes(2, 3)}


@pytest.mark.parametrize(
    ("groups", "cut", "message"),
    [
        (11, "even", "groups must be at most 10, the number of entries: got 11"),
        (7, "pad", "groups must leave every padded group .* of 10 entries: got 7 groups of 2"),
        (0, "even", "groups must be at least 1: got 0"),
    ],
)
def test_group_counts_that_leave_a_group_empty_are_refused(groups, cut, message):
    with pytest.raises(ValueError, match=message):
        group_weights({"q": (2, 5)}, groups, cut)
