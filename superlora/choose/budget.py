"""Ranks under a budget of parameters: the largest for all weights, or one for each weight."""

from __future__ import annotations

import bisect
import dataclasses
import heapq
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping

from superlora.design.spec import Spec
from superlora.plan import Plan

PlanOfRank = Callable[[int], Plan]
# Ranks and their numbers of parameters, both ascending.
Ladder = list[tuple[int, int]]
# What a weight gains by a rank, of all that it could.
Captured = Callable[[str, int], float]


def _count(plan: PlanOfRank, rank: int) -> float:
    """Return a plan's parameters, infinitely many where the rank is refused."""
    try:
        return plan(rank).num_parameters
    except ValueError:
        return math.inf


def largest_rank(plan: PlanOfRank, budget: int) -> int:
    """Return the largest rank that a budget allows, of those that differ; 0 if there is none."""
    # A rank that counts takes a parameter at least: one more than the budget is too dear, or does
    # what any rank above does. That may cost less than ranks below, where it is dense.
    most = budget + 1
    ranks = range(1, most)
    if _count(plan, most) > budget:
        return bisect.bisect_left(ranks, True, key=lambda rank: _count(plan, rank) > budget)
    last = plan(most).layout.input_shapes
    return 1 + bisect.bisect_left(
        ranks, True, key=lambda rank: plan(rank).layout.input_shapes == last
    )


def ladder(plan: PlanOfRank, budget: int) -> Ladder:
    """Return the ranks that a budget allows without those for whose cost there is a larger one."""
    found: Ladder = []
    for rank in range(largest_rank(plan, budget), 0, -1):
        count = _count(plan, rank)
        if count < (found[-1][1] if found else math.inf):
            found.append((rank, int(count)))
    return found[::-1]


def allot(ladders: Mapping[str, Ladder], captured: Captured, budget: int) -> dict[str, int]:
    """Return a rank for each weight, 0 for none: the next is that of most gain a parameter."""
    ranks = dict.fromkeys(ladders, 0)
    spent = dict.fromkeys(ladders, 0)
    left = budget
    heap: list[tuple[float, int, str, int]] = []

    def offer(name: str, step: int) -> None:
        if step < len(ladders[name]):
            rank, count = ladders[name][step]
            gain = captured(name, rank) - (captured(name, ranks[name]) if step else 0.0)
            if gain > 0:
                # Of equal gains the first weight comes first.
                place = (-gain / (count - spent[name]), order[name], name, step)
                heapq.heappush(heap, place)

    order = {name: index for index, name in enumerate(ladders)}
    for name in ladders:
        offer(name, 0)
    while heap:
        _, _, name, step = heapq.heappop(heap)
        rank, count = ladders[name][step]
        if count - spent[name] <= left:
            left -= count - spent[name]
            ranks[name], spent[name] = rank, count
            offer(name, step + 1)
    return ranks


def with_ranks(family: Callable[[int], Spec], ranks: Mapping[str, int]) -> Spec:
    """Return a family's spec of the commonest rank, with overrides for the weights of others."""
    (common, _), *_ = Counter(rank for rank in ranks.values() if rank).most_common(1)
    spec = family(common)
    names: dict[int, list[str]] = {}
    for name, rank in ranks.items():
        if rank != common:
            names.setdefault(rank, []).append(f"^{re.escape(name)}$")
    overrides = {}
    for rank, patterns in sorted(names.items()):
        own = family(rank) if rank else None
        overrides["|".join(patterns)] = own and {
            item.name: getattr(own, item.name)
            for item in dataclasses.fields(own)
            if getattr(own, item.name) != getattr(spec, item.name)
        }
    return spec.replace(overrides=overrides) if overrides else spec
