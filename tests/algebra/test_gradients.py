"""Gradients: exact, finite, and alive in every block after two steps."""

from __future__ import annotations

import warnings

import numpy
import pytest
from hypothesis import assume, given, settings

import superlora as sl
from superlora.design.cost_rule import application
from tests.strategies import Mixing, Permuting, draw_factors, make_plan, plans

torch = pytest.importorskip("torch")

SAME = {"0.q": (6, 4), "0.v": (6, 4), "1.q": (6, 4)}
MIXED = {"0.q": (6, 4), "0.v": (2, 4), "1.q": (5, 8)}
PRIME = {"0.q": (7, 5), "1.q": (3, 11)}
LARGE = {"0.q": (24, 32), "1.q": (24, 32)}

SPECS = {
    "dense": sl.dense(),
    "lora": sl.lora(rank=2),
    "lora capped": sl.lora(rank=9),
    "lokr": sl.lokr(rank=2),
    "lokr of two": sl.lokr(rank=2, decompose_both=True),
    "krona": sl.krona(),
    "lonkr": sl.lonkr(rank=1, splits=2),
    "lotr": sl.lotr(rank=2),
    "fact_tt": sl.fact_tt(rank=3),
    "fact_tk": sl.fact_tk(rank=2),
    "lorta 3": sl.lorta(rank=2),
    "lorta 4": sl.lorta(rank=2, order=4, groups=2),
    "lorta 5": sl.lorta(rank=2, order=5, groups="layer"),
    "lonkr of one group": sl.lonkr(rank=2, groups=1, fold="balanced"),
    "cp": sl.Spec(rank=3, order=3, core="identity", groups=3, fold="balanced"),
    "mixing": sl.lorta(rank=2, map=Mixing(), ratio=0.5),
    "permuting": sl.lokr(rank=2, fold="balanced", map=Permuting()),
}
STACKS = ("lotr", "fact_tt", "fact_tk")


def pairs():
    for name, spec in SPECS.items():
        for label, shapes in {"same": SAME, "mixed": MIXED, "prime": PRIME, "large": LARGE}.items():
            splits_primes = label == "prime" and spec.splits > 1 and spec.fold == "natural"
            if (name in STACKS and label not in ("same", "large")) or splits_primes:
                continue  # no such plan: a stack needs one shape, a prime has no factors
            yield pytest.param(spec, shapes, id=f"{name}-{label}")


def tensors(plan, seed=0):
    return {
        name: torch.tensor(block, requires_grad=True)
        for name, block in draw_factors(plan, seed).items()
    }


def gradients(plan, factors, targets):
    """Return the gradient of the summed squared distance to the targets."""
    deltas = plan.deltas(factors)
    loss = sum(((deltas[name] - target) ** 2).sum() for name, target in targets.items())
    return dict(zip(factors, torch.autograd.grad(loss, list(factors.values())), strict=True))


@pytest.mark.parametrize(("spec", "shapes"), list(pairs()))
def test_every_block_learns_within_two_steps(spec, shapes):
    plan = make_plan(spec, shapes)
    generator = numpy.random.default_rng(1)
    targets = {n: torch.tensor(generator.standard_normal(s)) for n, s in plan.shapes.items()}
    factors = plan.init(0, like=torch.float64)
    zeros = {name for name, block in factors.items() if not block.any()}
    for step in range(2):
        for block in factors.values():
            block.requires_grad_()
        slopes = gradients(plan, factors, targets)
        for name, slope in slopes.items():
            assert torch.isfinite(slope).all(), name
            alive = step == 1 or name in zeros
            # At first the zero block alone; with two of them there would be none, for ever.
            assert bool(slope.any()) == alive, (step, name)
        factors = {name: (factors[name] - 0.01 * slopes[name]).detach() for name in factors}


def assert_every_slice_has_an_effect(plan):
    targets = {name: torch.zeros(shape) for name, shape in plan.shapes.items()}
    for name, slope in gradients(plan, tensors(plan), targets).items():
        for mode in range(slope.ndim):
            assert slope.movedim(mode, 0).reshape(slope.shape[mode], -1).any(1).all(), (name, mode)


@pytest.mark.parametrize(("spec", "shapes"), list(pairs()))
def test_every_slice_of_every_block_has_an_effect(spec, shapes):
    assert_every_slice_has_an_effect(make_plan(spec, shapes))


@settings(max_examples=100)
@given(plans())
def test_no_plan_has_slices_without_effect(plan):
    # The last of padded groups has the shape that the first one needs.
    assume(plan.spec.cut == "even" or not isinstance(plan.spec.groups, int))
    assert_every_slice_has_an_effect(plan)


CHECKED = ("dense", "lora", "lokr", "lotr", "lorta 4", "cp", "mixing", "permuting")
FORMED = ("cp", "mixing", "permuting")  # in no other way: cut anywhere, or mixed


@pytest.mark.parametrize("name", CHECKED)
def test_the_gradient_of_delta_is_exact(name):
    shapes = {"0.q": (4, 6), "1.q": (4, 6)}
    plan = make_plan(SPECS[name], shapes)
    factors = tensors(plan)

    def delta(*blocks):
        return plan.delta(dict(zip(factors, blocks, strict=True)), "1.q")

    assert torch.autograd.gradcheck(delta, tuple(factors.values()))


@pytest.mark.parametrize("name", CHECKED)
def test_the_gradient_of_every_way_to_apply_is_exact(name):
    shapes = {"0.q": (4, 6), "1.q": (4, 6)}
    plan = make_plan(SPECS[name], shapes)
    factors = tensors(plan)
    x = torch.tensor(numpy.random.default_rng(2).standard_normal((2, 6)), requires_grad=True)

    factored = application(plan.layout, "1.q").factored is not None
    assert factored == (name not in FORMED)
    for way in ("factored", "formed") if factored else ("formed",):

        def apply(x, *blocks, way=way):
            named = dict(zip(factors, blocks, strict=True))
            return plan.apply(named, "1.q", x, apply=way)

        assert torch.autograd.gradcheck(apply, (x, *factors.values()))


def test_second_derivatives_are_exact():
    plan = make_plan(SPECS["lokr"], {"q": (4, 6)})
    factors = tensors(plan)

    def delta(*blocks):
        return plan.delta(dict(zip(factors, blocks, strict=True)), "q")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's own, on CPU
        assert torch.autograd.gradgradcheck(delta, tuple(factors.values()))
