"""The runner on a task made here: what is searched, kept and chosen."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("optuna")

from experiments import results, tasks
from experiments.experiment import Experiment, Method, experiment, family, names
from experiments.runs import Lab, releases, searched, source_digest

import superlora as sl


class Hill:
    """A task whose validation is best at a rate of its own, and that counts its runs."""

    def __init__(self, best: float = 3e-3) -> None:
        self.best, self.runs = best, 0

    def measure(
        self, design: Any, *, rate: float, scale: float, seed: int, test: bool
    ) -> dict[str, Any]:
        self.runs += 1
        value = 1.0 - 0.1 * math.log10(rate / self.best) ** 2 - 0.05 * math.log10(scale) ** 2
        found = {"parameters": design.rank, "validation": value, "seconds": 1.0}
        return {**found, **({"test": value - 0.01 * seed} if test else {})}


OWN = Experiment(
    title="a hill",
    task="digits",
    settings={"train": 5},
    methods=family("LoRA", "r{rank}", sl.lora, rank=(1, 2)),
)


def lab(folder: Path, task: Any, own: Experiment = OWN, source: str = "s") -> Lab:
    made = Lab(own, folder, source)
    made.task = task
    return made


def test_all_rates_are_tried_and_the_best_is_run_with_every_seed(tmp_path: Path) -> None:
    own = lab(tmp_path, Hill())
    for method in OWN.methods:
        rows = searched(own, method)
        trials, chosen = rows[:6], rows[6:]
        assert [row["chosen"] for row in rows] == [False] * 6 + [True] * 3
        assert sorted(row["rate"] for row in trials) == list(OWN.rates)
        assert {row["seed"] for row in trials} == {OWN.choice}
        assert not any("test" in row for row in trials)  # the test part is not read
        assert [row["seed"] for row in chosen] == [0, 1, 2]
        assert {row["rate"] for row in chosen} == {3e-3}


def test_rates_are_half_a_decade_apart() -> None:
    steps = [after / before for before, after in itertools.pairwise(OWN.rates)]
    assert steps == pytest.approx([10**0.5] * 5, rel=0.06)


def test_scales_are_tried_with_every_rate(tmp_path: Path) -> None:
    own = dataclasses.replace(OWN, rates=(1e-3, 3e-3), scales=(0.1, 1.0, 10.0))
    rows = searched(lab(tmp_path, Hill(), own), OWN.methods[0])
    assert len({(row["rate"], row["scale"]) for row in rows[:6]}) == own.trials == 6
    assert {(row["rate"], row["scale"]) for row in rows[6:]} == {(3e-3, 1.0)}


@pytest.mark.parametrize(
    ("best", "tried", "chosen"),
    [
        (0.3, [0.3, 1.0], 0.3),  # beyond the upper end, and one more, which is not better
        (1e-4, [1e-4, 3e-5], 1e-4),
        (1e3, [0.3, 1.0, 3.0], 3.0),  # no more than three
    ],
)
def test_rates_beyond_an_end_are_tried_where_the_best_is_there(
    tmp_path: Path, best: float, tried: list[float], chosen: float
) -> None:
    rows = searched(lab(tmp_path, Hill(best)), OWN.methods[0])
    trials = [row["rate"] for row in rows if not row["chosen"]]
    assert sorted(trials[:6]) == list(OWN.rates)
    assert trials[6:] == tried
    assert rows[-1]["rate"] == chosen


class Lucky(Hill):
    """A task on which the seed of the choice alone is good at a large rate."""

    def measure(self, design: Any, *, rate: float, seed: int, **rest: Any) -> dict[str, Any]:
        found = super().measure(design, rate=rate, seed=seed, **rest)
        if rate == 1e-2:
            found["validation"] = 1.1 if seed == OWN.choice else 0.1
        return found


def test_the_two_best_are_confirmed_with_other_seeds(tmp_path: Path) -> None:
    assert searched(lab(tmp_path / "once", Lucky()), OWN.methods[0])[-1]["rate"] == 1e-2
    own = dataclasses.replace(OWN, confirm=(101, 102))
    rows = searched(lab(tmp_path / "again", Lucky(), own), OWN.methods[0])
    assert rows[-1]["rate"] == 3e-3
    more = [(row["rate"], row["seed"]) for row in rows if row["seed"] in own.confirm]
    assert more == [(1e-2, 101), (1e-2, 102), (3e-3, 101), (3e-3, 102)]
    assert not any("test" in row for row in rows if not row["chosen"])


@pytest.mark.parametrize("confirm", [(0,), (100,), (101, 101)])
def test_seeds_that_confirm_are_others(confirm: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="choice and confirm must be different"):
        dataclasses.replace(OWN, confirm=confirm)


def test_of_equal_rates_the_least_is_chosen(tmp_path: Path) -> None:
    class Flat(Hill):
        def measure(self, design: Any, **settings: Any) -> dict[str, Any]:
            return {**super().measure(design, **settings), "validation": 0.5}

    assert searched(lab(tmp_path, Flat()), OWN.methods[0])[-1]["rate"] == OWN.rates[0]


def test_runs_that_are_known_are_not_measured_again(tmp_path: Path) -> None:
    first, again, changed = Hill(), Hill(), Hill()
    rows = searched(lab(tmp_path, first), OWN.methods[0])
    assert first.runs == 9
    assert searched(lab(tmp_path, again), OWN.methods[0]) == rows
    assert again.runs == 0
    searched(lab(tmp_path, changed, source="t"), OWN.methods[0])
    assert changed.runs == 9


def test_an_interrupted_search_goes_on(tmp_path: Path) -> None:
    class Interrupted(Hill):
        def measure(self, design: Any, **settings: Any) -> dict[str, Any]:
            if self.runs == 3:
                raise KeyboardInterrupt
            return super().measure(design, **settings)

    whole = searched(lab(tmp_path / "whole", Hill()), OWN.methods[0])
    with pytest.raises(KeyboardInterrupt):
        searched(lab(tmp_path / "part", Interrupted()), OWN.methods[0])
    rest = Hill()
    assert searched(lab(tmp_path / "part", rest), OWN.methods[0]) == whole
    assert rest.runs == 6


@pytest.mark.parametrize("change", ["settings", "design", "seed", "test", "folder", "release"])
def test_a_run_is_that_of_its_settings(
    tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Hill()
    own = lab(tmp_path, task)
    method = OWN.methods[0]
    run: dict[str, Any] = {"rate": 0.1, "scale": 1.0, "seed": 0, "test": False}
    own.run(method, **run)
    if change == "settings":
        own = lab(tmp_path, task, dataclasses.replace(OWN, settings={"train": 6}))
    elif change == "design":
        method = OWN.methods[1]
    elif change == "folder":
        monkeypatch.setenv("SUPERLORA_LM", str(tmp_path))
    elif change == "release":
        monkeypatch.setattr("importlib.metadata.version", lambda name: "0")
    else:
        run[change] = 1 if change == "seed" else True
    own.run(method, **run)
    assert task.runs == 2


@pytest.mark.parametrize("task", ["texts", "cifar", "glosses", "e2e", "glora", "drawing"])
def test_the_libraries_of_a_task_are_part_of_what_its_runs_depend_on(
    task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = tasks.module(task).PACKAGES
    assert names
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"1.0 of {name}")
    found = releases(task)
    for name in ("torch", "numpy", *names):
        assert found[name] == f"1.0 of {name}"


def test_the_digest_follows_the_code_and_not_its_comments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from experiments import runs

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
    rows = searched(lab(tmp_path, Hill()), OWN.methods[0])
    results.write(tmp_path, "own", OWN, rows, whole=True)
    about, found = results.read(tmp_path, "own")
    assert about["settings"] == {"train": 5}
    assert about["designs"]["LoRA r1"] == "Spec(rank=1)"
    assert about["environment"]["torch"]
    for before, after in zip(rows, found, strict=True):
        assert after["chosen"] is before["chosen"]
        assert after["rate"] == pytest.approx(before["rate"], rel=1e-15)
        assert (after["method"], after["seed"]) == (before["method"], before["seed"])
    json.dumps(about)


def test_a_part_takes_the_place_of_its_own_rows_alone(tmp_path: Path) -> None:
    both = [row for method in OWN.methods for row in searched(lab(tmp_path, Hill()), method)]
    results.write(tmp_path, "own", OWN, both, whole=True)
    other = lab(tmp_path, Hill(3e-2), source="t")
    results.write(tmp_path, "own", OWN, searched(other, OWN.methods[0]), whole=False)
    about, found = results.read(tmp_path, "own")
    assert [row["method"] for row in found] == ["LoRA r1"] * 9 + ["LoRA r2"] * 9
    assert {row["source"] for row in found[:9]} == {"t"}
    assert {row["source"] for row in found[9:]} == {"s"}
    assert list(about["designs"]) == ["LoRA r1", "LoRA r2"]


def test_a_part_that_was_measured_otherwise_is_refused(tmp_path: Path) -> None:
    rows = searched(lab(tmp_path, Hill()), OWN.methods[0])
    results.write(tmp_path, "own", OWN, rows, whole=True)
    changed = dataclasses.replace(OWN, settings={"train": 6})
    with pytest.raises(ValueError, match="other settings"):
        results.write(tmp_path, "own", changed, rows, whole=False)
    assert results.read(tmp_path, "own")[0]["settings"] == {"train": 5}


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


def test_an_unknown_experiment_is_a_wrong_use_of_the_command() -> None:
    folder = Path(results.__file__).parent
    command = [sys.executable, str(folder), "run", "digit"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "must be one of" in found.stderr
    assert "Traceback" not in found.stderr
