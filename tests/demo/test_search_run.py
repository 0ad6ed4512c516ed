"""Supernets that are trained, searched and extracted, and runs that go on where others stopped."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("optuna")
pytest.importorskip("rich")
pytest.importorskip("safetensors")

from rich.console import Console  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import superlora.torch as slt  # noqa: E402
from superlora.demo.search import STUDY_FILE, run  # noqa: E402
from superlora.demo.supernet import (  # noqa: E402
    RECORD_FILE,
    SUPERNET_FILE,
    Trained,
    fuse,
    new_supernet,
    train_supernet,
)
from superlora.demo.train import Classifier  # noqa: E402
from superlora.search import Outcome  # noqa: E402
from tests.demo.search_cases import SETTINGS, make_base, make_images  # noqa: E402

QUIET = Console(quiet=True)


def trained(folder: Path, seed: int = 0, **options: Any) -> Trained:
    return train_supernet(make_base(), make_images(), SETTINGS, seed, folder, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def searched(folder: Path, **options: Any) -> list[tuple[Path, Outcome]]:
    images, console = make_images(options.get("seed", 0)), QUIET
    found = run(make_base(), images, SETTINGS, folder, console=console, **options)
    return list(found.items())


def test_a_supernet_of_own_rates_and_fewer_options(tmp_path: Path) -> None:
    rates = {**SETTINGS.rates, "add_weight": 1e-9}
    settings = dataclasses.replace(SETTINGS, epochs=1, rates=rates, every_option=False)
    found = train_supernet(make_base(), make_images(), settings, 0, tmp_path)
    space = found.supernet.space
    assert space == new_supernet(fuse(make_base()), settings, 0).space
    assert space.operations["add_weight"] == (4, 2, "none")
    assert space.operations["scale_weight"] == (4, 2, "vector", "constant", "none")
    largest = {
        operation: max(
            float(found.supernet.stored(layer)[operation][0].detach().abs().max())
            for layer in found.supernet.layers()
        )
        for operation in ("add_weight", "add_bias")
    }
    assert 0 < largest["add_weight"] < 1e-7 < 1e-3 < largest["add_bias"]


def test_training_that_was_interrupted_starts_again(tmp_path: Path) -> None:
    def stop(epoch: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", after_epoch=stop)
    whole = trained(tmp_path / "whole")
    assert trained(tmp_path / "parts").digest == whole.digest
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_trained_supernet_is_found(tmp_path: Path) -> None:
    first = trained(tmp_path)
    epochs: list[int] = []
    again = trained(tmp_path, after_epoch=lambda epoch, loss: epochs.append(epoch))
    assert epochs == []
    for one, other in zip(first.supernet.parameters(), again.supernet.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(first.classifier.head.weight, again.classifier.head.weight)
    assert first.classifier.head.weight.any()
    assert again.losses == first.losses
    assert again.supernet.configuration is None


def test_a_folder_of_other_settings_or_images_is_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="images and settings, or none: got one with seed 0 inst"):
        trained(tmp_path, seed=1)
    with pytest.raises(ValueError, match="got one with data "):
        train_supernet(make_base(), make_images(seed=1), SETTINGS, 0, tmp_path)
    assert contents(tmp_path) == before


def test_a_search_from_training_to_the_saved_adapter(tmp_path: Path) -> None:
    results = searched(tmp_path, limits=(300, None))
    assert [folder for folder, _ in results] == [tmp_path / "limit-300", tmp_path / "no-limit"]
    for limit, (folder, outcome) in zip((300, None), results, strict=True):
        best = outcome.best
        assert len(outcome.trials) == SETTINGS.trials
        most = limit or outcome.space.most_parameters
        assert all(1 <= trial.num_parameters <= most for trial in outcome.trials)
        classifier = Classifier(fuse(make_base()), 10, 28)
        adapter = slt.load(classifier.model, folder / "adapter.safetensors")
        assert adapter.num_parameters == best.num_parameters
        classifier.head.load_state_dict(load_file(folder / "head.safetensors"))
        images = make_images()
        assert classifier.accuracy(images.validation) == best.value
        content = json.loads((folder / "results.json").read_text())
        assert content["test_accuracy"] == classifier.accuracy(images.test)
        assert content["best"]["num_parameters"] == best.num_parameters
        assert content["best"]["configuration"] == best.configuration
        assert content["space"]["size"] == str(900**8)
        assert content["limit"] == limit
        with (folder / "ranked.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        values = [(-float(row["value"]), int(row["num_parameters"])) for row in rows]
        assert len(rows) == SETTINGS.trials
        assert values == sorted(values)


def test_a_second_run_evaluates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ((folder, first),) = searched(tmp_path)
    before = contents(folder)

    def refuse(*arguments: Any) -> float:
        raise AssertionError("nothing is left to train or to evaluate")

    def keep(base: Any, images: Any, found: Trained, *rest: Any) -> float:
        return float(json.loads(before["results.json"])["test_accuracy"])

    monkeypatch.setattr("superlora.demo.search.keep", keep)
    monkeypatch.setattr("superlora.demo.supernet.fit", refuse)
    monkeypatch.setattr(Classifier, "accuracy", refuse)
    ((_, again),) = searched(tmp_path)
    assert again == first
    assert contents(folder) == before


def test_a_seed_decides_the_result(tmp_path: Path) -> None:
    one, same, other = (
        searched(tmp_path / name, seed=seed)[0] for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert one[1] == same[1]
    for name in ("adapter.safetensors", "head.safetensors", "ranked.csv", "results.json"):
        assert (one[0] / name).read_bytes() == (same[0] / name).read_bytes()
        assert (one[0] / name).read_bytes() != (other[0] / name).read_bytes()


def test_two_objectives_give_a_front(tmp_path: Path) -> None:
    ((folder, outcome),) = searched(tmp_path, objectives=2)
    content = json.loads((folder / "results.json").read_text())
    front = [(point["num_parameters"], point["value"]) for point in content["front"]]
    assert front == sorted(front)
    assert front[-1][1] == max(trial.value for trial in outcome.trials)


def test_a_saved_supernet_is_searched_as_it_is(tmp_path: Path) -> None:
    ((_, first),) = searched(tmp_path / "a")
    before = contents(tmp_path / "a")
    ((_, again),) = searched(tmp_path / "b", saved=tmp_path / "a")
    assert again == first
    assert contents(tmp_path / "a") == before
    assert not (tmp_path / "b" / SUPERNET_FILE).exists()
    with pytest.raises(ValueError, match="must have a supernet of the same images and settings"):
        searched(tmp_path / "c", saved=tmp_path / "a", seed=1)
    assert not (tmp_path / "c").exists()


def test_a_study_of_another_supernet_is_refused(tmp_path: Path) -> None:
    storage = str(tmp_path / "shared.db")
    searched(tmp_path / "a", storage=storage)
    with pytest.raises(ValueError, match="storage must hold a study of this search"):
        searched(tmp_path / "b", storage=storage, seed=1)


def test_a_limit_that_nothing_meets_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(ValueError, match="--limit must be at least"):
        searched(folder, limits=(0,))
    assert not folder.exists()


def test_the_base_stays_as_it_was(tmp_path: Path) -> None:
    base = make_base()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    run(base, make_images(), SETTINGS, tmp_path, console=QUIET)
    after = base.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_files_that_classify_otherwise_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path)
    saved = slt.Adapter.save

    def damaged(adapter: slt.Adapter, path: Path) -> None:
        own = [factor.detach().clone() for factor in adapter.parameters()]
        for factor in adapter.parameters():
            factor.data.normal_(std=10)
        saved(adapter, path)
        for factor, value in zip(adapter.parameters(), own, strict=True):
            factor.data.copy_(value)

    monkeypatch.setattr(slt.Adapter, "save", damaged)
    with pytest.raises(ValueError, match="must classify as before it was saved: expected "):
        searched(tmp_path)


SLOW_RUN = """
import sys, time, torch
from pathlib import Path
from superlora.demo import search
from superlora.demo.train import Classifier
from tests.demo.search_cases import SETTINGS, make_base, make_images
torch.set_num_threads(1)
measured = Classifier.accuracy
def slow(*arguments):
    time.sleep(0.1)
    return measured(*arguments)
Classifier.accuracy = slow
search.run(make_base(), make_images(), SETTINGS, Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_killed_search_goes_on_and_loses_no_finished_trial(tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    file = folder / STUDY_FILE

    def finished() -> list[float]:
        if not file.exists() or not file.stat().st_size:
            return []
        with sqlite3.connect(file) as database:
            try:
                rows = database.execute("SELECT value FROM trial_values ORDER BY trial_id")
            except sqlite3.OperationalError:  # the tables are being made
                return []
            return [value for (value,) in rows]

    process = subprocess.Popen([sys.executable, "-c", SLOW_RUN, str(folder)], env=os.environ)
    give_up = time.monotonic() + 120
    while len(finished()) < 4:
        assert process.poll() is None, "ended before it was killed"
        assert time.monotonic() < give_up
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / RECORD_FILE).exists()
    assert not (folder / "no-limit").exists()
    before = finished()
    ((_, again),) = searched(folder)
    assert [trial.value for trial in again.trials][: len(before)] == before
    assert len(again.trials) == SETTINGS.trials
