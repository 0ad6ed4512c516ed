"""Show and write what a search has found: a table, CSV and JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections import Counter
from pathlib import Path
from typing import Any

from rich.table import Table

from superlora.demo.report import replace_file, write_json
from superlora.search.outcome import Candidate, Outcome
from superlora.search.space import Configuration

SHOWN = 10


def chosen(configuration: Configuration) -> dict[str, dict[str, int]]:
    """Count how many layers have each option of each operation.

    Parameters
    ----------
    configuration : Configuration
        An option for every layer and operation.

    Returns
    -------
    dict of str to dict of str to int
        By operation and option.

    Examples
    --------
    >>> chosen({"a": {"add_weight": 4}, "b": {"add_weight": "none"}})
    {'add_weight': {'4': 1, 'none': 1}}
    """
    counts: dict[str, Counter[str]] = {}
    for options in configuration.values():
        for operation, option in options.items():
            counts.setdefault(operation, Counter())[str(option)] += 1
    return {operation: dict(counter) for operation, counter in counts.items()}


def table(outcome: Outcome, test_accuracy: float, name: str) -> Table:
    """Return the table to print.

    Parameters
    ----------
    outcome : Outcome
        What was evaluated.
    test_accuracy : float
        Of the best.
    name : str
        Of the search.

    Returns
    -------
    rich.table.Table
        The best candidates, the best first.
    """
    shown = Table(
        title=f"{name}: the best of {len(outcome.trials)} configurations",
        caption=(
            f"{test_accuracy:.2%} of the test images with the first, which is saved. At equal "
            "accuracy fewer parameters rank first. Those with a name were tried without a search."
        ),
        title_justify="left",
        caption_justify="left",
    )
    for column in ("rank", "parameters", "validation\naccuracy", "generation", "name"):
        shown.add_column(column, justify="left" if column == "name" else "right")
    for place, candidate in enumerate(outcome.ranked(len(outcome.trials)), start=1):
        if place > SHOWN and not candidate.label:
            continue
        shown.add_row(
            str(place),
            f"{candidate.num_parameters:,}",
            f"{candidate.value:.2%}",
            str(candidate.generation),
            candidate.label,
            style="bold" if place == 1 else None,
        )
    return shown


def write(outcome: Outcome, test_accuracy: float, folder: Path, about: dict[str, Any]) -> None:
    """Write ``ranked.csv``, all candidates, and ``results.json``, the best and the Pareto front.

    Parameters
    ----------
    outcome : Outcome
        What was evaluated.
    test_accuracy : float
        Of the best.
    folder : Path
        An existing folder.
    about : dict
        What the search was made with, as JSON values.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("rank", "value", "num_parameters", "generation", "index", "key", "name"))
    ranked = outcome.ranked(len(outcome.trials))
    for place, candidate in enumerate(ranked, start=1):
        writer.writerow(
            (
                place,
                candidate.value,
                candidate.num_parameters,
                candidate.generation,
                candidate.index,
                outcome.space.key(candidate.configuration),
                candidate.label,
            )
        )
    replace_file(folder / "ranked.csv", text.getvalue().encode())
    best = outcome.best
    content = {
        **about,
        "space": {
            "fingerprint": outcome.space.fingerprint,
            "ranks": list(outcome.space.ranks),
            "operations": {name: list(own) for name, own in outcome.space.operations.items()},
            "size": str(outcome.space.size),  # beyond what other readers of JSON can hold
            "least_parameters": outcome.space.least_parameters,
            "most_parameters": outcome.space.most_parameters,
        },
        "evaluated": len(outcome.trials),
        "best": {**dataclasses.asdict(best), "chosen": chosen(best.configuration)},
        "test_accuracy": test_accuracy,
        "front": [_short(candidate) for candidate in outcome.front()],
    }
    write_json(content, folder / "results.json")


def _short(candidate: Candidate) -> dict[str, Any]:
    return {
        "index": candidate.index,
        "value": candidate.value,
        "num_parameters": candidate.num_parameters,
    }
