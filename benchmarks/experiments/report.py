"""Every figure and table of the experiments, from the files of their results."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import figures, geometry, results, searches, shots
from experiments.analysis import Point, Saving, front, front_shares, points, savings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FIGURES = DOCS / "_static" / "experiments"
GEOMETRY = results.FOLDER / "geometry.json"
PAGES = (ROOT / "README.md", *DOCS.glob("*.md"), *(DOCS / "experiments").glob("*.md"))
sys.path.append(str(DOCS))
from tables import replaced  # noqa: E402  (lies beside the docs)

FIRST = "digits"  # the experiment that the README shows, with a short table
MARKERS = "osv^D<>pPX*h"


def shown(value: float, about: dict[str, Any]) -> str:
    """Return a value of the metric as it is printed."""
    return f"{100 * value:.1f}" if about["percent"] else f"{value:.3f}"


def metric(about: dict[str, Any]) -> str:
    """Return the metric with its unit."""
    return f"{about['metric']}, %" if about["percent"] else str(about["metric"])


def name_of(point: Point, *, bold: bool = False) -> str:
    """Return a method's name, and how many of its seeds failed."""
    name = f"**{point.method}**" if bold else point.method
    return f"{name} ({point.failed} of {point.seeds} failed)" if point.failed else name


def mark(point: Point) -> str:
    """Return the mark of an interval of its own."""
    return "†" if point.alone else ""


