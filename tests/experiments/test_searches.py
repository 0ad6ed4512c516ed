"""What is said of searches: means, agreement between seeds, shifts, the curve of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from experiments import report, results, searches
from experiments.experiment import Experiment, Method


def configuration(*options: str) -> dict[str, dict[str, str]]:
    """Return a configuration of one operation, a layer an option."""
    return {f"layer {place}": {"A": own} for place, own in enumerate(options)}


def row(seed: int, **own: Any) -> dict[str, Any]:
    """Return a run of a search."""
    return {
        **{"method": "S", "family": "S", "parameters": 100, "rate": 0.1, "scale": 1.0},
        **{"seed": seed, "chosen": True, "searched": True, "random_test": 0.5, "source": "s"},
        **{"validation": 0.7, "candidate_test": 0.55, "test": 0.6, "seconds": 10.0},
        **{"search_seconds": 4.0, "epoch_losses": [2.0, 1.0 + seed]},
        **{"configuration": configuration("r", "none", "r", "none"), "test_noisy": 0.3},
        **{"diverged": False},
        **own,
    }


PLAIN = {key: None for key in row(0)} | {
    **{"method": "LoRA", "family": "LoRA", "parameters": 50, "rate": 0.1, "seconds": 1.0},
    **{"seed": 0, "scale": 1.0, "chosen": True, "test": 0.65, "test_noisy": 0.2},
}
ROWS = [row(0), row(1, random_test=0.6), PLAIN, {**PLAIN, "seed": 1}]


def test_agreement_counts_equal_choices_and_expects_those_of_shuffled_layers() -> None:
    found = searches.agreement(
        [configuration("r", "r", "none", "none"), configuration("r", "none", "none", "none")]
    )
    # Of four layers: 4 · (2/4 · 1/4) of "r", and 4 · (2/4 · 3/4) of "none".
    assert found == searches.Agreement(choices=4, agreed=3, expected=2.0)


def test_the_table_has_the_searches_alone_in_means() -> None:
    lines = searches.table(ROWS).splitlines()
    assert len(lines) == 3
    assert lines[2] == "| S | 70.0 | 60.0 | 55.0 | 55.0 | 10 | 4 | 4 of 4 (2) |"
    assert len({line.count("|") for line in lines}) == 1


def test_a_mean_that_a_seed_lacks_is_empty_and_failed_seeds_are_said() -> None:
    lines = searches.table([row(0), row(1, candidate_test=None)]).splitlines()
    assert lines[2] == "| S | 70.0 | 60.0 |  | 50.0 | 10 | 4 | 4 of 4 (2) |"
    failed = {**row(2), "diverged": True, "test": 0.1, "epoch_losses": None, "configuration": None}
    lines = searches.table([row(0), row(1), failed]).splitlines()
    assert lines[2].startswith("| S (1 of 3 failed) | 70.0 | 60.0 |")
    lines = searches.table([failed]).splitlines()
    assert lines[2] == "| S (1 of 1 failed) |  |  |  |  |  |  |  |"


def test_searches_are_read_as_they_were_written(tmp_path: Path) -> None:
    own = Experiment("own", "digits", {}, [Method("S", "", None), Method("LoRA", "", None)])
    results.write(tmp_path, "own", own, ROWS, whole=True)
    _, rows = results.read(tmp_path, "own")
    assert rows[0]["configuration"] == ROWS[0]["configuration"]
    assert searches.table(rows) == searches.table(ROWS)


def test_shifted_images_have_a_column_each() -> None:
    lines = report.columns_table(ROWS, report.shifts(ROWS)).splitlines()
    assert lines[0] == "| method | as it is, % | noisy, % |"
    assert lines[2].startswith("| S | 60.0 ± ")
    assert " | 30.0 ± " in lines[2]
    assert lines[3].startswith("| LoRA | 65.0 ± ")
    assert report.shifts([{key: PLAIN[key] for key in ("test", "seed")}]) == []


def test_scores_have_their_own_digits() -> None:
    rows = [{**own, "nist": 1.5 + own["seed"], "bleu": 12.25} for own in ROWS]
    columns = [own for own in report.SCORES if own.key in rows[0]]
    lines = report.columns_table(rows, columns).splitlines()
    assert lines[0] == "| method | BLEU | NIST |"
    assert lines[2] == "| S | 12.2 ± 0.0 | 2.00 ± 0.00 |"


def test_the_same_results_draw_the_same_curve(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    searches.draw(ROWS, "title", first)
    searches.draw(ROWS, "title", second)
    assert first.read_bytes() == second.read_bytes()
    changed = [row(0, epoch_losses=[3.0, 0.5]), *ROWS[1:]]
    searches.draw(changed, "title", second)
    assert first.read_bytes() != second.read_bytes()
