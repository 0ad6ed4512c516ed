"""What a search gains over its supernet's random configurations, and whether layers agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments import figures

Row = Mapping[str, Any]
Configuration = Mapping[str, Mapping[str, Any]]
"""The option of each operation, of each layer."""

SHIFT = "test_"
"""What the columns of shifted test images begin with."""


def searched(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the runs of the chosen rate of each method that is a search."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["chosen"] and row.get("searched"):
            found.setdefault(row["method"], []).append(row)
    return found


@dataclass(frozen=True)
class Agreement:
    """In how many of the choices all searches agree, and how many it were of shuffled layers."""

    choices: int
    agreed: int
    expected: float


def agreement(configurations: Sequence[Configuration]) -> Agreement:
    """Count the choices that several searches of one space have in common."""
    layers = list(configurations[0])
    agreed, expected = 0, 0.0
    operations = list(configurations[0][layers[0]])
    for operation in operations:
        chosen = [[str(own[layer][operation]) for layer in layers] for own in configurations]
        agreed += sum(len(set(options)) == 1 for options in zip(*chosen, strict=True))
        shares = [Counter(options) for options in chosen]
        for option in set.intersection(*map(set, chosen)):
            product = float(len(layers))
            for share in shares:
                product *= share[option] / len(layers)
            expected += product
    return Agreement(len(layers) * len(operations), agreed, expected)


def table(rows: Sequence[Row]) -> str:
    """Return the Markdown table of the searches, in means over the seeds that did not fail."""
    lines = [
        "| search | best found, validation % | test % | best named, test % | random, test % "
        "| supernet, s | search, s | choices agreed (of shuffled layers) |",
        f"|---|{'--:|' * 7}",
    ]
    for name, every in searched(rows).items():
        own = [row for row in every if not row["diverged"]]
        failed = len(every) - len(own)
        cells = [f"{name} ({failed} of {len(every)} failed)" if failed else name]
        columns = ("validation", "test", "candidate_test", "random_test")
        cells += [_mean(own, column, 100, 1) for column in columns]
        cells += [_mean(own, column, 1, 0) for column in ("seconds", "search_seconds")]
        cells.append(_agreed([row["configuration"] for row in own]) if len(own) > 1 else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _agreed(configurations: Sequence[Configuration]) -> str:
    found = agreement(configurations)
    return f"{found.agreed} of {found.choices} ({found.expected:.0f})"


def _mean(rows: Sequence[Row], column: str, factor: float, digits: int) -> str:
    """Return the mean of a column, or nothing where a run lacks it."""
    values = [row.get(column) for row in rows]
    if not values or None in values:
        return ""
    return f"{factor * fmean(values):.{digits}f}"


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw the mean training loss of every supernet by its epochs."""
    figure, axes = figures.new(7, 3.6, xscale="log", yscale="log")
    for name, every in searched(rows).items():
        curves = [row["epoch_losses"] for row in every if not row["diverged"]]
        losses = [fmean(values) for values in zip(*curves, strict=True)]
        axes.plot(range(1, len(losses) + 1), losses, label=name, linewidth=1.2)
    axes.set_xlabel("epoch")
    axes.set_ylabel("training loss of random configurations")
    figure.suptitle(title, fontsize=11)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    figures.save(figure, path, title)