def table(found: Sequence[Point], about: dict[str, Any]) -> str:
    """Return the Markdown table of all methods."""
    scaled = len(about["scales"]) > 1
    columns = ["parameters", metric(about), "on the front, %", "rate"]
    columns += [*(["scale"] if scaled else []), "training, s"]
    lines = [f"| method | {' | '.join(columns)} |", f"|---|{'--:|' * len(columns)}"]
    best = {point.method for point in front(found)}
    shares = front_shares(found)
    for point in found:
        name = name_of(point, bold=point.method in best)
        value = f"{shown(point.mean, about)} ± {shown(point.half, about)}{mark(point)}"
        share = f"{100 * shares[point.method]:.0f}" if shares else ""
        cells = [name, f"{point.parameters:,}", value, share, f"{point.rate:.2g}"]
        cells += [*([f"{point.scale:g}"] if scaled else []), f"{point.seconds:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def times(own: Saving) -> str:
    """Say how many times fewer parameters, with the interval."""

    def said(value: float) -> str:
        return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"

    number = f"{'≥ ' if own.beyond else ''}{said(own.times)}" if own.times else "not reached"
    if own.high == 0:
        return number
    if own.high == float("inf"):
        return f"{number} ({said(own.low)} or more)" if own.low else f"{number} (not known)"
    between = f"{said(own.low)} to {said(own.high)}" if own.low else f"at most {said(own.high)}"
    return f"{number} ({between})"


def savings_table(found: Sequence[Saving], *, short: bool = False) -> str:
    """Return the Markdown table of the parameters at equal accuracy, the surest saving first.

    A short one has those that reach no accuracy in one line, with the widest interval of them.
    """
    references = list(dict.fromkeys(own.reference for own in found))
    lines = [
        f"| family | {' | '.join(references)} |",
        f"|---|{'--:|' * len(references)}",
    ]
    families: dict[str, list[Saving]] = {}
    for own in found:
        families.setdefault(own.family, []).append(own)
    without = [name for name, own in families.items() if not any(each.times for each in own)]
    sure = {name: -sum(each.low for each in own) for name, own in families.items()}
    for name in sorted(families, key=lambda name: sure[name]):
        if not short or name not in without:
            cells = [times(own) for own in families[name]]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    if short and without:
        widest = [
            max((families[name][place] for name in without), key=lambda own: own.high)
            for place in range(len(references))
        ]
        lines.append(f"| {', '.join(without)} | {' | '.join(map(times, widest))} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Column:
    """A column of the results, and how a table shows it."""

    key: str
    title: str
    unit: float = 1.0
    digits: int = 1


SCORES = (
    Column("accuracy", "read as the digits that they should be, %", 100.0),
    *(Column(own, title) for own, title in (("bleu", "BLEU"), ("meteor", "METEOR"))),
    *(Column("rouge_l", "ROUGE-L"), Column("nist", "NIST", digits=2)),
    Column("cider", "CIDEr", digits=2),
)


def shifts(rows: Sequence[dict[str, Any]]) -> list[Column]:
    """Return the columns of the test images, as they are and by each shift; none without any."""
    names = [key.removeprefix(searches.SHIFT) for key in rows[0] if key.startswith(searches.SHIFT)]
    own = [Column(f"{searches.SHIFT}{name}", f"{name}, %", 100.0) for name in names]
    return [Column("test", "as it is, %", 100.0), *own] if own else []


def columns_table(rows: Sequence[dict[str, Any]], columns: Sequence[Column]) -> str:
    """Return the Markdown table of some columns, with their intervals."""
    found = [points([{**row, "test": row[own.key]} for row in rows]) for own in columns]
    lines = [
        f"| method | {' | '.join(own.title for own in columns)} |",
        f"|---|{'--:|' * len(columns)}",
    ]
    for line in zip(*found, strict=True):
        cells = [
            f"{own.unit * point.mean:.{own.digits}f} ± {own.unit * point.half:.{own.digits}f}"
            f"{mark(point)}"
            for own, point in zip(columns, line, strict=True)
        ]
        lines.append(f"| {name_of(line[0])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: Sequence[Point], about: dict[str, Any], path: Path) -> None:
    """Draw accuracy against parameters, a curve a family, with intervals and the Pareto front."""
    figure, axes = figures.new(8, 5.2, xscale="log")
    # One that failed with every seed would press all others together; the table has it.
    sized = [point for point in found if point.parameters and point.failed < point.seeds]
    unit = 100 if about["percent"] else 1
    best = front(sized)
    axes.plot(
        [point.parameters for point in best],
        [unit * point.mean for point in best],
        **{"color": "#cccccc", "linewidth": 5, "zorder": 0, "label": "Pareto front"},
    )
    families = dict.fromkeys(point.family for point in sized)
    coloured = [family for family in about["shown"] if family in families]
    for family in [*coloured, *(name for name in families if name not in coloured)]:
        own = sorted(
            (point for point in sized if point.family == family), key=lambda p: p.parameters
        )
        named = family in coloured
        place = coloured.index(family) if named else 0
        axes.errorbar(
            [point.parameters for point in own],
            [unit * point.mean for point in own],
            yerr=[unit * point.half for point in own] if named else None,
            color=f"C{place % 10}" if named else "#999999",
            marker=MARKERS[place % len(MARKERS)] if named else ".",
            label=family if named else None,
            linewidth=1.2 if named else 0,
            zorder=2 if named else 1,
            elinewidth=0.8,
            markersize=5,
        )
    axes.plot([], [], ".", color="#999999", label="others")
    for point in found:
        if not point.parameters:
            label = f"{point.method}, {shown(point.mean, about)}"
            axes.axhline(unit * point.mean, color="#999999", linestyle=":", label=label)
    axes.set_xlabel("trained parameters of the adapter")
    axes.set_ylabel(metric(about))
    figure.suptitle(about["title"], fontsize=11)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=4)
    figures.save(figure, path, about["title"])


@functools.cache
def texts() -> dict[str, str]:
    """Return what stands between the markers of the docs and the README."""
    made = {}
    for name in results.names():
        about, rows = results.read(results.FOLDER, name)
        found = points(rows)
        saved = savings(found, about["reference"])
        made[f"{name}-table"] = table(found, about)
        if name == FIRST:
            main = [own for own in saved if own.family in about["shown"]]
            made[f"{name}-savings"] = savings_table(main, short=True)
        if saved:
            made[f"{name}-all-savings"] = savings_table(saved)
        made[f"{name}-environment"] = environment(about, rows)
        if shifted := shifts(rows):
            made[f"{name}-shifts"] = columns_table(rows, shifted)
        if scores := [own for own in SCORES if own.key in rows[0]]:
            made[f"{name}-scores"] = columns_table(rows, scores)
        if searches.searched(rows):
            made[f"{name}-searches"] = searches.table(rows)
    if measured := shots.measured():
        made["glora-shots"] = shots.table(measured)
    if GEOMETRY.exists():
        made["geometry-overlaps"] = geometry.overlaps(geometry.read())
        made["geometry-table"] = geometry.table(geometry.read())
    return made


def environment(about: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Return a line about what was measured with."""
    own = about["environment"]
    count = len({(row["method"], row["rate"], row["scale"], row["seed"]) for row in rows})
    return (
        f"{count} runs, one thread each, on {own['cores']} cores ({own['processor']}); torch "
        f"{own['torch']}, Python {own['python']}."
    )


def comparison() -> dict[str, Any]:
    """Return all experiments' points, for the interactive page."""
    made: dict[str, Any] = {}
    for name in results.names():
        about, rows = results.read(results.FOLDER, name)
        found = points(rows)
        families = {own.family for own in found}
        # One that failed with every seed would press all others together.
        trained = [own for own in found if own.failed < own.seeds]
        alone = [own.family for own in trained if not own.parameters or own.family == "dense"]
        made[name] = {
            "title": about["title"],
            "metric": about["metric"],
            "interval": "mean over the seeds; 95 % interval, to compare methods",
            "shown": [*(own for own in about["shown"] if own in families), *alone],  # at first
            "points": [
                {
                    "method": point.method,
                    "family": point.family,
                    "parameters": point.parameters,
                    "mean": round(point.mean, 5),
                    "low": round(point.mean - point.half, 5),
                    "high": round(point.mean + point.half, 5),
                    "seeds": point.seeds,
                }
                for point in found
            ],
        }
    return made


def drawn() -> dict[str, Callable[[Path], None]]:
    """Return what draws each figure, by its name."""
    made: dict[str, Callable[[Path], None]] = {}
    for name in results.names():
        about, rows = results.read(results.FOLDER, name)
        made[name] = functools.partial(draw, points(rows), about)
        if searches.searched(rows):
            made[f"{name}-training"] = functools.partial(searches.draw, rows, about["title"])
    if measured := shots.measured():
        made["glora-shots"] = functools.partial(shots.draw, measured)
    if GEOMETRY.exists():
        made["geometry"] = functools.partial(geometry.draw, geometry.read())
    return made


def write() -> list[Path]:
    """Write the figures and tables that pages show and the interactive page's numbers.

    Return the files.
    """
    written = []
    pages = "".join(page.read_text("utf-8") for page in PAGES)
    for name, make in drawn().items():
        if f"/{name}.svg" in pages:
            make(FIGURES / f"{name}.svg")
            written.append(FIGURES / f"{name}.svg")
    made = texts()
    for page in PAGES:
        before = text = page.read_text("utf-8")
        for marker, content in made.items():
            if f"<!-- {marker} -->" in text:
                text = replaced(text, marker, content)
        if text != before:
            page.write_text(text, "utf-8")
            written.append(page)
    file = FIGURES / "results.json"
    file.write_text(json.dumps(comparison(), indent=1, allow_nan=False) + "\n", "utf-8")
    return [*written, file]
