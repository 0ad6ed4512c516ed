"""Initial factors: no update, yet everything can learn; the same on every library."""

from __future__ import annotations

import math

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import superlora as sl
from superlora.algebra.init import zero_block
from tests.strategies import draw_factors, extended_plans, make_plan, plans

SHAPES = {"0.q": (6, 4), "1.q": (6, 4)}
LARGE = {f"{layer}.q": (900, 400) for layer in range(40)}


def zero_blocks(factors):
    return [name for name, block in factors.items() if not numpy.any(block)]


@given(plans(), st.integers(0, 2**64 - 1), st.sampled_from(["float32", "float64"]))
def test_one_block_a_group_is_zero_and_so_is_every_update(plan, seed, dtype):
    factors = plan.init(seed, like=numpy.dtype(dtype))
    assert {name: block.shape for name, block in factors.items()} == plan.factor_shapes
    assert all(block.dtype == dtype for block in factors.values())
    zeros = zero_blocks(factors)
    assert zeros == [zero_block(plan.layout, group) for group in range(len(plan.layout.groups))]
    for delta in plan.deltas(factors).values():
        assert_array_equal(delta, numpy.zeros(delta.shape))
    for name, block in factors.items():
        if name not in zeros:
            assert numpy.all(block != 0)
            assert numpy.isfinite(block).all()


@given(extended_plans(), st.integers(0, 9))
def test_one_block_of_every_product_is_zero_and_can_learn(plan, seed):
    factors = plan.init(seed, like=numpy.float64)
    assert factors.keys() == plan.factor_shapes.keys()
    drawn = draw_factors(plan, seed)
    blocks = {**drawn, **factors}
    zeros = set(zero_blocks(factors))
    expected = set()
    for group in range(len(plan.layout.groups)):
        for term, names in enumerate(plan.layout.term_blocks(group)):
            assert len(zeros & set(names)) == 1
            expected.add(zero_block(plan.layout, group, term))
    assert zeros == expected
    for delta in plan.deltas(blocks).values():
        assert_array_equal(delta, numpy.zeros(delta.shape))
    scaled = {name for name in plan.shapes if plan.layout.scaling(name)}
    for zero in zeros:
        # The update is linear in the block: no update from random entries is no gradient.
        moved = plan.deltas({**blocks, zero: drawn[zero]})
        mine = {name for name in scaled if zero in plan.blocks_of(name)}
        assert any(moved[name].any() for name in mine)


def test_blocks_that_groups_share_leave_each_group_one_zero_block():
    # The second group has no factor of mode 0, so that all its blocks are shared ones.
    spec = sl.Spec(rank=3, core="full", tied=["0.core", "0.factor1"])
    factors = sl.Plan(spec, {"a": (6, 6), "b": (2, 6)}).init()
    assert factors.keys() == {"0.0.core", "0.0.factor0", "0.0.factor1"}
    assert len(zero_blocks(factors)) == 1


@given(plans(mapped=True))
def test_every_update_is_zero_through_a_map(plan):
    for delta in plan.deltas(plan.init(3)).values():
        assert_array_equal(delta, numpy.zeros(delta.shape))


@pytest.mark.parametrize(
    ("spec", "zero"),
    [
        (sl.lora(rank=2), "factor0"),  # LoRA's B
        (sl.lokr(rank=1), "factor0"),
        (sl.krona(), "core"),
        (sl.lotr(rank=2), "core"),
        (sl.dense(), "core"),
    ],
)
def test_which_block_is_zero(spec, zero):
    plan = sl.Plan(spec, SHAPES)
    last = len(plan.layout.groups[0].splits) - 1
    assert zero_blocks(plan.init())[0] == f"0.{last}.{zero}"


def test_one_seed_gives_the_same_values_on_every_library(xp):
    plan = sl.Plan(sl.lokr(rank=2, groups="weight"), SHAPES)
    expected = plan.init(7, like=numpy.float64)
    factors = plan.init(7, like=xp.like)
    assert list(factors) == list(expected) == list(plan.factor_shapes)
    for name, block in factors.items():
        assert xp.owns(block)
        assert block.dtype == xp.like.dtype
        assert_array_equal(xp.to_numpy(block), expected[name])


def test_single_precision_is_double_precision_rounded(xp):
    plan = sl.Plan(sl.lora(rank=2), SHAPES)
    single = plan.init(7, like=xp.array(numpy.zeros(1, dtype="float32")))
    for name, block in plan.init(7, like=numpy.float64).items():
        assert_array_equal(xp.to_numpy(single[name]), block.astype("float32"))


@given(st.integers(0, 2**64 - 2))
def test_seeds_differ_and_repeat(seed):
    plan = sl.Plan(sl.lora(rank=2), SHAPES)
    first, again, other = plan.init(seed), plan.init(seed), plan.init(seed + 1)
    for name in first:
        assert_array_equal(first[name], again[name])
        if name not in zero_blocks(first):
            assert numpy.abs(first[name] - other[name]).max() > 1e-3


def test_blocks_of_one_shape_differ():
    factors = sl.Plan(sl.lora(rank=2), SHAPES).init()
    assert numpy.abs(factors["0.0.factor1"] - factors["1.0.factor1"]).max() > 1e-3


