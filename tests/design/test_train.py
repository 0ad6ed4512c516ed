"""Tensor-train cores: their shapes, ranks, names and start; and what is refused."""

from __future__ import annotations

import itertools
import json
import math

import numpy
import pytest

import superlora as sl
from superlora.algebra.init import zero_block

TWO = {"0.q": (6, 4), "1.q": (6, 4)}
STACK = {"order": 3, "groups": 1, "fold": "stack", "core": "train"}


def train(**fields):
    return sl.Spec(**{"core": "train", **fields})


@pytest.mark.parametrize(
    ("fields", "shape", "blocks"),
    [
        ({"rank": 3}, (6, 4), [(1, 6, 3), (3, 4, 1)]),
        ({"rank": 5}, (6, 4), [(1, 6, 4), (4, 4, 1)]),
        ({"rank": (3,)}, (6, 4), [(1, 6, 3), (3, 4, 1)]),
        ({"rank": ((3,),)}, (6, 4), [(1, 6, 3), (3, 4, 1)]),
        ({"rank": ((1, 2),), "order": 3}, (6, 4), [(1, 2, 1), (1, 3, 2), (2, 4, 1)]),
        ({"rank": (2, 4, 2), "order": 4}, (6, 4), [(1, 2, 2), (2, 3, 4), (4, 2, 2), (2, 2, 1)]),
        ({"rank": 3, "order": 4}, (6, 4), [(1, 2, 2), (2, 3, 3), (3, 2, 2), (2, 2, 1)]),
        (
            {"rank": ("full", 1, "full"), "order": 4},
            (6, 4),
            [(1, 2, 2), (2, 3, 1), (1, 2, 2), (2, 2, 1)],
        ),
        ({"rank": 3, "order": 3, "fold": (7, 1, 2)}, (7, 2), [(1, 7, 2), (2, 1, 2), (2, 2, 1)]),
    ],
)
def test_the_blocks_of_a_train(fields, shape, blocks):
    plan = sl.Plan(train(**fields), {"q": shape})
    assert plan.factor_shapes == {f"0.0.core{mode}": item for mode, item in enumerate(blocks)}
    assert plan.num_parameters == sum(map(math.prod, blocks))


@pytest.mark.parametrize("sizes", [*itertools.product([1, 2, 5], repeat=4)], ids=str)
def test_an_integer_is_lowered_to_the_largest_rank_of_such_a_train(sizes):
    """Which is the rank of the matrix of the modes on either side, of a generic tensor."""
    plan = sl.Plan(
        train(rank=99, order=4, fold=sizes), {"q": (sizes[0] * sizes[1], sizes[2] * sizes[3])}
    )
    (split,) = plan.layout.groups[0].splits
    tensor = numpy.random.default_rng(0).standard_normal(sizes)
    largest = [
        numpy.linalg.matrix_rank(tensor.reshape(math.prod(sizes[:mode]), -1)) for mode in (1, 2, 3)
    ]
    assert list(split.ranks) == largest
    assert split.capped


def test_a_train_has_no_factors_and_its_last_mode_no_rank():
    (split,) = sl.Plan(train(rank=2, order=3), {"q": (6, 4)}).layout.groups[0].splits
    assert split.factored == (False, False, False)
    assert not split.joined
    assert not split.capped


@pytest.mark.parametrize(
    "fields", [{"rank": "full"}, {"order": 1}, {"order": 1, "rank": ("full",)}]
)
def test_a_train_of_one_mode_or_of_full_rank_is_dense(fields):
    plan = sl.Plan(train(**fields), {"q": (6, 4)})
    assert [shape for shape in plan.factor_shapes.values() if math.prod(shape) == 24]
    assert list(plan.factor_shapes) == ["0.0.core"]


def test_the_splits_have_cores_of_their_own():
    fields = {"rank": ((2, 2), ("full",) * 3, "full"), "splits": 3, "order": (3, 3, 2)}
    spec = train(core=("train", "full", "train"), fold=((4, 2, 3), (2, 3, 2), (1, 2, 2)), **fields)
    plan = sl.Plan(spec, {"q": (8, 144)})
    assert plan.factor_shapes == {
        "0.0.core0": (1, 4, 2),
        "0.0.core1": (2, 2, 2),
        "0.0.core2": (2, 3, 1),
        "0.1.core": (2, 3, 2),
        "0.2.core": (2, 2),
    }


