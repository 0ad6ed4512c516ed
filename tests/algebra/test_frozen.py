"""Frozen blocks: the same on every library, from the seed or from the weights, with known laws."""

from __future__ import annotations

import numpy
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import superlora as sl

SHAPES = {"0.q": (6, 4), "1.q": (5, 9)}


def weights(seed=0, **shapes):
    generator = numpy.random.default_rng(seed)
    return {name: generator.standard_normal(shape) for name, shape in (shapes or SHAPES).items()}


def singular_plan(source, rank=3, **shapes):
    frozen = {"0.factor0": source, "0.factor1": source}
    return sl.Plan(sl.Spec(rank=rank, core="full", frozen=frozen), shapes or SHAPES)


def test_names_and_shapes_are_those_of_the_plan_without_what_is_stored(xp):
    spec = sl.Spec(
        rank=2, core="full", frozen={"0.core": "stored", "0.factor1": "ones"}, tied=["0.factor1"]
    )
    plan = sl.Plan(spec, SHAPES)
    assert plan.frozen_shapes == {"0.0.core": (2, 2), "0.0.factor1": (9, 2), "1.0.core": (2, 2)}
    blocks = plan.frozen(like=xp.like)
    assert blocks.keys() == {"0.0.factor1"}
    assert xp.owns(blocks["0.0.factor1"])
    assert_array_equal(xp.to_numpy(blocks["0.0.factor1"]), numpy.ones((9, 2)))


def test_random_blocks_are_the_same_on_every_library(xp):
    plan = sl.Plan(sl.vera(rank=2, seed=3), SHAPES)
    expected = plan.frozen(like=numpy.float64)
    blocks = plan.frozen(like=xp.like)
    assert list(blocks) == list(expected) == list(plan.frozen_shapes)
    for name, block in blocks.items():
        assert xp.owns(block)
        assert_array_equal(xp.to_numpy(block), expected[name])
    single = plan.frozen(like=xp.array(numpy.zeros(1, dtype="float32")))
    for name, block in single.items():
        assert_array_equal(xp.to_numpy(block), expected[name].astype("float32"))


def test_the_seed_of_the_spec_decides_and_no_two_blocks_are_alike():
    def drawn(**changes):
        spec = sl.Spec(rank=2, terms=2, frozen={"0.factor1": "random"}, **changes)
        return sl.Plan(spec, dict.fromkeys("qv", (4, 4))).frozen()

    first, again, other = drawn(), drawn(seed=0), drawn(seed=1)
    assert len(first) == 4
    seen = {block.tobytes() for block in [*first.values(), *other.values()]}
    assert len(seen) == 8
    for name, block in first.items():
        assert_array_equal(block, again[name])
    factors = sl.Plan(sl.lora(rank=2), dict.fromkeys("qv", (4, 4))).init(0)
    assert not any(numpy.array_equal(a, b) for a in first.values() for b in factors.values())


def test_an_override_has_a_seed_of_its_own():
    spec = sl.lora_fa(rank=2, overrides={"v": {"seed": 5}})
    shapes = dict.fromkeys("qv", (4, 4))
    found, plain = (sl.Plan(s, shapes).frozen() for s in (spec, sl.lora_fa(rank=2)))
    assert_array_equal(found["0.0.factor1"], plain["0.0.factor1"])
    assert not numpy.array_equal(found["1.0.factor1"], plain["1.0.factor1"])


@pytest.mark.parametrize(
    ("spec", "name", "variance"),
    [
        (sl.lora_fa(rank=16), "0.0.factor1", 1 / 400),
        (sl.vera(rank=16), "0.0.factor0", 1 / 16),
        (sl.vera(rank=16), "0.0.factor1", 1 / 400),
    ],
)
def test_the_variance_of_random_blocks_is_one_over_the_terms_summed(spec, name, variance):
    block = sl.Plan(spec, {"q": (900, 400)}).frozen(like=numpy.float64)[name]
    assert_allclose(block.var(), variance, rtol=6 * (2 / block.size) ** 0.5)
    assert abs(block.mean()) < 6 * (variance / block.size) ** 0.5


@pytest.mark.parametrize(
    ("source", "power"), [("singular", 0), ("singular_root", 0.5), ("singular_scaled", 1)]
)
def test_singular_blocks_are_the_leading_vectors_of_the_weight(xp, source, power):
    own = weights()
    plan = singular_plan(source)
    blocks = plan.frozen(xp.arrays(own), like=xp.like)
    assert blocks.keys() == plan.frozen_shapes.keys()
    for group, (name, weight) in enumerate(own.items()):
        left, right = (xp.to_numpy(blocks[f"{group}.0.factor{mode}"]) for mode in (0, 1))
        numbers = numpy.linalg.svd(weight, compute_uv=False)[:3]
        for block in (left, right):
            assert_allclose(block.T @ block, numpy.diag(numbers ** (2 * power)), atol=1e-12)
        # The best approximation of rank three, whatever the signs of the vectors.
        u, s, v = numpy.linalg.svd(weight)
        best = u[:, :3] * s[:3] @ v[:3]
        middle = numpy.diag(numbers ** (1 - 2 * power))
        assert_allclose(left @ middle @ right.T, best, atol=1e-12, err_msg=name)
        peaks = left[numpy.abs(left).argmax(axis=0), range(3)]
        assert (peaks > 0).all()