# The rank r that LoRA would have, and the number t of products summed in an entry.
STARTS = {
    "lora": (sl.lora(rank=8), 8, 8),
    "lokr": (sl.lokr(rank=8, dense_from="rank"), 8, 8),
    "krona": (sl.krona(), 1, 1),
    "lonkr": (sl.lonkr(rank=4, splits=2), 4, 4 * 4),
    "lotr": (sl.lotr(rank=16), 16, 16 * 16),
    "fact_tk": (sl.fact_tk(rank=16), 16, 16**3),
    "fact_tk, few layers": (sl.fact_tk(rank=48), 48, 48 * 48),
    "lorta": (sl.lorta(rank=12), 12, 12**3),
    "cp": (sl.Spec(rank=16, order=3, core="identity", groups=1, fold="balanced"), 16, 16),
}
starts = pytest.mark.parametrize(("spec", "rank", "terms"), STARTS.values(), ids=STARTS)


@starts
def test_the_deviations_of_the_random_blocks_multiply_to_that_of_lora(spec, rank, terms):
    plan = make_plan(spec, LARGE)
    factors = plan.init(1, like=numpy.float64)
    for group in range(len(plan.layout.groups)):
        blocks = [
            block
            for name, block in factors.items()
            if name.startswith(f"{group}.") and numpy.any(block)
        ]
        # The standard error of each logarithm is (2 n) ** -0.5; five of them together.
        error = 5 * sum(1 / (2 * block.size) for block in blocks) ** 0.5
        logarithms = [0.5 * math.log(numpy.mean(block**2)) for block in blocks]
        expected = -0.5 * math.log(400 * terms / rank)
        assert_allclose(sum(logarithms), expected, atol=error, rtol=0)
        assert_allclose(logarithms, expected / len(blocks), atol=error, rtol=0)
        assert error < 0.7


@starts
def test_a_step_of_the_zero_block_moves_the_update_as_in_lora(spec, rank, terms):
    plan = make_plan(spec, {name: (90, 40) for name in LARGE})
    squares = []
    for seed in range(5):
        factors = plan.init(seed, like=numpy.float64)
        generator = numpy.random.default_rng(seed)
        for name in zero_blocks(factors):
            factors[name] = generator.standard_normal(factors[name].shape)
        squares += [numpy.mean(delta**2) for delta in plan.deltas(factors).values()]
    # LoRA's B A with B of unit variance and A of variance 1 / 40.
    assert_allclose(numpy.mean(squares), rank / 40, rtol=0.15)


def test_the_width_is_the_mean_over_the_groups_weights():
    plan = sl.Plan(sl.lorta(rank=60, order=2), {"q": (300, 100), "v": (100, 300)})
    factors = plan.init(2, like=numpy.float64)
    assert_allclose(factors["0.0.factor1"].std() ** -2, 200, rtol=0.1)


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (-1, ValueError, "seed must be at least 0: got -1"),
        (2**64, ValueError, rf"seed must be below 2\*\*64: got {2**64}"),
        (1.0, TypeError, r"seed must be an integer: got 1\.0"),
        (True, TypeError, "seed must be an integer: got True"),
        (None, TypeError, "seed must be an integer: got None"),
    ],
)
def test_a_seed_out_of_range_is_refused(seed, error, message):
    with pytest.raises(error, match=message):
        sl.Plan(sl.lora(rank=2), SHAPES).init(seed)


@pytest.mark.parametrize("dtype", ["int32", "int64", "bool", "complex64", "complex128"])
def test_a_like_of_no_real_numbers_is_refused(xp, dtype):
    like = xp.array(numpy.zeros(2, dtype=dtype))
    with pytest.raises(TypeError, match=f"like must have a floating-point dtype: got .*{dtype}"):
        sl.Plan(sl.lora(rank=2), SHAPES).init(like=like)


@pytest.mark.parametrize("like", [numpy.int32, numpy.dtype("complex128"), int, "int8"])
def test_a_dtype_of_no_real_numbers_is_refused(like):
    with pytest.raises(TypeError, match="like must have a floating-point dtype: got "):
        sl.Plan(sl.lora(rank=2), SHAPES).init(like=like)


@pytest.mark.parametrize("like", [numpy.float64, numpy.dtype("float32"), float, "float16"])
def test_a_dtype_of_numpy_is_enough(like):
    for block in sl.Plan(sl.lora(rank=2), SHAPES).init(like=like).values():
        assert type(block) is numpy.ndarray
        assert block.dtype == like


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_a_dtype_of_torch_is_enough(name):
    torch = pytest.importorskip("torch")
    dtype = getattr(torch, name)
    for like in (dtype, torch.zeros(2, dtype=dtype, requires_grad=True)):
        for block in sl.Plan(sl.lora(rank=2), SHAPES).init(like=like).values():
            assert block.dtype is dtype
            assert block.is_leaf
            assert not block.requires_grad


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_a_dtype_of_jax_is_enough(name):
    jax = pytest.importorskip("jax")
    dtype = getattr(jax.numpy, name)
    for block in sl.Plan(sl.lora(rank=2), SHAPES).init(like=dtype).values():
        assert isinstance(block, jax.Array)
        assert block.dtype == dtype


def test_factors_lie_on_the_device_of_like(device):
    torch = pytest.importorskip("torch")
    like = torch.zeros(1, device=device)
    for block in sl.Plan(sl.lora(rank=2), SHAPES).init(like=like).values():
        assert block.device == like.device


@pytest.mark.parametrize("like", [3, object(), [1.0], print])
def test_a_like_of_no_library_is_refused(like):
    with pytest.raises(TypeError):
        sl.Plan(sl.lora(rank=2), SHAPES).init(like=like)
