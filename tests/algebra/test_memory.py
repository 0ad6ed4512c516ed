"""What a public function returns is the caller's own: changed in place, it changes no argument."""

import numpy
import pytest

import superlora as sl
from superlora import operations

SPECS = {
    "dense": sl.dense(),
    "dense-scaled": sl.dense(scale=2.0),
    "lora": sl.lora(2),
    "un-factored": sl.Spec(rank="full"),
    "one-group": sl.Spec(rank="full", order=1, groups=1, fold="balanced"),
    "stack": sl.Spec(rank=("full", 2, 2), order=3, groups=1, fold="stack"),
}
SHAPES = {"a": (4, 6), "b": (4, 6)}


def unchanged(xp, arguments, returned):
    """Change what was returned in place, and compare the arguments with what they were."""
    if xp.name == "jax":  # whose arrays cannot be changed
        return True
    before = [numpy.array(xp.to_numpy(array)) for array in arguments]
    for array in returned:
        array += 1
    return all(
        numpy.array_equal(xp.to_numpy(array), old)
        for array, old in zip(arguments, before, strict=True)
    )


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("ways", ["delta", "deltas", "low_rank", "merge"])
def test_an_update_is_never_the_memory_of_a_factor(xp, spec, ways):
    plan = sl.Plan(spec, SHAPES)
    generator = numpy.random.default_rng(0)
    factors = {
        name: xp.array(generator.standard_normal(shape))
        for name, shape in plan.factor_shapes.items()
    }
    weight, bias = xp.array(numpy.ones((4, 6))), xp.array(numpy.ones(4))
    found = {
        "delta": lambda: [plan.delta(factors, "a")],
        "deltas": lambda: list(plan.deltas(factors).values()),
        "low_rank": lambda: list(plan.low_rank(factors, "a") or ()),
        "merge": lambda: list(plan.merge(factors, "a", weight, bias)),
    }[ways]()
    assert unchanged(xp, [*factors.values(), weight, bias], found)


def test_the_algebra_returns_arrays_of_its_own(xp):
    matrix, vector = xp.array(numpy.ones((2, 3))), xp.array(numpy.ones(6))
    assert unchanged(xp, [matrix], [sl.tucker(matrix, [None, None])])
    assert unchanged(xp, [matrix], [sl.kronecker([matrix])])
    assert unchanged(xp, [vector], [sl.fold_group(vector, (2, 3))])
    assert unchanged(xp, [matrix], [sl.unfold_group(matrix, 5)])


@pytest.mark.parametrize("operation", sl.OPERATIONS)
def test_merge_operations_return_arrays_of_their_own(xp, operation):
    weight, bias = xp.array(numpy.ones((3, 2))), xp.array(numpy.ones(3))
    support = xp.array(numpy.ones(sl.support_shape(operation, (3, 2))))
    change = operations.change(operation, support, weight, bias)
    gradient = xp.array(numpy.ones(xp.to_numpy(change).shape))
    returned = [
        change,
        operations.adjoint(operation, gradient, weight, bias),
        *operations.merge(weight, bias, {operation: support}),
    ]
    assert unchanged(xp, [support, weight, bias, gradient], returned)


def test_a_scale_of_another_type_leaves_the_dtype(xp):
    plan = sl.Plan(sl.lora(2), SHAPES)
    factors = plan.init(like=xp.array(numpy.ones(1, numpy.float32)))
    found = plan.delta(factors, "a", scale=numpy.float64(2))
    assert found.dtype == factors["0.0.factor0"].dtype


def test_the_identity_copies():
    x = numpy.arange(6.0)
    for y in (sl.maps.Identity().apply(x, 6), sl.maps.Identity().adjoint(x, 6)):
        y += 1
    assert (x == numpy.arange(6.0)).all()
