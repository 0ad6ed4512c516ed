"""Limits on the number of parameters: refused where none meets them, met by every draw."""

from collections import Counter

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from superlora.search import Space
from superlora.search.limits import UNIFORM_TRIES, Limits
from superlora.search.tilted_draws import Tilted
from tests.search.spaces import SMALL, count, every, spaces

VIT = Space({f"blocks.{i}.qkv": (1152, 384) for i in range(12)}, ranks=(8, 4))


@given(spaces(), st.integers(0, 40), st.integers(0, 20), st.integers(0, 5))
def test_limits_are_refused_exactly_where_no_configuration_meets_them(space, least, window, seed):
    legal = {
        space.indices(configuration)
        for configuration in every(space)
        if least <= count(space, configuration) <= least + window
    }
    if not legal:
        with pytest.raises(ValueError, match=r"the (least|largest) possible number of parameters"):
            Limits(space, least, least + window)
        return
    limits = Limits(space, least, least + window)
    seen = set()
    generator = numpy.random.default_rng(seed)
    # Draw after draw gives a new one, until all are there.
    for _ in legal:
        found = limits.unseen(generator, seen)
        assert found in legal - seen
        assert limits.hold(found)
        seen.add(found)
    assert limits.unseen(generator, seen) is None


def test_the_message_says_the_least_possible():
    space = Space({"q": (3, 2)}, (2,), {"add_weight": (2, "vector"), "add_bias": ("vector",)})
    with pytest.raises(ValueError, match=r"limits\[1\] must be at least 6, the least .*: got 5"):
        Limits(space, 0, 5)
    with pytest.raises(ValueError, match=r"limits\[0\] must be at most 13, the largest .*: got 14"):
        Limits(space, 14)
    with pytest.raises(
        ValueError, match=r"got \(8, 12\); the least .* is 6, the nearest are 6 and 13"
    ):
        Limits(space, 8, 12)


@pytest.mark.parametrize(
    ("limits", "error", "message"),
    [
        ((5, 4), ValueError, r"limits\[1\] must be at least limits\[0\]: expected 5 .*, got 4"),
        ((-1, 4), ValueError, r"limits\[0\] must be at least 0: got -1"),
        ((0, 1.5), TypeError, r"limits\[1\] must be an integer: got 1.5"),
        ((None, 4), TypeError, r"limits\[0\] must be an integer: got None"),
    ],
)
def test_no_limits(limits, error, message):
    with pytest.raises(error, match=message):
        Limits(SMALL, *limits)


@pytest.mark.parametrize("most", [0, 1, 40, 3000])
def test_a_budget_near_the_least_is_met(most):
    limits = Limits(VIT, 0, most)
    generator = numpy.random.default_rng(0)
    uniform = [VIT.num_parameters(VIT.sample(generator)) for _ in range(200)]
    assert min(uniform) > most, "uniform draws would do"
    drawn = [limits.draw(generator) for _ in range(20)]
    assert all(VIT.count(indices) <= most for indices in drawn)
    assert most == 0 or len(set(drawn)) > 1


def test_a_narrow_window_is_met():
    middle = VIT.most_parameters // 2
    limits = Limits(VIT, middle, middle + 2)
    generator = numpy.random.default_rng(0)
    first = limits.unseen(generator, ())
    second = limits.unseen(generator, {first})
    assert first != second
    assert all(middle <= VIT.count(indices) <= middle + 2 for indices in (first, second))


def test_under_a_budget_what_costs_little_stays_free():
    mean = sum(sum(costs) / len(costs) for costs in VIT.costs)
    generator = numpy.random.default_rng(0)
    for part in (0.25, 1.75):
        limits = Limits(VIT, 0, int(part * mean)) if part < 1 else Limits(VIT, int(part * mean))
        drawn = [VIT.configuration(limits.draw(generator)) for _ in range(100)]
        counts = [VIT.num_parameters(configuration) for configuration in drawn]
        assert all(limits.least <= count <= limits.high for count in counts)
        assert abs(sum(counts) / 100 - part * mean) < 0.25 * mean
        chosen = [own for configuration in drawn for own in configuration.values()]
        for option in VIT.operations["add_bias"]:
            share = sum(own["add_bias"] == option for own in chosen) / len(chosen)
            assert abs(share - 1 / 3) < 0.15
        ranks = sum(own["add_weight"] == VIT.largest_rank for own in chosen) / len(chosen)
        assert ranks < 0.1 if part < 1 else ranks > 0.3


def test_draws_of_equal_count_are_equally_probable():
    tilted = Tilted(SMALL.costs, SMALL.least_parameters + 3)
    generator = numpy.random.default_rng(0)
    drawn = Counter(tuple(tilted.draw(generator)) for _ in range(30_000))
    mean = sum(SMALL.count(indices) * times for indices, times in drawn.items()) / 30_000
    assert mean == pytest.approx(SMALL.least_parameters + 3, rel=0.03)
    by_count = {}
    for configuration in every(SMALL):
        indices = SMALL.indices(configuration)
        by_count.setdefault(SMALL.count(indices), []).append(drawn[indices])
    several = [times for times in by_count.values() if len(times) > 1 and sum(times) > 1000]
    assert several
    for times in several:
        expected = sum(times) / len(times)
        assert all(abs(each - expected) < 5 * expected**0.5 for each in times)


@pytest.mark.parametrize(("mean", "found"), [(-1, [0, 1]), (0, [0, 1]), (10**9, [2, 0])])
def test_a_mean_out_of_reach_is_the_nearest(mean, found):
    tilted = Tilted([[0, 5, 70], [3, 1]], mean)
    assert {tuple(tilted.draw(numpy.random.default_rng(seed))) for seed in range(20)} == {
        tuple(found)
    }


def test_draws_without_limits_are_the_uniform_ones():
    ours, plain = numpy.random.default_rng(3), numpy.random.default_rng(3)
    for _ in range(5):
        assert VIT.configuration(Limits(VIT).draw(ours)) == VIT.sample(plain)


def test_draws_within_wide_limits_are_uniform():
    limits = Limits(SMALL, 10, SMALL.most_parameters)
    legal = [c for c in every(SMALL) if count(SMALL, c) >= 10]
    share = len(legal) / SMALL.size
    assert (1 - share) ** UNIFORM_TRIES < 1e-3, "repairs would show"
    generator = numpy.random.default_rng(0)
    found = [limits.draw(generator) for _ in range(100 * len(legal))]
    times = [found.count(SMALL.indices(configuration)) for configuration in legal]
    # Five standard deviations, and what few repairs there are.
    assert min(times) > 45
    assert max(times) < 155
