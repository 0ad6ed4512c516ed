"""Show and write what was measured: a table, CSV, JSON and a plot."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from superlora.demo.points import (
    DENSE,
    FASTFOOD,
    HEAD,
    LORA,
    LORTA,
    ONE_HOT,
    PLANAR,
    SEPARABLE,
    Result,
    Settings,
)

COLOURS = {
    LORA: "#d55e00",
    PLANAR: "#0072b2",
    FASTFOOD: "#56b4e9",
    ONE_HOT: "#cc79a7",
    SEPARABLE: "#e69f00",
    LORTA: "#009e73",
    DENSE: "#555555",
}
MARKERS = {
    LORA: "s",
    PLANAR: "o",
    FASTFOOD: "v",
    ONE_HOT: "P",
    SEPARABLE: "X",
    LORTA: "^",
    DENSE: "D",
}
_BELOW = (5, -11)  # points from the marker
LABELS = {family: (-9, 7) if family == PLANAR else _BELOW for family in MARKERS}


def pareto_front(results: Sequence[Result]) -> list[Result]:
    """Return the results that no other beats in accuracy with as few parameters.

    Parameters
    ----------
    results : sequence of Result
        In any order.

    Returns
    -------
    list of Result
        By rising number of parameters, and so by rising test accuracy.
    """
    front: list[Result] = []
    for result in sorted(results, key=lambda item: (item.parameters, -item.test_accuracy)):
        if not front or result.test_accuracy > front[-1].test_accuracy:
            front.append(result)
    return front


def best_small(results: Sequence[Result]) -> Result | None:
    """Return the adapter of best validation accuracy among those smaller than LoRA of rank 1.

    Parameters
    ----------
    results : sequence of Result
        All points of a run.

    Returns
    -------
    Result or None
        Of equally good ones the smallest. None where no adapter is smaller.
    """
    limit = min((item.parameters for item in results if item.family == LORA), default=0)
    small = [item for item in results if 0 < item.parameters < limit]
    return min(small, key=lambda item: (-item.validation_accuracy, item.parameters), default=None)


@dataclasses.dataclass(frozen=True)
class Reach:
    """The smallest adapter of a family that is as accurate on the test part as a LoRA.

    Parameters
    ----------
    family : str
        Which adapters.
    target : Result
        The LoRA.
    result : Result or None
        None where the family doesn't reach it.
    """

    family: str
    target: Result
    result: Result | None

    def sentence(self) -> str:
        """Return the comparison in words."""
        goal = (
            f"{self.target.method}'s {self.target.test_accuracy:.2%} "
            f"({self.target.parameters:,} parameters)"
        )
        if self.result is None:
            return f"{self.family}: {goal} not reached"
        ours, theirs = self.result.parameters, self.target.parameters
        if ours < theirs:
            share = f"{theirs / ours:.1f} times fewer"
        else:
            share = f"{ours / theirs:.1f} times as many"
        return (
            f"{self.family}: reaches {goal} with {self.result.parameters:,} "
            f"(rank {self.result.rank}, {self.result.test_accuracy:.2%}), {share}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        return {
            "family": self.family,
            "target": self.target.method,
            "target_parameters": self.target.parameters,
            "target_test_accuracy": self.target.test_accuracy,
            "reached_with_parameters": None if self.result is None else self.result.parameters,
            "reached_with_rank": None if self.result is None else self.result.rank,
        }


def reaches(results: Sequence[Result]) -> list[Reach]:
    """Compare the one-group families with every LoRA of a run.

    Parameters
    ----------
    results : sequence of Result
        All points of a run.

    Returns
    -------
    list of Reach
        One for each family and LoRA.
    """
    found = []
    for family in dict.fromkeys(item.family for item in results if item.rank):
        if family == LORA:
            continue
        for target in (item for item in results if item.family == LORA):
            good = [
                item
                for item in results
                if item.family == family and item.test_accuracy >= target.test_accuracy
            ]
            smallest = min(good, key=lambda item: item.parameters, default=None)
            found.append(Reach(family, target, smallest))
    return found


def table(results: Sequence[Result], settings: Settings, best: Result | None) -> Table:
    """Return the table to print.

    Parameters
    ----------
    results : sequence of Result
        One row each.
    settings : Settings
        For the caption.
    best : Result or None
        Its row is marked.

    Returns
    -------
    rich.table.Table
        To be printed by a rich console.
    """
    shown = Table(
        title="ViT-S/14 on MNIST, query and value weights of all blocks",
        caption=(
            f"One seed ({settings.seed}); test accuracy on {settings.test:,} images after "
            f"{settings.epochs} epochs on {settings.train:,} at {settings.resolution} px. "
            "Every method trains the linear head too. Seconds are of training alone, "
            "* measured in an earlier run. > best on the validation part among the adapters "
            "smaller than LoRA r1."
        ),
        title_justify="left",
        caption_justify="left",
    )
    shown.add_column("method", no_wrap=True)
    for column in ("adapter\nparameters", "test\naccuracy", "seconds", "file\nbytes"):
        shown.add_column(column, justify="right")
    for item in results:
        chosen = best is not None and item.key == best.key
        shown.add_row(
            f"{'> ' if chosen else '  '}{item.method}",
            f"{item.parameters:,}",
            f"{item.test_accuracy:.2%}",
            f"{item.seconds:.1f}{'*' if item.cached else ' '}",
            f"{item.file_bytes:,}" if item.file_bytes else "-",
            style="bold" if chosen else None,
        )
    return shown


def write_csv(results: Sequence[Result], path: Path) -> None:
    """Write one row a result, with a header of the fields' names.

    Parameters
    ----------
    results : sequence of Result
        In the order of the rows.
    path : Path
        Replaced at once, never half written.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(
        text, [field.name for field in dataclasses.fields(Result)], lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(dataclasses.asdict(item) for item in results)
    replace_file(path, text.getvalue().encode())


def write_json(content: Any, path: Path) -> None:
    """Write JSON, indented.

    Parameters
    ----------
    content : JSON value
        What to write.
    path : Path
        Replaced at once, never half written.
    """
    replace_file(path, (json.dumps(content, indent=2) + "\n").encode())


def plot(results: Sequence[Result], settings: Settings, path: Path) -> None:
    """Draw test accuracy against the number of parameters, with the Pareto front.

    Parameters
    ----------
    results : sequence of Result
        All points of a run.
    settings : Settings
        For the title.
    path : Path
        A PNG file; replaced at once, never half written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, whatever the user's settings are
    axes = figure.add_subplot(xscale="log")
    adapters = [item for item in results if item.parameters]
    front = [item for item in pareto_front(results) if item.parameters]
    axes.plot(
        [item.parameters for item in front],
        [100 * item.test_accuracy for item in front],
        color="#bbbbbb",
        linewidth=1.5,
        label="Pareto front",
        zorder=1,
    )
    for family in COLOURS:
        members = [item for item in adapters if item.family == family]
        axes.plot(
            [item.parameters for item in members],
            [100 * item.test_accuracy for item in members],
            linestyle="",
            marker=MARKERS[family],
            markersize=7,
            color=COLOURS[family],
            label=family if members else "_",
            zorder=2,
        )
    for item in adapters:
        if item.rank is not None:
            axes.annotate(
                f"r{item.rank}",
                (item.parameters, 100 * item.test_accuracy),
                xytext=LABELS[item.family],
                textcoords="offset points",
                fontsize=8,
                color=COLOURS[item.family],
            )
    for item in results:
        if item.family == HEAD:
            axes.axhline(
                100 * item.test_accuracy,
                color="#999999",
                linestyle=":",
                linewidth=1.2,
                label=f"head only, {item.test_accuracy:.1%}",
            )
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("adapter parameters")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(
        f"ViT-S/14 on MNIST: {settings.train:,} training images, one seed", loc="left", fontsize=11
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eeeeee", zorder=0)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    replace_file(path, picture.getvalue())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file at once, never half.

    Parameters
    ----------
    path : Path
        Replaced if it exists.
    content : bytes
        Of the file.
    """
    # A name of its own: processes that share a search may write the same file.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)
