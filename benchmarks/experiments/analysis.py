"""What the runs say: means with intervals, the Pareto front, parameters at equal accuracy.

The seeds decide the data of a run besides its start, for all methods alike. The runs of the chosen
rates are a two-way layout without repetition, y = method + seed + rest, and the standard error of
a method's mean comes from the rest alone, pooled over the methods. A method that spreads far more
than the others, as one does whose training fails for a seed, is not pooled: its error is its own.
Nor is one that fails with every seed: it guesses, and the seeds do not move it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from scipy import stats
from scipy.optimize import isotonic_regression

CONFIDENCE = 0.95
ALONE = 1e-4  # the chance at which a method's variance is no longer taken for that of the others
DRAWS = 2000


@dataclass(frozen=True)
class Point:
    """A method's mean over the seeds; `error` is its standard error, `half` half its interval.

    Both are from all methods together, or, where `alone`, from the method's own runs.
    """

    method: str
    family: str
    parameters: int
    rate: float
    mean: float
    error: float
    half: float
    seeds: int
    seconds: float
    freedom: int  # degrees of freedom of the error
    failed: int = 0  # seeds whose training diverged
    scale: float = 1.0
    alone: bool = False


def points(rows: Iterable[Mapping[str, Any]]) -> list[Point]:
    """Return a point for each method, from the runs of its chosen rate."""
    chosen = [row for row in rows if row["chosen"]]
    methods = list(dict.fromkeys(row["method"] for row in chosen))
    seeds = sorted({row["seed"] for row in chosen})
    found = {(row["method"], row["seed"]): row for row in chosen}
    missing = [(m, s) for m in methods for s in seeds if (m, s) not in found]
    if missing:
        raise ValueError(f"every method must have a run of every seed: {missing} have none")
    values = numpy.array([[found[m, s]["test"] for s in seeds] for m in methods])
    failed = [sum(bool(found[m, s].get("diverged")) for s in seeds) for m in methods]
    errors, freedoms, alone = _errors(values, [count < len(seeds) for count in failed])
    made = []
    for place, (method, own) in enumerate(zip(methods, values, strict=True)):
        freedom = freedoms[place]
        quantile = float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom)) if freedom else math.nan
        first = found[method, seeds[0]]
        seconds = sum(found[method, seed]["seconds"] for seed in seeds) / len(seeds)
        made.append(
            Point(
                method,
                first["family"],
                # A search takes another size for each seed.
                round(sum(found[method, seed]["parameters"] for seed in seeds) / len(seeds)),
                float(first["rate"]),
                float(own.mean()),
                errors[place],
                errors[place] * quantile,
                len(seeds),
                seconds,
                freedom,
                failed[place],
                float(first.get("scale", 1.0)),
                place in alone,
            )
        )
    return made


def _errors(values: Any, trained: Sequence[bool]) -> tuple[list[float], list[int], set[int]]:
    """Return the standard errors of the means, their degrees of freedom, and who is alone."""
    count, seeds = values.shape
    errors, freedoms = [math.nan] * count, [0] * count
    alone: set[int] = set()

    def leave(place: int) -> None:
        alone.add(place)
        errors[place] = float(values[place].std(ddof=1)) / math.sqrt(seeds)
        freedoms[place] = seeds - 1

    together = [place for place in range(count) if trained[place]]
    if seeds > 1:
        for place in set(range(count)) - set(together):
            leave(place)
    while len(together) > 1 and seeds > 1:
        own = values[together]
        rest = own - own.mean(1, keepdims=True) - own.mean(0) + own.mean()
        squares = (rest**2).sum(1)
        worst = int(squares.argmax())
        others = (len(together) - 2) * (seeds - 1)
        ratio = others * squares[worst] / (squares.sum() - squares[worst]) if others else 0.0
        ratio /= seeds - 1
        # Of so many methods one is the worst: the chance is shared among them.
        if others and stats.f.sf(ratio, seeds - 1, others) < ALONE / len(together):
            leave(together.pop(worst))
            continue
        freedom = (len(together) - 1) * (seeds - 1)
        for place in together:
            errors[place] = math.sqrt(float(squares.sum()) / freedom / seeds)
            freedoms[place] = freedom
        break
    return errors, freedoms, alone


def front(found: Iterable[Point]) -> list[Point]:
    """Return the points that no other one beats with as few parameters, by parameters."""
    kept: list[Point] = []
    for point in sorted(found, key=lambda own: (own.parameters, -own.mean)):
        if not kept or point.mean > kept[-1].mean:
            kept.append(point)
    return kept


def front_shares(found: Sequence[Point]) -> dict[str, float]:
    """Return in which share of draws of all means, by their errors, a method is on the front."""
    if not all(math.isfinite(point.error) for point in found):
        return {}
    generator = numpy.random.default_rng(0)
    ordered = sorted(found, key=lambda own: own.parameters)
    noise = [generator.standard_t(own.freedom, DRAWS) * own.error for own in ordered]
    drawn = numpy.array([own.mean for own in ordered]) + numpy.stack(noise, axis=1)
    shares = {}
    for place, own in enumerate(ordered):
        others = [
            other
            for other, rival in enumerate(ordered)
            if other != place and rival.parameters <= own.parameters
        ]
        best = drawn[:, others].max(1, initial=-math.inf)
        shares[own.method] = float((drawn[:, place] > best).mean())
    return shares


@dataclass(frozen=True)
class Saving:
    """How many times fewer parameters a family needs than a reference family, for an accuracy.

    The accuracy is that of the `reference` method. `times` is 0 where the family does not reach it.
    Where `beyond`, even its smallest method does, so that the number is a lower bound; so it is of
    `high`, where that is infinite. `low` is 0 where the family may not reach the accuracy.
    """

    family: str
    reference: str
    times: float
    low: float
    high: float
    beyond: bool


def savings(found: Sequence[Point], reference: str) -> list[Saving]:
    """Compare each family of two or more sizes with the reference's at each accuracy of it.

    The accuracy of a family is an isotonic regression over its sizes, interpolated in the
    logarithm of the parameters, the reference's too. The interval is that of draws of all means
    by their errors.

    Raises
    ------
    ValueError
        If there is no such family, or a mean or an error is not known, as of one seed alone.
    """
    families: dict[str, list[Point]] = {}
    for point in sorted(found, key=lambda own: own.parameters):
        families.setdefault(point.family, []).append(point)
        if not math.isfinite(point.mean) or not math.isfinite(point.error):
            raise ValueError(f"{point.method} must have a mean with an error: got {point}")
    if reference not in families:
        raise ValueError(f"reference must be one of {list(families)}: got {reference!r}")
    generator = numpy.random.default_rng(0)
    noise = {
        point.method: numpy.append(0.0, generator.standard_t(point.freedom, DRAWS)) * point.error
        for point in found
    }

    def curves(own: Sequence[Point]) -> Any:
        drawn = numpy.stack([point.mean + noise[point.method] for point in own], axis=1)
        weights = [1 / max(point.error, 1e-12) ** 2 for point in own]
        return numpy.stack([isotonic_regression(line, weights=weights).x for line in drawn])

    def sizes(own: Sequence[Point]) -> Any:
        return numpy.log([point.parameters for point in own])

    goals = curves(families[reference])
    made = []
    for name, own in families.items():
        if name == reference or len(own) < 2:
            continue
        lines = curves(own)
        for place, goal in enumerate(families[reference]):
            times, most = [], []
            for theirs, line in zip(goals, lines, strict=True):
                # The reference's own size too is the least that has this accuracy.
                needed = _needed(sizes(families[reference]), theirs, theirs[place])
                least = _needed(sizes(own), line, theirs[place])
                times.append(math.exp(needed - least))
                most.append(math.inf if theirs[place] <= line[0] else times[-1])
            tails = 0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2
            low = numpy.quantile(times[1:], tails[0], method="inverted_cdf")
            high = numpy.quantile(most[1:], tails[1], method="inverted_cdf")
            made.append(
                Saving(name, goal.method, times[0], float(low), float(high), math.isinf(most[0]))
            )
    return made


def _needed(sizes: Any, line: Any, goal: float) -> float:
    """Return the logarithm of the parameters from which on a curve reaches a goal, or infinity."""
    place = int(numpy.searchsorted(line, goal))
    if place == len(line):
        return math.inf
    if place == 0:
        return float(sizes[0])
    below, above = line[place - 1], line[place]
    share = (goal - below) / (above - below)
    return float(sizes[place - 1] + share * (sizes[place] - sizes[place - 1]))
