"""The numbers of the page that compares methods are what its script reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parent.parent / "docs"
RESULTS: dict[str, dict[str, Any]] = json.loads(
    (DOCS / "_static" / "experiments" / "results.json").read_text("utf-8")
)
POINT = {"method": str, "family": str, "parameters": int, "mean": float, "low": float}
POINT |= {"high": float, "seeds": int}


@pytest.mark.parametrize("name", RESULTS)
def test_each_experiment_is_what_the_script_reads(name: str) -> None:
    experiment = RESULTS[name]
    assert {"title", "metric", "points", "shown"} <= experiment.keys()
    assert set(experiment["shown"]) <= {point["family"] for point in experiment["points"]}
    assert experiment["points"]
    for point in experiment["points"]:
        assert {key: type(value) for key, value in point.items()} == POINT
        assert point["low"] <= point["mean"] <= point["high"]
        assert point["parameters"] >= 0
        assert point["seeds"] >= 1


@pytest.mark.parametrize("file", ["_static/experiments/results.json", "_static/compare.js"])
def test_the_page_holds_the_numbers_and_the_script(file: str) -> None:
    """It then works from a folder too, where a browser loads no second file."""
    assert f":file: {file}\n" in (DOCS / "compare.md").read_text("utf-8")
    assert "</script" not in (DOCS / file).read_text("utf-8")
