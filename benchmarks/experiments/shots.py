"""Accuracy by the number of images of each digit: a search beside LoRA, trained as long."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import figures, results
from experiments.analysis import Point, points

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


def measured(folder: Path = results.FOLDER) -> dict[int, list[Point]]:
    """Return the points of each number of images that has results."""
    found = {}
    for count, names in FILES.items():
        if all((folder / f"{name}.csv").exists() for name in names):
            files = [results.read(folder, name)[1] for name in names]
            found[count] = points(taken(files))
    return found


def taken(files: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the runs of the methods, and of the search's supernet without a search."""
    rows: list[dict[str, Any]] = []
    for method in METHODS:
        own = ([row for row in file if row["method"] == method and row["chosen"]] for file in files)
        rows += next(each for each in own if each)
    searched = [row for row in rows if row["method"] == SEARCH]
    for column, name in WITHOUT.items():
        if all(row[column] is not None for row in searched):
            rows += [{**row, "method": name, "test": row[column]} for row in searched]
    return rows


def table(found: dict[int, list[Point]]) -> str:
    """Return the Markdown table: a line a method, a column a number of images."""
    lines = [
        f"| method | {' | '.join(map(str, found))} |",
        f"|---|{'--:|' * len(found)}",
    ]
    for name in (*METHODS, *WITHOUT.values()):
        cells = []
        for every in found.values():
            own = [point for point in every if point.method == name]
            cells += [f"{100 * p.mean:.1f} ± {100 * p.half:.1f}{'†' * p.alone}" for p in own] or [
                ""
            ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: dict[int, list[Point]], path: Path) -> None:
    """Draw accuracy against the number of images of each digit, a line a method."""
    figure, axes = figures.new(7, 4.2, xscale="log")
    for place, name in enumerate((*METHODS, *WITHOUT.values())):
        own = {n: p for n, every in found.items() for p in every if p.method == name}
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