def test_signs_do_not_depend_on_the_library(xp):
    own = weights()
    expected = singular_plan("singular").frozen(own, like=numpy.float64)
    found = singular_plan("singular").frozen(xp.arrays(own), like=xp.like)
    for name, block in found.items():
        assert_allclose(xp.to_numpy(block), expected[name], atol=1e-12)


def test_a_new_core_between_singular_vectors_reaches_the_weight_itself():
    own = weights(q=(6, 4))
    plan = sl.Plan(sl.lora_xs(rank=4), {"q": (6, 4)})
    blocks = {**plan.frozen(own, like=numpy.float64), "0.0.core": numpy.eye(4)}
    assert_allclose(plan.delta(blocks, "q"), own["q"], atol=1e-12)
    tiny = sl.Plan(sl.tinylora(4, 1), {"q": (6, 4)})
    ones = {"0.0.core": numpy.eye(4)[None], "0.0.factor0": numpy.ones((1, 1))}
    blocks = {**tiny.frozen(own, like=numpy.float64), **ones}
    assert_allclose(tiny.delta(blocks, "q"), own["q"], atol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_weights_of_lower_precision_are_decomposed_too(xp, dtype):
    rounded = {name: weight.astype(dtype) for name, weight in weights().items()}
    exact = {name: weight.astype("float64") for name, weight in rounded.items()}
    expected = singular_plan("singular_scaled").frozen(exact, like=numpy.float64)
    found = singular_plan("singular_scaled").frozen(xp.arrays(rounded), like=xp.like)
    for name, block in found.items():
        assert_allclose(xp.to_numpy(block), expected[name], atol=1e-4)


def test_parameters_of_torch_may_be_weights():
    torch = pytest.importorskip("torch")
    own = {name: torch.nn.Parameter(torch.tensor(w)) for name, w in weights().items()}
    for block in singular_plan("singular").frozen(own, like=torch.float64).values():
        assert not block.requires_grad


def test_only_the_weights_that_are_asked_for_are_read():
    class Once(dict):
        def __getitem__(self, name):
            return self.pop(name)

    spec = sl.lora(rank=2, overrides={"q": {"core": "full", "frozen": {"0.factor0": "singular"}}})
    own = Once(weights(q=(6, 4), v=(6, 4)))
    assert sl.Plan(spec, {"q": (6, 4), "v": (6, 4)}).frozen(own).keys() == {"0.0.factor0"}
    assert list(own) == ["v"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "weights must hold '0.q', whose singular vectors the spec asks for: it is missing"),
        ({}, "weights must hold '0.q', .*missing"),
        ({"0.q": numpy.ones((4, 6))}, r"weights\['0\.q'\] must have shape \(6, 4\): got \(4, 6\)"),
        ({"0.q": numpy.ones(24)}, r"weights\['0\.q'\] must have shape \(6, 4\): got \(24,\)"),
    ],
)
def test_wrong_weights_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        singular_plan("singular").frozen(given)


@pytest.mark.parametrize("spec", [sl.lora_fa(rank=2), sl.lora_xs(rank=2)])
def test_a_like_of_no_real_numbers_is_refused(spec):
    with pytest.raises(TypeError, match="like must have a floating-point dtype: got int32"):
        sl.Plan(spec, SHAPES).frozen(weights(), like=numpy.int32)


def test_a_missing_frozen_block_is_called_one():
    plan = sl.Plan(sl.lora_fa(rank=2), SHAPES)
    message = "factors must hold '0.0.factor1', a frozen block of '0.q': .*Plan.frozen makes those"
    with pytest.raises(ValueError, match=message):
        plan.delta(plan.init(), "0.q")


def test_zero_and_rank_deficient_weights_have_vectors_too():
    own = {"0.q": numpy.zeros((6, 4)), "1.q": numpy.outer(numpy.ones(5), numpy.ones(9))}
    for block in singular_plan("singular").frozen(own, like=numpy.float64).values():
        assert_allclose(block.T @ block, numpy.eye(3), atol=1e-12)
    for block in singular_plan("singular_root").frozen(own, like=numpy.float64).values():
        assert numpy.isfinite(block).all()
