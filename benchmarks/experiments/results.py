"""The files of an experiment: every run as CSV, and beside it what the runs depend on."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import measuring

from experiments.experiment import Experiment
from experiments.runs import Row, source_digest

FOLDER = Path(__file__).parent / "results"
FIELDS = ("method", "family", "parameters", "rate", "scale", "seed", "chosen", "source")


def write(folder: Path, name: str, own: Experiment, rows: list[Row], *, whole: bool) -> None:
    """Write the rows; those of a part of the methods take the place of their former ones."""
    if not whole and (folder / f"{name}.csv").exists():
        new = {row["method"] for row in rows}
        kept = [row for row in read(folder, name)[1] if row["method"] not in new]
        order = {method.name: place for place, method in enumerate(own.methods)}
        rows = sorted([*kept, *rows], key=lambda row: order.get(row["method"], len(order)))
    folder.mkdir(parents=True, exist_ok=True)
    rest = [key for row in rows for key in row if key not in FIELDS]
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*FIELDS, *dict.fromkeys(rest)], lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _short(value) for key, value in row.items()} for row in rows)
    about = {
        **{"title": own.title, "task": own.task, "settings": dict(own.settings)},
        **{"rates": own.rates, "scales": own.scales, "trials": own.trials, "seeds": own.seeds},
        **{
            "metric": own.metric,
            "percent": own.percent,
            "reference": own.reference,
            "shown": own.shown,
        },
        "designs": {method.name: repr(method.design) for method in own.methods},
        "source": source_digest(own.task),
        "environment": measuring.facts(),
    }
    (folder / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")


def names() -> list[str]:
    """Return the experiments that have results."""
    return sorted(path.stem for path in FOLDER.glob("*.csv"))


def read(folder: Path, name: str) -> tuple[dict[str, Any], list[Row]]:
    """Return what the runs depend on, and the runs."""
    about = json.loads((folder / f"{name}.json").read_text("utf-8"))
    with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        rows = [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(file)]
    return about, rows


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _value(text: str) -> Any:
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text or None