def test_a_train_of_lower_order_than_the_fold_has_its_own_modes():
    spec = train(rank=2, order=(2, 3), splits=2, core=("train", "identity"), combine="hadamard")
    plan = sl.Plan(spec, {"q": (6, 4)})
    train_split, cp = plan.layout.groups[0].splits
    assert train_split.sizes == (6, 4)
    assert train_split.shape == cp.shape == (2, 3, 4)
    assert train_split.joined
    assert plan.factor_shapes["0.0.core1"] == (2, 4, 1)


def test_terms_have_trains_of_their_own():
    plan = sl.Plan(train(rank=2, terms=3), {"q": (6, 4)})
    assert list(plan.factor_shapes) == [
        f"0.{term}.core{mode}" for term in range(3) for mode in (0, 1)
    ]


def test_the_last_core_starts_at_zero_and_alone():
    plan = sl.Plan(sl.Spec(rank=(2, 3), **STACK), TWO)
    factors = plan.init(seed=0, like=numpy.float64)
    assert [name for name, block in factors.items() if not block.any()] == ["0.0.core2"]


@pytest.mark.parametrize(
    ("fields", "zero"),
    [
        ({"frozen": {"0.core2": "random"}}, "0.0.core1"),
        ({"frozen": {"0.core2": "random", "0.core1": "ones"}}, "0.0.core0"),
        ({"tied": ["0.core2"], "groups": "weight"}, "0.0.core1"),
        ({"tied": ["0.core0"], "groups": "weight"}, "0.0.core2"),
        ({"tied": ["0.core0", "0.core1", "0.core2"], "groups": "weight"}, "0.0.core2"),
        ({"splits": 2, "combine": "hadamard"}, "0.1.core2"),
        ({"splits": 2, "combine": "hadamard", "core": ("full", "train")}, "0.1.core2"),
        ({"splits": 2, "combine": "hadamard", "core": ("train", "full")}, "0.1.core"),
        (
            {"splits": 2, "combine": "hadamard"}
            | {"frozen": {f"1.core{mode}": "random" for mode in range(3)}},
            "0.0.core2",
        ),
    ],
)
def test_which_block_starts_at_zero(fields, zero):
    plan = sl.Plan(sl.Spec(rank=1, **{**STACK, **fields}), TWO)
    assert zero_block(plan.layout, 0) == zero
    factors = plan.init(like=numpy.float64)
    assert [name for name, block in factors.items() if not block.any()][:1] == [zero]


@pytest.mark.parametrize(
    "fields",
    [{}, {"frozen": {"0.core1": "random"}}, {"frozen": {"0.core3": "random"}}, {"splits": 2}],
    ids=["trained", "inner frozen", "last frozen", "hadamard"],
)
def test_a_step_of_the_zero_block_moves_the_update_as_loras_does(fields):
    """The mean square of an entry, for a zero block of ones' variance, is r over the width."""
    if fields.get("splits"):
        fields = {"combine": "hadamard", "rank": 2, **fields}
    spec = train(**{"rank": (3, 5, 4), "order": 4, "fold": (8, 8, 8, 8), **fields})
    square, count = 0.0, 100
    for seed in range(count):
        plan = sl.Plan(spec.replace(seed=seed), {"q": (64, 64)})
        zero = zero_block(plan.layout, 0)
        factors = plan.init(seed=seed, like=numpy.float64)
        factors |= plan.frozen(like=numpy.float64)
        factors[zero] = numpy.random.default_rng(seed).standard_normal(factors[zero].shape)
        splits = [
            numpy.einsum(
                "aib,bjc,ckd,dle->ijkl", *(factors[f"0.{k}.core{mode}"] for mode in range(4))
            )
            for k in range(plan.spec.splits)
        ]
        square += float((math.prod(splits) ** 2).mean()) / count
    largest = max(shape[place] for shape in plan.factor_shapes.values() for place in (0, 2))
    assert square == pytest.approx(largest / 64, rel=0.25)


def test_frozen_and_tied_name_cores_of_a_train():
    spec = train(rank=2, order=3, tied=["0.core1"], frozen={"0.core0": "random", "0.core2": "ones"})
    plan = sl.Plan(spec, {"q": (6, 4), "v": (4, 3)})
    assert plan.factor_shapes == {"0.0.core1": (2, 3, 2)}
    assert plan.frozen_shapes == {
        "0.0.core0": (1, 2, 2),
        "0.0.core2": (2, 4, 1),
        "1.0.core0": (1, 2, 2),
        "1.0.core2": (2, 3, 1),
    }
    frozen = plan.frozen(like=numpy.float64)
    assert frozen["0.0.core0"].shape == (1, 2, 2)
    assert (frozen["0.0.core2"] == 1).all()


