"""Intervals, fronts and savings against values made by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest

pytest.importorskip("torch")

from experiments.analysis import Point, front, front_shares, points, savings


def row(method: str, seed: int, test: float, parameters: int = 10, **other: Any) -> dict[str, Any]:
    found = {"method": method, "family": method.split()[0], "seed": seed, "test": test}
    return {**found, "parameters": parameters, "rate": 0.1, "seconds": 1.0, "chosen": True, **other}


def point(family: str, parameters: int, mean: float, error: float = 1e-6) -> Point:
    name = f"{family} {parameters}"
    return Point(name, family, parameters, 0.1, mean, error, 2 * error, 3, 1.0, freedom=100)


def test_a_method_is_on_the_front_in_the_draws_where_no_smaller_one_is_better() -> None:
    found = [point("A", 10, 0.5, 0.01), point("B", 20, 0.5, 0.01), point("C", 15, 0.1, 0.01)]
    shares = front_shares(found)
    assert shares["A 10"] == 1.0
    assert shares["B 20"] == pytest.approx(0.5, abs=0.05)
    assert shares["C 15"] == 0.0
    assert front_shares([point("A", 10, 0.5, math.nan)]) == {}


def test_an_effect_of_the_seeds_is_no_part_of_the_error() -> None:
    seeds = (0.0, 0.05, -0.02)  # moves all methods alike
    rows = [row(m, s, base + seeds[s]) for m, base in (("a", 0.5), ("b", 0.7)) for s in range(3)]
    found = points(rows)
    assert [own.mean for own in found] == pytest.approx([0.51, 0.71])
    assert all(own.half < 1e-12 for own in found)


def test_the_interval_is_that_of_a_two_way_layout() -> None:
    values = numpy.array([[0.5, 0.6, 0.55], [0.7, 0.74, 0.78]])
    rows = [row("ab"[m], s, values[m, s]) for m in range(2) for s in range(3)]
    # With two methods the rest is half the difference of the differences.
    gaps = values[1] - values[0]
    variance = 2 * sum(((gap - gaps.mean()) / 2) ** 2 for gap in gaps) / 2
    student = 4.302652729911275  # of two degrees of freedom
    expected = student * math.sqrt(variance / 3)
    assert points(rows)[0].half == pytest.approx(expected)


def test_a_method_that_fails_for_a_seed_does_not_widen_the_others_intervals() -> None:
    generator = numpy.random.default_rng(0)
    values = 0.8 + 0.01 * generator.standard_normal((10, 3))
    rows = [row(f"m{m}", s, values[m, s]) for m in range(10) for s in range(3)]
    whole = points(rows)
    assert not any(own.alone for own in whole)
    failed = [row("f", s, value) for s, value in enumerate((0.8, 0.1, 0.79))]
    found = points([*rows, *failed])
    assert [own.half for own in found[:10]] == pytest.approx([own.half for own in whole])
    own = numpy.array([0.8, 0.1, 0.79])
    assert found[10].alone
    assert found[10].error == pytest.approx(own.std(ddof=1) / math.sqrt(3))
    assert found[10].half == pytest.approx(4.302652729911275 * found[10].error)


def test_a_method_that_fails_with_every_seed_does_not_widen_the_others_intervals() -> None:
    seeds = (0.0, 0.2, -0.2)  # move the methods that learn alone
    rows = [row(m, s, 0.5 + seeds[s]) for m in "abc" for s in range(3)]
    failed = [row("d", s, 0.1, diverged=True) for s in range(3)]
    *found, guess = points([*rows, *failed])
    assert all(own.half < 1e-12 and not own.alone for own in found)
    assert guess.alone
    assert guess.failed == 3
    assert points([*rows, *(dict(own, diverged=False) for own in failed)])[0].half > 0.05


def test_trials_that_were_not_chosen_do_not_count() -> None:
    rows = [row("a", 0, 0.5), row("b", 0, 0.6), row("b", 0, 0.9, chosen=False)]
    assert [own.mean for own in points(rows)] == [0.5, 0.6]


def test_a_missing_seed_is_an_error() -> None:
    with pytest.raises(ValueError, match="every seed"):
        points([row("a", 0, 0.5), row("b", 0, 0.6), row("b", 1, 0.6)])


def test_the_front_has_no_point_that_another_beats() -> None:
    found = [point("a", 10, 0.5), point("a", 20, 0.7), point("b", 10, 0.6), point("b", 30, 0.65)]
    assert [own.method for own in front(found)] == ["b 10", "a 20"]


def test_savings_are_read_off_the_curves() -> None:
    lora = [point("LoRA", 1000, 0.8), point("LoRA", 4000, 0.9)]
    other = [point("F", 100, 0.7), point("F", 10_000, 0.9)]
    low, high = savings([*lora, *other], "LoRA")
    # .8 is half way from .7 to .9, in the logarithm half way from 100 to 10,000.
    assert low.times == pytest.approx(1.0, rel=1e-3)
    assert high.times == pytest.approx(0.4, rel=1e-3)
    assert low.low == pytest.approx(low.high, rel=1e-3)
    assert not low.beyond


def test_what_is_not_reached_has_no_number_and_what_is_beyond_says_so() -> None:
    lora = [point("LoRA", 1000, 0.8), point("LoRA", 4000, 0.95)]
    other = [point("F", 100, 0.85), point("F", 10_000, 0.9)]
    low, high = savings([*lora, *other], "LoRA")
    assert low.beyond
    assert low.times == low.low == pytest.approx(10.0)
    assert low.high == math.inf
    assert (high.times, high.low, high.high) == (0.0, 0.0, 0.0)
    assert not high.beyond


def test_an_uncertain_curve_has_a_wide_interval() -> None:
    lora = [point("LoRA", 1000, 0.8, 0.02), point("LoRA", 4000, 0.9, 0.02)]
    other = [point("F", 100, 0.7, 0.02), point("F", 10_000, 0.9, 0.02)]
    low, high = savings([*lora, *other], "LoRA")
    assert low.low < 0.7 * low.times < 1.4 * low.times < low.high
    assert high.low == 0.0  # half of the draws do not reach it


def test_a_copy_of_the_reference_saves_nothing_though_its_curve_falls() -> None:
    means = (0.90, 0.92, 0.921, 0.919)
    lora = [point("LoRA", 1000 * 2**place, mean) for place, mean in enumerate(means)]
    copy = [point("F", 1000 * 2**place, mean) for place, mean in enumerate(means)]
    found = savings([*lora, *copy], "LoRA")
    assert [own.times for own in found] == pytest.approx([1.0] * 4)


def test_an_uncertain_point_counts_little_in_its_curve() -> None:
    lora = [point("LoRA", 1000, 0.75), point("LoRA", 2000, 0.8)]
    certain = [point("F", 100, 0.7), point("F", 10_000, 0.9)]
    other = [*certain, point("F", 1000, 0.2, error=0.3)]
    assert savings([*lora, *other], "LoRA")[1].times > 0.5


def test_errors_that_are_not_known_are_refused() -> None:
    found = points([row("LoRA", 0, 0.8), row("LoRA 2", 0, 0.9, 20)])
    with pytest.raises(ValueError, match="must have a mean with an error"):
        savings(found, "LoRA")


def test_a_search_of_several_sizes_has_their_mean_and_failures_are_counted() -> None:
    rows = [row("a", s, 0.5, 100 + s, diverged=s == 1) for s in range(3)]
    (found,) = points(rows)
    assert (found.parameters, found.failed) == (101, 1)


def test_a_curve_that_falls_by_chance_is_evened_out() -> None:
    lora = [point("LoRA", 1000, 0.75), point("LoRA", 2000, 0.8)]
    other = [point("F", 100, 0.7), point("F", 1000, 0.8), point("F", 10_000, 0.7)]
    found = savings([*lora, *other], "LoRA")
    assert found[0].times == pytest.approx(1.0, rel=1e-2)  # .7 and then .75 twice
    assert found[1].times == 0.0
