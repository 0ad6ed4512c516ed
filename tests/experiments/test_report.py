"""The docs and the README say what the files of the results say."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

pytest.importorskip("torch")

from experiments import report, results, searches, shots
from experiments.analysis import Point, Saving, points, savings
from experiments.experiment import experiment
from experiments.runs import BEYOND, beyond

ROOT = Path(__file__).parents[2]
if not (ROOT / "docs").is_dir():
    pytest.skip("the documentation is not part of an installed package", allow_module_level=True)


def made(family: str, parameters: int, mean: float) -> Point:
    return Point(
        f"{family} {parameters}", family, parameters, 0.01, mean, 0.004, 0.008, 3, 9.6, freedom=100
    )


ABOUT = {
    **{"title": "own", "metric": "test accuracy", "percent": True},
    **{"shown": ["LoRA"], "scales": [1.0]},
}
POINTS = [made("head only", 0, 0.7), made("LoRA", 1000, 0.9), made("F", 100, 0.91)]


def test_every_table_is_on_a_page_and_says_what_the_results_say() -> None:
    from tables import between  # lies beside the docs, which the report knows

    pages = {page: page.read_text("utf-8") for page in report.PAGES}
    for marker, content in report.texts().items():
        found = [page for page, text in pages.items() if f"<!-- {marker} -->" in text]
        assert found, f"no page has the marker {marker}"
        for page in found:
            assert between(pages[page], marker) == content, (page, marker)


def test_no_page_waits_for_results_that_are_not_there() -> None:
    known = set(report.texts())
    for page in report.PAGES:
        if page.parent.name == "experiments" or page.name in ("experiments.md", "README.md"):
            used = set(re.findall(r"<!-- ([\w-]+) -->", page.read_text("utf-8")))
            assert used <= known, page


def test_the_readme_says_in_words_what_the_results_say() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    saved = [
        own
        for own in savings(points(results.read(results.FOLDER, "digits")[1]), "LoRA")
        if own.reference in ("LoRA r1", "LoRA r2", "LoRA r4")
    ]
    plain = [own for own in saved if own.family == "SuperLoRA 2-D"]
    mapped = ("2-D r8, fastfood", "2-D r8, one-hot", "dense, fastfood", "WaveFT")
    random = [own for own in saved if own.family in mapped]
    assert (len(plain), len(random)) == (3, 12)
    times, lows = [own.times for own in plain], [own.low for own in plain]
    assert f"needs {min(times):.1f} to {max(times):.1f} times fewer parameters" in text
    assert f"with intervals that begin at {min(lows):.1f}." in text
    times, lows = [own.times for own in random], [own.low for own in random]
    assert f"it is {min(times):.1f} to {max(times):.0f} times" in text
    assert f"with intervals that begin at {min(lows):.1f} to {max(lows):.1f}." in text
    found = shots.measured()
    mean, half = shots.gain({count: found[count] for count in (1, 16)}, "LoRA r2") or (0.0, 0.0)
    assert f"is {100 * mean:.1f} ± {100 * half:.1f} above it with one and sixteen" in text
    searched = searches.searched(results.read(results.FOLDER, "glora_few")[1])
    ours = [fmean(float(row["test"]) for row in rows) for rows in searched.values()]
    above = fmean(ours) - fmean(shots.accuracies(found[4], "LoRA r2").values())
    assert len(ours) == 4
    assert f"are {100 * above:.1f} points above".replace(" 0.", " .") in text


def test_the_interactive_page_has_the_results() -> None:
    assert json.loads((report.FIGURES / "results.json").read_text("utf-8")) == json.loads(
        json.dumps(report.comparison())
    )


def wanted(trials: list[dict[str, Any]]) -> float | None:
    """Return the rate that is to be tried after these."""
    best = max(trials, key=lambda row: row["validation"])
    if [row["validation"] for row in trials].count(best["validation"]) > 1:
        return None
    return beyond(sorted({row["rate"] for row in trials}), best["rate"])


@pytest.mark.parametrize("name", results.names())
def test_results_are_whole(name: str) -> None:
    about, rows = results.read(results.FOLDER, name)
    found = points(rows)
    assert [point.method for point in found] == list(about["designs"])
    assert {row["source"] for row in rows} == {about["source"]}
    config = experiment(name)
    assert about["shown"] == list(config.shown)
    assert (about["title"], about["metric"]) == (config.title, config.metric)
    for point in found:
        own = [row for row in rows if row["method"] == point.method and not row["chosen"]]
        trials = [row for row in own if row["seed"] == about["choice"]]
        grid = [row for row in trials if row["rate"] in about["rates"]]
        assert len(grid) == len(about["rates"]) * len(about["scales"])
        # The others are those that the rule beyond the ends asks for, one by one.
        others = [row for row in trials if row not in grid]
        for row in others:
            assert row["rate"] == wanted(grid)
            grid.append(row)
        assert len(others) == BEYOND or wanted(grid) is None
        values: dict[Any, list[float]] = {}  # the first is that of the choice's seed
        for row in own:
            values.setdefault((row["rate"], row["scale"]), []).append(row["validation"])
        if about["confirm"]:
            others = [each for each in values.values() if len(each) == 1]
            values = {key: each for key, each in values.items() if len(each) > 1}
            assert [len(each) for each in values.values()] == [1 + len(about["confirm"])] * 2
            assert min(each[0] for each in values.values()) >= max(others)[0]
        best = max(sum(each) for each in values.values())
        assert sum(values[point.rate, point.scale]) == best
        assert point.seeds == len(about["seeds"])


def test_every_figure_is_on_a_page_and_every_page_has_its_figures() -> None:
    pages = "".join(page.read_text("utf-8") for page in report.PAGES)
    used = set(re.findall(r"_static/experiments/([\w-]+\.(?:svg|png))", pages))
    assert used == {path.name for path in report.FIGURES.iterdir() if path.suffix != ".json"}
    made = {f"{name}.svg" for name in report.drawn()}
    assert {name for name in used if name.endswith(".svg")} <= made


def test_the_table_has_the_front_in_bold() -> None:
    lines = report.table(POINTS, ABOUT).splitlines()
    assert lines[2] == "| **head only 0** | 0 | 70.0 ± 0.8 | 100 | 0.01 | 10 |"
    assert lines[3] == "| LoRA 1000 | 1,000 | 90.0 ± 0.8 | 4 | 0.01 | 10 |"
    assert lines[4] == "| **F 100** | 100 | 91.0 ± 0.8 | 100 | 0.01 | 10 |"


def test_a_scale_that_was_searched_is_in_the_table() -> None:
    about = {**ABOUT, "scales": [1.0, 4.0]}
    lines = report.table([dataclasses.replace(made("F", 100, 0.91), scale=4.0)], about).splitlines()
    assert "| rate | scale |" in lines[0]
    assert "| 0.01 | 4 |" in lines[2]
    assert len({line.count("|") for line in lines}) == 1


def test_a_metric_that_is_no_share_is_shown_as_it_is() -> None:
    about = {**ABOUT, "metric": "log likelihood", "percent": False}
    lines = report.table([made("LoRA", 1000, -3.25)], about).splitlines()
    assert (
        lines[0]
        == "| method | parameters | log likelihood | on the front, % | rate | training, s |"
    )
    assert lines[2] == "| **LoRA 1000** | 1,000 | -3.250 ± 0.008 | 100 | 0.01 | 10 |"


@pytest.mark.parametrize(
    ("saving", "said"),
    [
        (Saving("F", "LoRA r1", 2.04, 1.5, 3.26, False), "2.0 (1.5 to 3.3)"),
        (Saving("F", "LoRA r1", 2.04, 1.5, float("inf"), True), "≥ 2.0 (1.5 or more)"),
        (Saving("F", "LoRA r1", 12.4, 1.5, 103.2, False), "12 (1.5 to 103)"),
        (Saving("F", "LoRA r1", 2.04, 0.0, 3.26, False), "2.0 (at most 3.3)"),
        (Saving("F", "LoRA r1", 0.0, 0.0, 1.2, False), "not reached (at most 1.2)"),
        (Saving("F", "LoRA r1", 0.0, 0.0, float("inf"), False), "not reached (not known)"),
        (Saving("F", "LoRA r1", 0.0, 0.0, 0.0, False), "not reached"),
    ],
)
def test_a_saving_is_said_with_its_interval(saving: Saving, said: str) -> None:
    assert report.times(saving) == said


def test_a_method_that_failed_with_every_seed_is_not_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    failed = dataclasses.replace(made("G", 50, 0.1), failed=3)
    report.draw(POINTS, ABOUT, tmp_path / "a.svg")
    report.draw([*POINTS, failed], ABOUT, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    report.draw([*POINTS, dataclasses.replace(failed, failed=2)], ABOUT, tmp_path / "c.svg")
    assert (tmp_path / "a.svg").read_bytes() != (tmp_path / "c.svg").read_bytes()


def test_equal_results_are_equal_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        report.draw(POINTS, ABOUT, tmp_path / f"{name}.svg")
    text = (tmp_path / "a.svg").read_text("utf-8")
    assert text == (tmp_path / "b.svg").read_text("utf-8")
    assert "<svg" in text
