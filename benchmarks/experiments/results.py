"""The files of an experiment: every run as CSV, and beside it what the runs depend on."""

from __future__ import annotations

import csv
import io
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import measuring

from experiments.experiment import Experiment
from experiments.runs import Row, source_digest

FOLDER = Path(__file__).parent / "results"
OPEN = ("metric", "shown", "title")  # what may be called otherwise
FIELDS = ("method", "family", "parameters", "rate", "scale", "seed", "chosen", "source")


def write(folder: Path, name: str, own: Experiment, rows: list[Row], *, whole: bool) -> None:
    """Write the rows; those of a part of the methods take the place of their former ones.

    Raises
    ------
    ValueError
        If the other methods' rows are there and were measured otherwise.
    """
    about = described(own)
    if not whole and (folder / f"{name}.csv").exists():
        before, known = read(folder, name)
        other = [key for key in about if key not in OPEN and before.get(key) != about[key]]
        if other:
            raise ValueError(
                f"{folder / name}.csv must be of the same experiment to take more methods: other "
                f"{', '.join(other)}; run it without --only"
            )
        new = {row["method"] for row in rows}
        order = {method.name: place for place, method in enumerate(own.methods)}
        kept = [row for row in known if row["method"] not in new and row["method"] in order]
        rows = sorted([*kept, *rows], key=lambda row: order[row["method"]])
    designs = {method.name: repr(method.design) for method in own.methods}
    about["designs"] = {name: designs[name] for name in dict.fromkeys(r["method"] for r in rows)}
    folder.mkdir(parents=True, exist_ok=True)
    rest = [key for row in rows for key in row if key not in FIELDS]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*FIELDS, *dict.fromkeys(rest)], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    _replace(folder / f"{name}.csv", text.getvalue())
    _replace(folder / f"{name}.json", json.dumps(about, indent=1) + "\n")


def described(own: Experiment) -> dict[str, Any]:
    """Return what the runs depend on, as JSON has it."""
    found = {
        **{"title": own.title, "task": own.task, "settings": dict(own.settings)},
        **{"rates": own.rates, "scales": own.scales, "choice": own.choice, "seeds": own.seeds},
        "confirm": own.confirm,
        **{"metric": own.metric, "percent": own.percent},
        **{"reference": own.reference, "shown": own.shown},
        "source": source_digest(own.task),
        "environment": {**measuring.facts(), "threads": 1, "optuna": metadata.version("optuna")},
    }
    made: dict[str, Any] = json.loads(json.dumps(found))
    return made


def _replace(path: Path, text: str) -> None:
    partial = path.with_suffix(f"{path.suffix}.partial")
    partial.write_text(text, "utf-8", newline="")
    partial.replace(path)


def names() -> list[str]:
    """Return the experiments that have results."""
    return sorted(path.stem for path in FOLDER.glob("*.csv"))


def read(folder: Path, name: str) -> tuple[dict[str, Any], list[Row]]:
    """Return what the runs depend on, and the runs."""
    about = json.loads((folder / f"{name}.json").read_text("utf-8"))
    with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        rows = [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(file)]
    return about, rows


def _cell(value: Any) -> Any:
    """Return what the CSV has of a value: lists and mappings as JSON."""
    return json.dumps(value) if isinstance(value, (list, dict)) else value


def _value(text: str) -> Any:
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text or None  # a name, or nothing
