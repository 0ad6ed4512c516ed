"""Accuracy by the number of images of each digit: a search beside LoRA, trained as long."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

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
WITHOUT = {"candidate_test": "best with a name", "random_test": "random"}
"""Configurations of the same supernet that no search chose."""


def measured(folder: Path = results.FOLDER) -> dict[int, list[Row]]:
    """Return the runs of each number of images that has results."""
    return {
        count: taken([results.read(folder, name)[1] for name in names])
        for count, names in FILES.items()
        if all((folder / f"{name}.csv").exists() for name in names)
    }


def taken(files: Sequence[list[Row]]) -> list[Row]:
    """Return the runs of the methods, and of the search's supernet without a search."""
    rows: list[Row] = []
    for method in METHODS:
        own = ([row for row in file if row["method"] == method and row["chosen"]] for file in files)
        rows += next(each for each in own if each)
    searched = [row for row in rows if row["method"] == SEARCH]
    for column, name in WITHOUT.items():
        if all(row[column] is not None for row in searched):
            rows += [{**row, "method": name, "test": row[column]} for row in searched]
    return rows


def gain(found: Mapping[int, Sequence[Row]], method: str) -> tuple[float, float] | None:
    """Return by how much the search is above a method, over all numbers, and half the interval.

    Each run is compared with that of the same images. None where one is lacking.
    """
    gains = []
    for rows in found.values():
        tests = {(row["method"], row["seed"]): row["test"] for row in rows}
        own = [(seed, test) for (name, seed), test in tests.items() if name == SEARCH]
        if any((method, seed) not in tests for seed, _ in own):
            return None
        gains.append([test - tests[method, seed] for seed, test in own])
    values = numpy.array(gains)
    rest = values - values.mean(1, keepdims=True)
    freedom = values.size - len(values)
    error = math.sqrt(float((rest**2).sum()) / freedom / values.size)
    return float(values.mean()), error * float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom))


def table(found: Mapping[int, Sequence[Row]]) -> str:
    """Return the Markdown table: a line a method, a column a number of images."""
    lines = [
        f"| method | {' | '.join(map(str, found))} | the search is above it by |",
        f"|---|{'--:|' * (1 + len(found))}",
    ]
    every = {count: points(rows) for count, rows in found.items()}
    for name in (*METHODS, *WITHOUT.values()):
        cells = []
        for each in every.values():
            own = [point for point in each if point.method == name]
            cells += [f"{100 * p.mean:.1f} ± {100 * p.half:.1f}{'†' * p.alone}" for p in own] or [
                ""
            ]
        above = None if name == SEARCH else gain(found, name)
        cells.append(f"{100 * above[0]:.1f} ± {100 * above[1]:.1f}" if above else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: Mapping[int, Sequence[Row]], path: Path) -> None:
    """Draw accuracy against the number of images of each digit, a line a method."""
    figure, axes = figures.new(7, 4.2, xscale="log")
    every = {count: points(rows) for count, rows in found.items()}
    for place, name in enumerate((*METHODS, *WITHOUT.values())):
        own = {n: p for n, each in every.items() for p in each if p.method == name}
        axes.errorbar(
            [count * 1.02 ** (place - 2) for count in own],  # beside each other
            [100 * point.mean for point in own.values()],
            yerr=[100 * point.half for point in own.values()],
            **{"color": f"C{place}", "marker": "o", "markersize": 4, "linewidth": 1.2},
            **{"elinewidth": 0.8, "linestyle": ":" if name in WITHOUT.values() else "-"},
            label=name,
        )
    axes.set_xticks(list(found), list(map(str, found)))
    axes.set_xticks([], minor=True)
    axes.set_xlabel("images of each digit to train with")
    axes.set_ylabel("test accuracy, %")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    figures.save(figure, path, "shots")
