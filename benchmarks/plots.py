"""The plots of the benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

# Told apart by shape too, for those who see no colours.
STYLES = {
    "ours": ("#0072b2", "o"),
    "PEFT": ("#d55e00", "s"),
    "LyCORIS": ("#009e73", "^"),
    "LyCORIS bypass": ("#009e73", "v"),
    "torch": ("#666666", "D"),
}
# No date and no random identifiers, so that the same numbers make the same file.
matplotlib.rcParams["svg.hashsalt"] = "superlora"


def steps(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw each method's step over the limit's, with quartiles and targets."""
    rows = [row for row in rows if "over_limit" in row and row["library"] != "limit"]
    methods = list(dict.fromkeys(row["method"] for row in rows))[::-1]
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.27 * len(methods)))
    for index, (library, (colour, marker)) in enumerate(STYLES.items()):
        shift = 0.13 * (1.5 - index)  # so that spreads do not lie on each other
        own = [row for row in rows if row["library"] == library]
        if not own:
            continue
        values = [row["over_limit"] for row in own]
        spread = [
            [abs(row["over_limit"] - row[f"over_limit_{end}"]) for row in own]
            for end in ("low", "high")
        ]
        axes.errorbar(
            values,
            [methods.index(row["method"]) + shift for row in own],
            xerr=spread,
            fmt=marker,
            color=colour,
            fillstyle="none" if "bypass" in library else "full",
            markersize=5,
            elinewidth=1,
            label=library,
        )
    goals = [row for row in rows if "target" in row]
    if goals:
        axes.plot(
            [row["target"] for row in goals],
            [methods.index(row["method"]) for row in goals],
            linestyle="none",
            marker="|",
            markersize=13,
            color="black",
            label="target",
        )
    axes.axvline(1, color="#999999", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(-0.7, len(methods) - 0.3)
    axes.grid(axis="x", which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("time of a training step over that of the frozen trunk")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8, loc="best")
    _save(figure, path)


def scaling(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the time and the memory of a step against the model's size."""
    figure, both = pyplot.subplots(1, 2, figsize=(9, 3.6))
    measures = (("seconds", "s a step"), ("live_MB", "MB above model and adapter"))
    markers = "osD^v"
    for axes, (measure, label) in zip(both, measures, strict=True):
        for method, marker in zip(dict.fromkeys(row["method"] for row in rows), markers):  # noqa: B905
            own = [row for row in rows if row["method"] == method and measure in row]
            axes.plot(
                [row["model"] for row in own],
                [row[measure] for row in own],
                marker=marker,
                label=method,
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("parameters of the model")
        axes.set_ylabel(label)
        axes.grid(color="#dddddd", linewidth=0.6)
    both[0].legend(fontsize=8)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    figure.savefig(path, dpi=150, metadata=metadata)
    pyplot.close(figure)
