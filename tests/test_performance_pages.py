"""The pages of performance have the tables that the benchmarks write, and agree with each other."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not (ROOT / "benchmarks").is_dir():
        pytest.skip("the benchmarks are not part of an installed package")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("report")


def cells(text: str, marker: str) -> dict[str, list[str]]:
    """Return the rows of a table by their first cell."""
    body = text.split(f"<!-- {marker} -->\n")[1].split(f"\n<!-- /{marker} -->")[0]
    lines = [line.strip("|").split("|") for line in body.splitlines() if line.startswith("| ")]
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in lines}


def test_every_table_has_one_place(report: ModuleType) -> None:
    text = "\n".join(page.read_text("utf-8") for page in report.pages_of())
    markers = [marker for tables in report.TABLES.values() for marker in tables]
    assert {marker: text.count(f"<!-- {marker} -->\n") for marker in markers} == dict.fromkeys(
        [*markers], 1
    )


@pytest.mark.parametrize(("model", "ours", "peft"), [("vit", 0, 1), ("llama", 2, 3)])
def test_the_first_table_is_a_part_of_the_others(
    report: ModuleType, model: str, ours: int, peft: int
) -> None:
    summary = cells(report.PAGE.read_text("utf-8"), "step-summary")
    times = cells((DOCS / "performance" / "steps.md").read_text("utf-8"), f"step-{model}-time")
    memory = cells((DOCS / "performance" / "memory.md").read_text("utf-8"), "step-llama-memory")
    for method in report.SUMMARY:
        row = summary[method]
        assert (row[ours], row[peft]) == (times[method][1].split(" (")[0], times[method][4])
        shown = [memory[method][column].rpartition("/")[2].strip() for column in (0, 4)]
        assert row[4:] == shown


def test_results_are_written_to_the_page_that_has_their_marker(
    report: ModuleType, tmp_path: Path
) -> None:
    shutil.copy(report.PAGE, tmp_path)
    shutil.copytree(DOCS / "performance", tmp_path / "performance")
    results: dict[str, Any] = {
        "rows": [{"method": "LoRA r8", "over_limit": 3.0}],
        "about": {},
    }
    results["rows"][0] |= {"over_limit_low": 2.5, "over_limit_high": 3.5}
    (tmp_path / "step-llama-compiled.json").write_text(json.dumps(results))
    page = tmp_path / "performance.md"
    missing = report.rewrite(tmp_path, page, tmp_path)
    assert missing == [name for name in report.TABLES if name != "step-llama-compiled"]
    steps = (tmp_path / "performance" / "steps.md").read_text("utf-8")
    expected = {"LoRA r8": ["3.00 (2.50 to 3.50)"]}
    assert cells(steps, "step-llama-compiled").items() >= expected.items()
    assert page.read_text("utf-8") == report.PAGE.read_text("utf-8")
