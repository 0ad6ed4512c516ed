"""The runner on a task made here: what is searched, kept and chosen."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("optuna")

from experiments import results
from experiments.experiment import Experiment, Method, experiment, family, names
from experiments.runs import Lab, first_trials, searched, source_digest

import superlora as sl


class Hill:
    """A task whose validation is best at a rate of its own, and that counts its runs."""

    def __init__(self, best: float = 3e-3) -> None:
        self.best, self.runs = best, 0

    def measure(self, design: Any, *, rate: float, scale: float, seed: int) -> dict[str, Any]:
        self.runs += 1
        value = 1.0 - 0.1 * math.log10(rate / self.best) ** 2 - 0.05 * math.log10(scale) ** 2
        found = {"parameters": design.rank, "validation": value, "test": value - 0.01 * seed}
        return {**found, "seconds": 1.0}


OWN = Experiment(
    title="a hill",
    task="digits",
    settings={"train": 5},
    methods=family("LoRA", "r{rank}", sl.lora, rank=(1, 2)),
    rates=(1e-4, 1e-1),
)


def lab(folder: Path, task: Any, own: Experiment = OWN, source: str = "s") -> Lab:
    return Lab(own, folder, source, task)


def test_the_trials_are_equal_for_all_methods_and_the_best_is_run_with_every_seed(
    tmp_path: Path,
) -> None:
    own = lab(tmp_path, Hill())
    for method in OWN.methods:
        rows = list(searched(own, method))
        trials, chosen = rows[: OWN.trials], rows[OWN.trials :]
        assert [row["chosen"] for row in rows] == [False] * 6 + [True] * 3
        assert [row["rate"] for row in trials[:5]] == pytest.approx(
            [trial["rate"] for trial in first_trials(OWN)]
        )
        assert [row["seed"] for row in chosen] == [0, 1, 2]
        best = max(trials, key=lambda row: row["validation"])
        assert {row["rate"] for row in chosen} == {best["rate"]}
        assert best["rate"] == pytest.approx(3e-3, rel=0.5)


def test_rates_lie_evenly_in_the_range() -> None:
    rates = [trial["rate"] for trial in first_trials(OWN)]
    steps = [after / before for before, after in itertools.pairwise(rates)]
    assert steps == pytest.approx([10**0.6] * 4)
    assert rates[0] / 1e-4 == pytest.approx(1e-1 / rates[-1])


def test_a_scale_is_searched_where_it_has_a_range(tmp_path: Path) -> None:
    own = dataclasses.replace(OWN, scales=(0.1, 10.0), trials=9, even=6)
    rows = [row for row in searched(lab(tmp_path, Hill(), own), OWN.methods[0])]
    scales = {row["scale"] for row in rows[:9]}
    assert len(scales) == 9
    assert all(0.1 <= scale <= 10.0 for scale in scales)
    best = max(rows[:9], key=lambda row: row["validation"])
    assert {row["scale"] for row in rows[9:]} == {best["scale"]}


def test_runs_that_are_known_are_not_measured_again(tmp_path: Path) -> None:
    first, again, changed = Hill(), Hill(), Hill()
    rows = list(searched(lab(tmp_path, first), OWN.methods[0]))
    assert first.runs == 8  # six trials, and two more seeds of the best
    assert list(searched(lab(tmp_path, again), OWN.methods[0])) == rows
    assert again.runs == 0
    list(searched(lab(tmp_path, changed, source="t"), OWN.methods[0]))
    assert changed.runs == 8


def test_an_interrupted_search_goes_on(tmp_path: Path) -> None:
    whole = list(searched(lab(tmp_path / "whole", Hill()), OWN.methods[0]))
    steps = searched(lab(tmp_path / "part", Hill()), OWN.methods[0])
    for _ in range(3):
        next(steps)
    steps.close()
    rest = Hill()
    assert list(searched(lab(tmp_path / "part", rest), OWN.methods[0])) == whole
    assert rest.runs == 5


@pytest.mark.parametrize("change", ["settings", "design", "seed"])
def test_a_run_is_that_of_its_settings(tmp_path: Path, change: str) -> None:
    task = Hill()
    own = lab(tmp_path, task)
    method, run = OWN.methods[0], {"rate": 0.1, "scale": 1.0, "seed": 0}
    own.run(method, **run)
    if change == "settings":
        own = lab(tmp_path, task, dataclasses.replace(OWN, settings={"train": 6}))
    elif change == "design":
        method = OWN.methods[1]
    else:
        run["seed"] = 1
    own.run(method, **run)
    assert task.runs == 2


def test_the_digest_follows_the_code_and_not_its_comments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from experiments import runs, tasks

    (tmp_path / "tasks").mkdir()
    file = tmp_path / "tasks" / "own.py"
    monkeypatch.setattr(runs, "HERE", tmp_path)
    monkeypatch.setattr(tasks, "module", lambda name: type("own", (), {"SOURCES": ()}))
    digests = []
    for text in ('"""A."""\nx = 1\n', '"""B."""\n# Why.\nx = 1\n', "x = 2\n"):
        file.write_text(text)
        digests.append(source_digest("own"))
    assert digests[0] == digests[1] != digests[2]


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = list(searched(lab(tmp_path, Hill()), OWN.methods[0]))
    results.write(tmp_path, "own", OWN, rows, whole=True)
    about, found = results.read(tmp_path, "own")
    assert about["settings"] == {"train": 5}
    assert about["designs"]["LoRA r1"] == "Spec(rank=1)"
    assert about["environment"]["torch"]
    for before, after in zip(rows, found, strict=True):
        assert after["chosen"] is before["chosen"]
        assert after["rate"] == pytest.approx(before["rate"], rel=1e-5)
        assert (after["method"], after["seed"]) == (before["method"], before["seed"])
    json.dumps(about)


def test_a_part_takes_the_place_of_its_own_rows_alone(tmp_path: Path) -> None:
    both = [row for method in OWN.methods for row in searched(lab(tmp_path, Hill()), method)]
    results.write(tmp_path, "own", OWN, both, whole=True)
    other = lab(tmp_path, Hill(2e-2), source="t")
    results.write(tmp_path, "own", OWN, list(searched(other, OWN.methods[0])), whole=False)
    _, found = results.read(tmp_path, "own")
    assert [row["method"] for row in found] == ["LoRA r1"] * 9 + ["LoRA r2"] * 9
    assert {row["source"] for row in found[:9]} == {"t"}
    assert {row["source"] for row in found[9:]} == {"s"}


@pytest.mark.parametrize("name", names())
def test_the_methods_of_an_experiment_are_designs_by_different_names(name: str) -> None:
    own = experiment(name)
    assert own.reference in {method.family for method in own.methods}
    assert set(own.shown) <= {method.family for method in own.methods}
    assert len(own.seeds) >= 3 or name == "quick"
    designs = [json.dumps(m.design and m.design.to_dict(), sort_keys=True) for m in own.methods]
    assert len(set(designs)) == len(designs)
    source_digest(own.task)


def test_an_unknown_experiment_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="digits"):
        experiment("digit")


def test_methods_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="different names"):
        dataclasses.replace(OWN, methods=[Method("a", "", None), Method("a", "", sl.dense())])
