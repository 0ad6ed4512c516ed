"""The table by the number of images: of which files a method is, and what a search gains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("optuna")
pytest.importorskip("rich")

from experiments import results, shots
from experiments.experiment import Experiment, Method, experiment


def run(method: str, seed: int, test: float, **own: Any) -> dict[str, Any]:
    """Return a run of a chosen rate."""
    return {
        **{"method": method, "family": method, "parameters": 100, "rate": 0.1, "scale": 1.0},
        **{"seed": seed, "chosen": True, "source": "s", "test": test, "seconds": 1.0},
        **{"candidate_test": None, "random_test": None, "diverged": False, **own},
    }


def runs(*methods: str, test: float, **own: Any) -> list[dict[str, Any]]:
    return [run(method, seed, test, **own) for method in methods for seed in (0, 1)]


FIRST = [*runs("LoRA r2", "LoRA r4", test=0.5), run("LoRA r2", 5, 0.9, chosen=False)]
SECOND = [
    *runs("head only", test=0.2),
    *runs("LoRA r2", test=0.8),
    *runs(shots.SEARCH, test=0.6, candidate_test=0.4, random_test=0.3),
]


def test_the_names_are_those_of_the_experiments() -> None:
    for name in ("glora_shots_1", "glora_shots_16"):
        assert tuple(own.name for own in experiment(name).methods) == shots.METHODS


def test_a_method_is_of_the_first_file_that_has_it() -> None:
    rows = shots.taken([FIRST, SECOND])
    means = {"head only": 0.2, "LoRA r2": 0.5, "LoRA r4": 0.5, shots.SEARCH: 0.6}
    means |= {"best with a name": 0.4, "random": 0.3}
    for name, mean in means.items():
        assert shots.accuracies(rows, name) == {0: mean, 1: mean}
    with pytest.raises(ValueError, match="runs of head only"):
        shots.taken([FIRST])


def test_what_a_seed_lacks_is_left_out(tmp_path: Path) -> None:
    lacking = [{**row, "candidate_test": None} for row in SECOND]
    named = [Method(name, "", None) for name in {row["method"] for row in [*FIRST, *SECOND]}]
    own = Experiment("own", "digits", {}, named)
    for name, rows in zip(shots.FILES[4], (FIRST, lacking), strict=True):
        results.write(tmp_path, name, own, rows, whole=True)
    found = shots.measured(tmp_path)
    assert list(found) == [4]
    lines = shots.table(found).splitlines()
    assert lines[0] == "| method | 4 | the search is above it by |"
    assert lines[2] == "| head only | 20.0 ± 0.0 | 40.0 ± 0.0 |"
    assert lines[5] == f"| {shots.SEARCH} | 60.0 ± 0.0 |  |"
    assert lines[6:] == ["| best with a name |  |  |", "| random | 30.0 | 30.0 ± 0.0 |"]


def test_a_gain_is_of_pairs_and_its_interval_over_the_seeds() -> None:
    def rows(*gains: float) -> list[dict[str, Any]]:
        own = [run("LoRA r2", seed, 0.5 + seed) for seed in range(len(gains))]
        return [
            *own,
            *(run(shots.SEARCH, seed, 0.5 + seed + value) for seed, value in enumerate(gains)),
        ]

    # The seeds' own level does not count. Their mean gains are .3 and .5.
    mean, half = shots.gain({1: rows(0.1, 0.3), 4: rows(0.5, 0.7)}, "LoRA r2") or (0.0, 0.0)
    assert mean == pytest.approx(0.4)
    assert half == pytest.approx(12.7062 * 0.1, rel=1e-4)  # of Student's t with one degree
    assert shots.gain({1: rows(0.1, 0.3)}, "LoRA r4") is None
    assert shots.gain({1: rows(0.1)}, "LoRA r2") is None


def test_the_same_results_draw_the_same_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = {4: shots.taken([FIRST, SECOND])}
    for name in ("a.svg", "b.svg"):
        shots.draw(found, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    other = {4: shots.taken([FIRST, [*runs("head only", test=0.3), *SECOND[2:]]])}
    shots.draw(other, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() != (tmp_path / "b.svg").read_bytes()
