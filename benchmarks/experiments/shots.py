"""Accuracy by the number of images of each digit: a search beside LoRA, trained as long."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy
from scipy import stats

from experiments import figures, results
from experiments.analysis import CONFIDENCE, points
from experiments.runs import Row

# Those with four images were measured as two experiments; the first that has a method is taken.
FILES = {
    1: ("glora_shots_1",),
    4: ("glora_few_long", "glora_few"),
    16: ("glora_shots_16",),
}
SEARCH = "GLoRA {8, 4} ≤ 300,000"
METHODS = ("head only", "LoRA r2", "LoRA r4", SEARCH)
WITHOUT = {"best with a name": "candidate_test", "random": "random_test"}
"""Other configurations of the search's supernet, and the columns of its runs that have them."""


def measured(folder: Path = results.FOLDER) -> dict[int, list[Row]]:
    """Return the runs of each number of images that has results."""
    return {
        count: taken([results.read(folder, name)[1] for name in names])
        for count, names in FILES.items()
        if all((folder / f"{name}.csv").exists() for name in names)
    }


def taken(files: Sequence[list[Row]]) -> list[Row]:
    """Return the runs of the chosen rate of each method."""
    rows: list[Row] = []
    for method in METHODS:
        own = ([row for row in file if row["method"] == method and row["chosen"]] for file in files)
        found = next((each for each in own if each), None)
        if found is None:
            raise ValueError(f"results must have runs of {method}: got none")
        rows += found
    return rows


def accuracies(rows: Sequence[Row], name: str) -> dict[int, float]:
    """Return the test accuracy of each seed that has one."""
    method, column = (SEARCH, WITHOUT[name]) if name in WITHOUT else (name, "test")
    own = {row["seed"]: row[column] for row in rows if row["method"] == method}
    return {seed: value for seed, value in own.items() if value is not None}


def gain(found: Mapping[int, Sequence[Row]], name: str) -> tuple[float, float] | None:
    """Return by how much the search is above another, in the mean over all, and half its interval.

    The interval is over the seeds: a seed has the same test images at every number. None where a
    run is lacking, or there is one seed.
    """
    gains = []
    for rows in found.values():
        own, other = accuracies(rows, SEARCH), accuracies(rows, name)
        if len(own) < 2 or set(other) != set(own):
            return None
        gains.append([own[seed] - other[seed] for seed in own])
    means = numpy.array(gains).mean(0)
    quantile = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(means) - 1))
    return float(means.mean()), float(means.std(ddof=1)) / math.sqrt(len(means)) * quantile


def table(found: Mapping[int, Sequence[Row]]) -> str:
    """Return the Markdown table: a line a method, a column a number of images."""
    lines = [
        f"| method | {' | '.join(map(str, found))} | the search is above it by |",
        f"|---|{'--:|' * (1 + len(found))}",
    ]
    every = {count: {own.method: own for own in points(rows)} for count, rows in found.items()}
    for name in (*METHODS, *WITHOUT):
        cells = []
        for count, rows in found.items():
            if name in METHODS:
                own = every[count][name]
                mark = "†" if own.alone else ""
                cells.append(f"{100 * own.mean:.1f} ± {100 * own.half:.1f}{mark}")
            else:
                values = accuracies(rows, name).values()
                cells.append(f"{100 * fmean(values):.1f}" if values else "")
        above = None if name == SEARCH else gain(found, name)
        cells.append(f"{100 * above[0]:.1f} ± {100 * above[1]:.1f}" if above else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: Mapping[int, Sequence[Row]], path: Path) -> None:
    """Draw accuracy against the number of images of each digit, a line a method."""
    figure, axes = figures.new(7, 4.2, xscale="log")
    every = {count: {own.method: own for own in points(rows)} for count, rows in found.items()}
    for place, name in enumerate(METHODS):
        own = [each[name] for each in every.values()]
        axes.errorbar(
            [count * 1.02 ** (place - 1.5) for count in found],  # beside each other
            [100 * point.mean for point in own],
            yerr=[100 * point.half for point in own],
            **{"color": f"C{place}", "marker": "o", "markersize": 4, "linewidth": 1.2},
            **{"elinewidth": 0.8, "label": name},
        )
    for place, name in enumerate(WITHOUT, start=len(METHODS)):
        means = {n: accuracies(rows, name).values() for n, rows in found.items()}
        axes.plot(
            [count for count, values in means.items() if values],
            [100 * fmean(values) for values in means.values() if values],
            **{"color": f"C{place}", "linestyle": ":", "marker": ".", "label": name},
        )
    axes.set_xticks(list(found), list(map(str, found)))
    axes.set_xticks([], minor=True)
    axes.set_xlabel("images of each digit to train with")
    axes.set_ylabel("test accuracy, %")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    figures.save(figure, path, "shots")
