"""Ranks under a budget, against an exhaustive search."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import superlora as sl
from superlora.choose.budget import allot, ladder, largest_rank, with_ranks

FAMILIES = {
    "lora": sl.lora,
    "lokr": sl.lokr,
    "loha": sl.loha,
    "tt_lora": sl.tt_lora,
    "lotr": sl.lotr,
    "lorta": sl.lorta,
    "cp": lambda rank: sl.Spec(rank=rank, order=3, groups=1, fold="balanced", core="identity"),
}


@functools.cache
def plan_of(family, rank):
    return sl.Plan(FAMILIES[family](rank), {"0.q": (12, 8), "1.q": (12, 8)})


@functools.cache
def counts_of(family):
    """The parameters of all ranks that are not refused, of those that the budgets allow."""
    counts = {}
    for rank in range(1, 100):
        with contextlib.suppress(ValueError):
            counts[rank] = plan_of(family, rank).num_parameters
    return counts


@pytest.mark.parametrize("family", FAMILIES)
@given(budget=st.integers(1, 900))
def test_the_largest_rank_is_the_last_that_fits(family, budget):
    fit = [rank for rank, count in counts_of(family).items() if count <= budget]
    found = largest_rank(functools.partial(plan_of, family), budget)
    assert found in [0, *fit]
    assert (found == 0) == (not fit)
    if fit:
        blocks = plan_of(family, fit[-1]).factor_shapes
        assert plan_of(family, found).factor_shapes == blocks  # none that fits is larger
        assert found == 1 or plan_of(family, found - 1).factor_shapes != blocks  # nor is smaller


def test_a_rank_that_a_dense_weight_undercuts_is_no_rung():
    def plan(rank):
        return sl.Plan(sl.lora(rank), {"q": (8, 8)})

    assert plan(5).num_parameters == 80 > plan(9).num_parameters == 64
    assert ladder(plan, 200) == [(1, 16), (2, 32), (3, 48), (9, 64)]
    assert ladder(plan, 50) == [(1, 16), (2, 32), (3, 48)]
    assert ladder(plan, 15) == []


@given(
    weights=st.lists(
        st.tuples(st.integers(1, 5), st.lists(st.floats(0.1, 9), min_size=1, max_size=4)),
        min_size=1,
        max_size=3,
    ),
    taken=st.integers(0, 12),
)
@example(weights=[(4, [5.0]), (1, [3.0] * 4)], taken=4)
@example(weights=[(5, [9.0, 8.0]), (2, [6.0] * 4), (1, [4.0])], taken=4)  # fmt: skip
def test_ranks_have_the_most_energy_for_what_they_cost(weights, taken):
    costs = {str(i): cost for i, (cost, _) in enumerate(weights)}
    gains = {str(i): sorted(own, reverse=True) for i, (_, own) in enumerate(weights)}
    sizes = [len(own) for own in gains.values()]
    # A budget that is spent to the last parameter by the gains that are largest for their cost.
    best = sorted(((g / costs[n], costs[n]) for n in gains for g in gains[n]), reverse=True)
    budget = sum(cost for _, cost in best[:taken])

    def total(ranks):
        return math.fsum(sum(own[:r]) for own, r in zip(gains.values(), ranks, strict=True))

    def spent(ranks):
        return sum(cost * r for cost, r in zip(costs.values(), ranks, strict=True))

    ladders = {n: [(r, costs[n] * r) for r in range(1, len(own) + 1)] for n, own in gains.items()}
    found = allot(ladders, lambda name, rank: sum(gains[name][:rank]), budget).values()
    assert spent(found) <= budget
    every = itertools.product(*(range(size + 1) for size in sizes))
    most = max(total(ranks) for ranks in every if spent(ranks) <= budget)
    assert total(found) == pytest.approx(most, rel=1e-9)


def test_what_a_dear_weight_leaves_goes_to_others():
    ladders = {"dear": [(1, 10), (2, 20)], "cheap": [(1, 3), (2, 6)]}
    gains = {"dear": 100.0, "cheap": 1.0}
    assert allot(ladders, lambda name, rank: gains[name] * rank, 16) == {"dear": 1, "cheap": 2}
    assert allot(ladders, lambda name, rank: 0.0, 16) == {"dear": 0, "cheap": 0}


@pytest.mark.parametrize(
    "family",
    [
        sl.lora,
        sl.lokr,
        lambda rank: sl.lora(rank, alpha=16),
        lambda rank: sl.lora(rank, scale=rank),
    ],
)
def test_every_weight_has_the_spec_of_its_rank(family):
    ranks = {"a.b": 2, "axb": 3, "c": 2, "d": 0, "a.b.c": 3, "e": 2}
    spec = with_ranks(family, ranks)
    for name, rank in ranks.items():
        assert spec.of(name) == (family(rank) if rank else None)
    assert sl.Spec.from_dict(spec.to_dict()) == spec
    assert with_ranks(family, {"a": 4, "b": 4}) == family(4)
