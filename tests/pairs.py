"""Cases of several parameters: few of them, in which all values are, or every two of them meet."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest


def pairwise(
    parameters: Mapping[str, Iterable[Any]], indirect: Sequence[str] = ()
) -> pytest.MarkDecorator:
    """Parametrise a test such that any two values of different parameters meet in some case.

    A mapping of values has their names; others are named by `str`. Parameters in `indirect` go
    to the fixtures of their names.
    """
    named = [list(_named(values)) for values in parameters.values()]
    cases = []
    for places in cover([len(values) for values in named]):
        names, values = zip(
            *(own[place] for own, place in zip(named, places, strict=True)), strict=True
        )
        cases.append(pytest.param(*values, id="-".join(names)))
    return pytest.mark.parametrize(list(parameters), cases, indirect=list(indirect))


def in_turn(
    first: str, values: Iterable[Any], second: str, others: Sequence[Any]
) -> pytest.MarkDecorator:
    """Parametrise a test by every pair of two parameters' values, most of which are slow cases.

    The default run has each of the first parameter's values once, with the second's in turn.
    """
    cases = []
    for place, value in enumerate(values):
        for turn, other in enumerate(others):
            marks = [] if place % len(others) == turn else [pytest.mark.slow]
            (one, _), (two, _) = _named([value, other])
            cases.append(pytest.param(value, other, id=f"{one}-{two}", marks=marks))
    return pytest.mark.parametrize((first, second), cases)


def _named(values: Iterable[Any]) -> Iterable[tuple[str, Any]]:
    if isinstance(values, Mapping):
        return values.items()
    return (
        (getattr(value, "__name__", str(value).removeprefix("torch.")), value) for value in values
    )


def cover(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Return cases, a place below each size, such that any two places of two sizes meet in one.

    Greedy and without chance: a case begins with the first pair that has not met; then each
    other size takes the place that makes most pairs meet, of equal ones the least used.
    """
    places = [[(index, place) for place in range(size)] for index, size in enumerate(sizes)]
    missing = {
        pair
        for one, other in itertools.combinations(places, 2)
        for pair in itertools.product(one, other)
    }
    used: collections.Counter[tuple[int, int]] = collections.Counter()
    cases = []
    while missing:
        case = list(min(missing))
        for own in places:
            if own[0][0] not in dict(case):
                met = {
                    place: sum(tuple(sorted((place, other))) in missing for other in case)
                    for place in own
                }
                case.append(max(own, key=lambda place, met=met: (met[place], -used[place])))
        case.sort()
        used.update(case)
        missing.difference_update(itertools.combinations(case, 2))
        cases.append(tuple(place for _, place in case))
    return cases
