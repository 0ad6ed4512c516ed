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
from superlora.demo.methods import HEAD, LORA, Result, Settings, methods

PLANAR, LORTA = "SuperLoRA 2-D, one group", "LoRTA 3-D, one group"


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
        make_result("dense", None, 100_000, 0.955),
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


def test_rows_and_plot_are_written(results: list[Result], tmp_path: Path) -> None:
    report.write(results, {"best_small": None}, tmp_path)
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == [item.method for item in results]
    assert [int(row["parameters"]) for row in rows] == [item.parameters for item in results]
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["best_small"] is None
    assert content["results"][1]["test_accuracy"] == 0.94
    report.plot(results, Settings(), tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_the_plot_has_a_marker_for_every_family() -> None:
    families = {method.family for method in methods()} - {HEAD}
    assert len(families) == len(report.MARKERS)


def test_the_table_has_a_row_each_and_says_one_seed(results: list[Result]) -> None:
    console = Console(width=120, file=io.StringIO())
    console.print(report.table(results, Settings(), report.best_small(results)))
    text = console.file.getvalue()
    assert "One seed (0)" in text
    assert f"> {PLANAR} r1" in text
    for item in results:
        assert item.method in text
        assert f"{item.test_accuracy:.2%}" in text
