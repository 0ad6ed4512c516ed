"""The results as tables of the docs: Markdown between markers, figures in ``docs/_static``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import plots

DOCS = Path(__file__).parent.parent / "docs"
sys.path.append(str(DOCS))
from tables import replaced  # noqa: E402  (lies beside the docs)

PAGE = DOCS / "performance.md"  # and the pages in the folder beside it
Row = dict[str, Any]
PEERS = ("PEFT", "LyCORIS", "LyCORIS bypass")
WORDS = {True: "met", False: "not met", None: ""}


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, its first column to the left and the others to the right."""
    lines = [f"| {' | '.join(heads)} |", "|---|" + "--:|" * (len(heads) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def number(value: float | None, digits: int = 2) -> str:
    """Return a number with so many digits after the point, or nothing."""
    return "" if value is None else f"{value:,.{digits}f}"


def spread(row: Row | None, name: str, digits: int = 2) -> str:
    """Return a median with its quartiles."""
    if not row or name not in row:
        return ""
    low, high = (number(row[f"{name}_{end}"], digits) for end in ("low", "high"))
    return f"{number(row[name], digits)} ({low} to {high})"


def _by_method(rows: list[Row]) -> dict[str, dict[str, Row]]:
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["method"], {})[row["library"]] = row
    return found


def step_times(rows: list[Row]) -> str:
    """Return the table of times over the limit's, ours beside each peer's."""
    lines = []
    for method, by_library in _by_method(rows).items():
        if "limit" in by_library:
            continue
        ours = by_library.get("ours")
        peers = [by_library.get(peer) for peer in PEERS]
        beside = [(ours or {}).get(f"over {peer}") for peer in PEERS]
        worst = max((value for value in beside if value is not None), default=None)
        counts = [row["parameters"] for row in by_library.values() if "parameters" in row]
        lines.append(
            [
                method,
                f"{counts[0]:,}" if counts else "",
                spread(ours, "over_limit"),
                number((ours or {}).get("target")),
                WORDS[(ours or {}).get("met")],
                *(number((peer or {}).get("over_limit")) for peer in peers),
                number(worst),
            ]
        )
    heads = [
        "method",
        "parameters",
        "ours (quartiles)",
        "target",
        "",
        *PEERS,
        "ours / fastest peer",
    ]
    found = table(heads, lines)
    limit = next(row for row in rows if row["library"] == "limit")
    plain = [row for row in rows if row["library"] == "torch"]
    notes = [f"A step of the frozen trunk takes {limit['seconds']:.3f} s here."]
    notes += [
        f"With the layers' own weights trained it takes {number(row['over_limit'])} times that."
        for row in plain
        if "over_limit" in row
    ]
    name = limit["setting"]
    alt = "Steps over the frozen trunk's, by method and library"
    figure = f"![{alt}](../_static/step-{name}.svg)"
    return f"{found}\n\n{' '.join(notes)}{_failures(rows)}\n\n{figure}"


def _failures(rows: list[Row]) -> str:
    failed = [f"{row['library']} {row['method']}" for row in rows if "failed" in row]
    return f" Did not run: {', '.join(failed)}." if failed else ""


def step_memory(rows: list[Row]) -> str:
    """Return the table of peaks above model and adapter, live and resident."""

    def cell(row: Row | None) -> str:
        if not row or "live_MB" not in row:
            return number((row or {}).get("gpu_MB"), 0)
        return f"{number(row['live_MB'], 0)} / {number(row['resident_MB'], 0)}"

    lines = []
    for method, by_library in _by_method(rows).items():
        ours = by_library.get("ours") or by_library.get("limit") or {}
        over, goal = ours.get("memory_over"), ours.get("memory_target")
        judged = [number(over), number(goal, 1), WORDS[ours.get("memory_met")]]
        cells = [cell(by_library.get(peer)) for peer in PEERS]
        if not any(cells) and not cell(ours):
            continue
        name = f"{method}, the limit" if "limit" in by_library else method
        lines.append([name, cell(ours), *judged, *cells])
    if not lines:
        return "Not measured."
    return table(["method", "ours", "over its measure", "target", "", *PEERS], lines)


# The rows of the first table: the methods that the peers have, and each kind of the others.
SUMMARY = (
    "dense",
    "LoRA r8",
    "LoKr r8",
    "LoHa r8",
    "VeRA r8",
    "FourierFT n1000",
    "GLoRA r8",
    "2-D aligned r8",
    "LoRTA 3-D aligned r8",
    "2-D balanced r8",
    "2-D + separable",
    "2-D + one-hot",
    "2-D + fastfood, stacked",
)


def step_summary(vit: list[Row], llama: list[Row]) -> str:
    """Return the medians of some rows on both models, with the Llama's resident memory."""
    models = [_by_method(vit), _by_method(llama)]

    def cell(model: int, method: str, library: str, measure: str, digits: int) -> str:
        row = models[model].get(method, {}).get(library, {})
        return number(row.get(measure), digits)

    lines = []
    for method in SUMMARY:
        columns = [(0, "over_limit", 2), (1, "over_limit", 2), (1, "resident_MB", 0)]
        lines.append(
            [
                method,
                *(
                    cell(model, method, library, measure, digits)
                    for model, measure, digits in columns
                    for library in ("ours", "PEFT")
                ),
            ]
        )
    heads = ["", "ViT-B/16, step", "PEFT", "Llama, step", "PEFT", "Llama, memory in MB", "PEFT"]
    return table(heads, lines)


def compiled(rows: list[Row]) -> str:
    """Return the table of compiled steps over the compiled limit's."""
    return table(
        ["method", "over the compiled limit (quartiles)"],
        (
            [row["method"], spread(row, "over_limit") if "failed" not in row else "did not compile"]
            for row in rows
        ),
    )


def decoding(rows: list[Row]) -> str:
    """Return the table of one layer at one token, without gradients."""
    lines = [
        [
            f"{row['method']}, width {row['width']}",
            *(number(row[key], 0) for key in ("base_us", "us", "peft_us")),
            number(row.get("over_peft")),
            # What is promised is promised of the first width.
            *(
                (number(row.get("target"), 1), WORDS[row.get("met")])
                if row["width"] == 256
                else ("", "")
            ),
        ]
        for row in rows
    ]
    return table(["layer", "base, µs", "ours above it", "PEFT", "ours / PEFT", "target", ""], lines)


def merging(rows: list[Row]) -> str:
    """Return the table of merging and of files, in milliseconds."""

    def ms(row: Row, part: str) -> str:
        return number(1e3 * row[part], 1) if part in row else ""

    def left(row: Row) -> str:
        return "exactly" if row["left_over"] == 0 else f"to {row['left_over']:.0e}"

    lines = [
        [
            f"{row['library']}, {row['method']}",
            *(ms(row, part) for part in ("merge", "unmerge", "copy", "form")),
            spread(row, "merge_over"),
            WORDS[row.get("met")],
            left(row),
            *(ms(row, part) for part in ("save", "write", "load", "read")),
            f"{row['bytes']:,}",
        ]
        for row in rows
    ]
    heads = ["adapter", "merge", "unmerge", "copy", "forming", "(merge − forming) / copy"]
    heads += ["", "weights back", "save", "bare write", "load", "bare read", "bytes"]
    return table(heads, lines)


def planning(rows: list[Row]) -> str:
    """Return the table of plans, a line a method."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["method"], {})[row["model"]] = row
    lines = []
    for method, by_model in found.items():
        if any("failed" in row for row in by_model.values()):
            continue
        own = [by_model[model] for model in models]
        large = by_model["70B"]
        lines.append(
            [
                method,
                " / ".join(number(1e3 * row["seconds"], 0) for row in own),
                " / ".join(number(row["peak_MB"], 1) for row in own),
                WORDS[all(row["met"] for row in own)],
                f"{large['parameters']:,}",
                f"{large['parameters'] / large['dense']:.5%}",
                f"{large['bytes'] / 1e6:,.2f}",
            ]
        )
    names = " / ".join(models)
    heads = ["method", f"ms for {names}", f"peak MB for {names}", "", "parameters at 70B"]
    return table([*heads, "of dense", "MB in float32"], lines)


def scaling(rows: list[Row]) -> str:
    """Return the table of steps against the size of the model."""
    sizes = sorted({row["model"] for row in rows})
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = {row["model"]: row for row in rows if row["method"] == method}
        for name, measure, digits in (("s", "seconds", 3), ("live MB", "live_MB", 0)):
            cells = [number(own[size].get(measure), digits) for size in sizes]
            lines.append([f"{method}, {name}", *cells])
    found = table(["", *(f"{size / 1e6:,.0f} M" for size in sizes)], lines)
    alt = "Time and memory of a step against the model's parameters"
    return f"{found}\n\n![{alt}](../_static/scale-step.svg)"


def lines_of(about: Row) -> str:
    """Return the table of straight lines and their value at 70 billion."""
    names = {"seconds": "s", "live_MB": "MB"}
    found = [
        [
            f"{fit['method']}, {names[fit['measure']]}",
            number(1e9 * fit["slope"], 2),
            number(fit["intercept"], 3),
            number(fit["r2"], 4),
            number(fit["at_70B"], 0),
        ]
        for fit in about["fits"]
    ]
    heads = ["", "for each billion parameters", "plus", "R²", "extrapolated to 70 billion"]
    assumed = "; ".join(about["assumptions"])
    return f"{table(heads, found)}\n\nAssumed: {assumed}."


def swapping(rows: list[Row]) -> str:
    """Return the table of changing adapters."""
    return table(
        ["", "ms (quartiles)", "target", "", "over one by one"],
        (
            [
                f"{row['what']}, {row['method']}",
                spread(row, "ms"),
                number(row.get("target"), 0),
                WORDS[row.get("met")],
                number(row.get("over_one_by_one")),
            ]
            for row in rows
        ),
    )


def machine(about: Row) -> str:
    """Return a line about what was measured with."""
    gpu = f"{about['gpu']}, " if "gpu" in about else ""
    return (
        f"Measured with {gpu}{about['threads']} threads, {about['processor']}, with "
        f"{about['cores']} cores, torch {about['torch']}, transformers {about['transformers']}, "
        f"PEFT {about['peft']}, LyCORIS {about['lycoris-lora']} and Python {about['python']}."
    )


# Name of a results file -> the tables made of it, by their markers' names.
Make = Callable[[Row], str]
TABLES: dict[str, dict[str, Make]] = {
    **{
        f"step-{name}": {
            f"step-{name}-time": lambda found: step_times(found["rows"]),
            f"step-{name}-memory": lambda found: step_memory(found["rows"]),
        }
        for name in ("vit", "llama", "smollm-1x128", "smollm-8x128")
    },
    "step-vit-compiled": {"step-vit-compiled": lambda found: compiled(found["rows"])},
    "step-llama-compiled": {"step-llama-compiled": lambda found: compiled(found["rows"])},
    "decode": {"decode": lambda found: decoding(found["rows"])},
    "merge-vit": {"merge-vit": lambda found: merging(found["rows"])},
    "merge-llama": {"merge-llama": lambda found: merging(found["rows"])},
    "scale-plan": {"scale-plan": lambda found: planning(found["rows"])},
    "scale-step": {
        "scale-step": lambda found: scaling(found["rows"]),
        "scale-fit": lambda found: lines_of(found["about"]),
    },
    "scale-swap": {"scale-swap": lambda found: swapping(found["rows"])},
}


def rewrite(results: Path, page: Path = PAGE, figures: Path = DOCS / "_static") -> list[str]:
    """Put what lies in the folder into the page and those beside it; return what was not there."""
    pages = {path: path.read_text("utf-8") for path in pages_of(page)}
    missing, steps = [], {}

    def put(marker: str, text: str) -> None:
        own = next(path for path, content in pages.items() if f"<!-- {marker} -->\n" in content)
        pages[own] = replaced(pages[own], marker, text)

    for name, tables in TABLES.items():
        file = results / f"{name}.json"
        if not file.exists():
            missing.append(name)
            continue
        found = json.loads(file.read_text("utf-8"))
        for marker, make in tables.items():
            put(marker, make(found))
        if name == "step-llama":
            put("machine", machine(found["about"]))
        if name.startswith("step-") and not name.endswith("-compiled"):
            steps[name] = found["rows"]
            plots.steps(found["rows"], found["about"]["setting"], figures / f"{name}.svg")
        if name == "scale-step":
            plots.scaling(found["rows"], figures / f"{name}.svg")
    if {"step-vit", "step-llama"} <= steps.keys():
        put("step-summary", step_summary(steps["step-vit"], steps["step-llama"]))
    for path, text in pages.items():
        path.write_text(text, "utf-8")
    return missing


def pages_of(page: Path = PAGE) -> list[Path]:
    """Return the page and those of the folder of its name, on one of which each marker lies."""
    return [page, *sorted(page.with_suffix("").glob("*.md"))]
