"""Show and write what was measured: a table, CSV, JSON and a plot."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from superlora.demo.methods import HEAD, LORA, Result, Settings

MARKERS = "so^"  # of the families in the plot


def pareto_front(results: Sequence[Result]) -> list[Result]:
    """Return the results that no other beats in accuracy with as few parameters, by parameters."""
    front: list[Result] = []
    for result in sorted(results, key=lambda item: (item.parameters, -item.test_accuracy)):
        if not front or result.test_accuracy > front[-1].test_accuracy:
            front.append(result)
    return front


def best_small(results: Sequence[Result]) -> Result | None:
    """Return the adapter of best validation accuracy among those smaller than LoRA of rank 1."""
    limit = min((item.parameters for item in results if item.family == LORA), default=0)
    small = [item for item in results if 0 < item.parameters < limit]
    return min(small, key=lambda item: (-item.validation_accuracy, item.parameters), default=None)


def new_table(title: str, caption: str) -> Table:
    """Return a table without columns."""
    return Table(title=title, caption=caption, title_justify="left", caption_justify="left")


def table(results: Sequence[Result], settings: Settings, best: Result | None) -> Table:
    """Return the table to print, a row a result; that of the best small adapter is marked."""
    shown = new_table(
        "ViT-S/14 on MNIST, query and value weights of all blocks",
        f"One seed ({settings.seed}); test accuracy on {settings.test:,} images after "
        f"{settings.epochs} epochs on {settings.train:,} at {settings.resolution} px. "
        "Every method trains the linear head too. Seconds are of training alone. "
        "> best on the validation part among the adapters smaller than LoRA r1.",
    )
    shown.add_column("method", no_wrap=True)
    for column in ("adapter\nparameters", "test\naccuracy", "seconds", "file\nbytes"):
        shown.add_column(column, justify="right")
    for item in results:
        shown.add_row(
            f"{'> ' if item is best else '  '}{item.method}",
            f"{item.parameters:,}",
            f"{item.test_accuracy:.2%}",
            f"{item.seconds:.1f}",
            f"{item.file_bytes:,}" if item.file_bytes else "-",
            style="bold" if item is best else None,
        )
    return shown


def write(results: Sequence[Result], about: dict[str, Any], folder: Path) -> None:
    """Write ``results.csv``, a row a result, and ``results.json`` with what they depend on."""
    rows = [dataclasses.asdict(item) for item in results]
    write_rows([rows[0], *(row.values() for row in rows)], folder / "results.csv")
    write_json({**about, "results": rows}, folder / "results.json")


def write_rows(rows: Iterable[Iterable[Any]], path: Path) -> None:
    """Write rows as CSV."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    _replace(path, text.getvalue())


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write JSON for people to read."""
    _replace(path, json.dumps(content, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    """Write a file at once: processes that share a search may write the same one."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, "utf-8", newline="")
    partial.replace(path)


def plot(results: Sequence[Result], settings: Settings, path: Path) -> None:
    """Draw test accuracy against the number of parameters, with the Pareto front, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, whatever the user's settings are
    axes = figure.add_subplot(xscale="log")

    def draw(shown: Sequence[Result], **style: Any) -> None:
        sizes = [item.parameters for item in shown]
        axes.plot(sizes, [100 * item.test_accuracy for item in shown], **style)

    adapters = [item for item in results if item.parameters]
    front = [item for item in pareto_front(results) if item.parameters]
    draw(front, color="#bbbbbb", linewidth=1.5, label="Pareto front", zorder=1)
    families = dict.fromkeys(item.family for item in adapters)
    for place, (family, marker) in enumerate(zip(families, MARKERS, strict=False)):
        members = [item for item in adapters if item.family == family]
        draw(members, color=f"C{place}", marker=marker, linestyle="", label=family, zorder=2)
        for item in members:
            axes.annotate(
                "" if item.rank is None else f"r{item.rank}",
                (item.parameters, 100 * item.test_accuracy),
                xytext=(5, -11),
                textcoords="offset points",
                fontsize=8,
                color=f"C{place}",
            )
    for item in results:
        if item.family == HEAD:
            label = f"head only, {item.test_accuracy:.1%}"
            axes.axhline(100 * item.test_accuracy, color="#999999", linestyle=":", label=label)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("adapter parameters")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"ViT-S/14 on MNIST: {settings.train:,} training images, one seed")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    figure.savefig(path, format="png", dpi=150)