BLOCKS = "must name a core or a factor of one of . splits, as in '0.core' or '0.factor1': got"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rank": (2, 3, 4)},
            r"rank must have 2 entries, the ranks between 3 neighbouring modes: got \(2, 3, 4\)",
        ),
        ({"rank": ()}, r"rank must have 2 entries, the ranks between 3 neighbouring .*: got \(\)"),
        ({"rank": ((2,),)}, r"rank\[0\] must have 2 entries, the ranks between 3 .*: got \(2,\)"),
        (
            {"rank": ((2, 2, 2), (1, 1, 1)), "splits": 2, "core": ("full", "train")},
            r"rank\[1\] must have 2 entries, the ranks between 3 .*: got \(1, 1, 1\)",
        ),
        (
            {"rank": ((2, 2), (1, 1)), "splits": 2, "core": ("full", "train")},
            r"rank\[0\] must have one entry for each of 3 modes: got \(2, 2\)",
        ),
        ({"rank": (2, 0)}, r"rank\[0\]\[1\] must be at least 1: got 0"),
        ({"rank": (2, "half")}, r"rank\[0\]\[1\] must be one of 'full' or an integer: got 'half'"),
        ({"frozen": {"0.core3": "ones"}}, f"frozen {BLOCKS} '0.core3'"),
        ({"tied": ["1.core0"]}, f"tied {BLOCKS} '1.core0'"),
        ({"tied": ["0.core01"]}, f"tied {BLOCKS} '0.core01'"),
        ({"tied": ["0.core0"], "core": "full"}, f"tied {BLOCKS} '0.core0'"),
        ({"tied": ["0.core0"], "core": None}, f"tied {BLOCKS} '0.core0'"),
        (
            {"frozen": {"0.core0": "singular"}, "groups": "weight", "fold": "stack"},
            "to hold its singular vectors",
        ),
        (
            {"map": sl.maps.Separable()},
            "core must not be 'train' with map=Separable.*, which maps single factors: got 'train'",
        ),
        (
            {"map": sl.maps.Separable(), "core": ("full", "train"), "splits": 2},
            r"core must not be 'train' .*: got \('full', 'train'\)",
        ),
    ],
)
def test_a_train_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        sl.Spec(**{"order": 3, "core": "train", **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rank": (3, 3)},
            r"rank\[0\] must be at most 2, the largest rank between modes 0 and 1 of .* 0: got 3",
        ),
        ({"rank": ((2, 5),)}, r"rank\[0\]\[1\] must be at most 4, .* modes 1 and 2 .*: got 5"),
        ({"tied": ["0.core"]}, "tied must name blocks that every group has: .* no '0.core'"),
        ({"tied": ["0.factor0"]}, "tied must name blocks that every group has: .*core2"),
        (
            {"frozen": {f"0.core{mode}": "ones" for mode in range(3)}},
            "frozen must leave every product a trainable block",
        ),
        (
            {"order": 1, "fold": "balanced", "rank": (2,)},
            r"rank\[0\]\[0\] must be 1 or 'full' with order=1",
        ),
        (
            {"tied": ["0.core0"], "rank": "full"},
            "tied must name blocks that every group has: .* no '0.core0'",
        ),
    ],
)
def test_a_train_that_cannot_serve_the_weights_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        sl.Plan(train(**{"order": 3, "fold": (2, 6, 4), "groups": 1, **fields}), TWO)


def test_a_train_survives_json_and_says_its_ranks():
    spec = sl.Spec(rank=(2, 3), frozen={"0.core1": "random"}, **STACK)
    again = sl.Spec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert spec.to_dict()["core"] == "train"
    described = sl.Plan(spec, TWO).describe()
    assert "2 x 6 x 4, train of rank 2, 3" in described
    assert "note: 36 entries of 1 blocks frozen: random" in described


def test_a_lowered_rank_is_noted():
    described = sl.Plan(sl.Spec(rank=9, **STACK), TWO).describe()
    assert "note: rank 9 is too large for a mode in 1 of 1 groups; it is lowered there" in described


def test_one_integer_makes_the_scale():
    assert sl.Spec(rank=4, alpha=8, **STACK).scaling == 2
    assert sl.Spec(rank=(4, "full"), alpha=8, **STACK).scaling == 2


def test_a_map_may_follow_a_train():
    fixed = sl.maps.Fastfood()
    plan = sl.Plan(train(rank=2, order=3, fold="balanced", map=fixed, ratio=0.5), {"q": (16, 8)})
    assert math.prod(plan.layout.groups[0].fold) >= 64
    assert list(plan.factor_shapes) == ["0.0.core0", "0.0.core1", "0.0.core2"]
