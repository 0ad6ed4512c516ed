"""The report: who wins, and what is written."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from rich.console import Console

from superlora.demo import report
from superlora.demo.points import DENSE, FULL, HEAD, LORA, LORTA, PLANAR, Result


@pytest.fixture
def results(make_result: Callable[..., Any]) -> list[Result]:
    return [
        make_result(HEAD, None, 0, 0.90),
        make_result(LORA, 1, 1000, 0.94, validation=0.99),
        make_result(LORA, 4, 4000, 0.96),
        make_result(PLANAR, 1, 200, 0.93, validation=0.95),
        make_result(PLANAR, 4, 800, 0.95, validation=0.95),
        make_result(LORTA, 5, 150, 0.89, validation=0.80),
        make_result(LORTA, 8, 300, 0.92, validation=0.90),
        make_result(DENSE, None, 100_000, 0.955),
    ]


def test_the_front_rises_and_nothing_beats_it(results: list[Result]) -> None:
    front = report.pareto_front(results)
    assert [item.parameters for item in front] == [0, 200, 800, 4000]
    for item in results:
        beaten = [
            other
            for other in front
            if other.parameters <= item.parameters and other.test_accuracy >= item.test_accuracy
        ]
        assert beaten


def test_of_equal_sizes_the_better_is_on_the_front(make_result: Callable[..., Any]) -> None:
    pair = [make_result(LORA, 1, 10, 0.5), make_result(PLANAR, 1, 10, 0.6)]
    assert report.pareto_front(pair) == [pair[1]]
    assert report.pareto_front(pair[:1] * 2) == pair[:1]


def test_the_best_small_one_is_chosen_on_the_validation_part(results: list[Result]) -> None:
    best = report.best_small(results)
    assert best is not None
    assert (best.family, best.rank) == (PLANAR, 1)  # ties with rank 4, and is smaller


def test_none_is_small(make_result: Callable[..., Any]) -> None:
    assert (
        report.best_small([make_result(HEAD, None, 0, 0.9), make_result(LORA, 1, 9, 0.9)]) is None
    )


def test_the_comparison_with_lora_says_whatever_came_out(results: list[Result]) -> None:
    found = {(item.family, item.target.rank): item for item in report.reaches(results)}
    assert set(found) == {(PLANAR, 1), (PLANAR, 4), (LORTA, 1), (LORTA, 4)}
    reached = found[PLANAR, 1]
    assert reached.result is not None
    assert reached.result.parameters == 800
    assert reached.to_dict()["reached_with_parameters"] == 800
    assert reached.sentence() == (
        f"{PLANAR}: reaches LoRA r1's 94.00% (1,000 parameters) with 800 (rank 4, 95.00%), "
        "1.2 times fewer"
    )
    assert found[LORTA, 4].result is None
    assert found[LORTA, 4].sentence().endswith("not reached")
    assert found[LORTA, 4].to_dict()["reached_with_parameters"] is None


def test_files_are_written_whole(results: list[Result], tmp_path: Path) -> None:
    report.write_csv(results, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == [item.method for item in results]
    assert [int(row["parameters"]) for row in rows] == [item.parameters for item in results]
    assert float(rows[1]["test_accuracy"]) == 0.94
    report.write_json({"results": [1, None]}, tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text()) == {"results": [1, None]}
    report.plot(results, FULL, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert {item.name for item in tmp_path.iterdir()} == {
        "results.csv", "results.json", "accuracy.png"
    }  # fmt: skip


def test_the_table_has_a_row_each_and_says_one_seed(results: list[Result]) -> None:
    console = Console(width=120, file=io.StringIO())
    console.print(report.table(results, FULL, report.best_small(results)))
    text = console.file.getvalue()
    assert "One seed (0)" in text
    assert f"> {PLANAR} r1" in text
    for item in results:
        assert item.method in text
        assert f"{item.test_accuracy:.2%}" in text
