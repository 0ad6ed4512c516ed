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
from superlora.demo import search  # noqa: E402
from superlora.demo.fitting import evaluator  # noqa: E402
from superlora.demo.search import Options, run, space_of  # noqa: E402
from superlora.demo.search_config import SearchError  # noqa: E402
from superlora.demo.supernet import (  # noqa: E402
    STATE_FILE,
    SUPERNET_FILE,
    load_supernet,
    train_supernet,
)
from superlora.demo.train import new_head  # noqa: E402
from superlora.search import Supernet  # noqa: E402
from tests.demo.search_cases import CONFIG, make_base, make_task  # noqa: E402

QUIET = Console(quiet=True)


def trained(folder: Path, seed: int = 0, **options: Any) -> Any:
    folder.mkdir(exist_ok=True)
    return train_supernet(
        make_base().fuse(), make_task(), CONFIG.supernet, seed, folder, surroundings={}, **options
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_a_supernet_of_own_operations_and_rates(tmp_path: Path) -> None:
    settings = dataclasses.replace(
        CONFIG.supernet,
        epochs=1,
        rates={"add_weight": 1e-9},
        options={"add_weight": ["rank", "none"], "scale_weight": ["none"]},
    )
    model = make_base().fuse()
    found = train_supernet(model, make_task(), settings, 0, tmp_path, surroundings={})
    space = found.supernet.space
    assert space == space_of(make_base().fuse(), settings)
    assert space.operations["add_weight"] == (4, 2, "none")
    assert space.operations["scale_weight"] == ("none",)
    assert space.operations["add_bias"] == ("vector", "constant", "none")
    largest = {
        operation: max(
            float(found.supernet.stored(layer)[operation][0].detach().abs().max())
            for layer in found.supernet.layers()
        )
        for operation in ("add_weight", "add_bias")
    }
    assert 0 < largest["add_weight"] < 1e-7 < 1e-3 < largest["add_bias"]


def test_training_goes_on_after_any_epoch(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole")

    def stop(epoch: int, loss: float) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", epoch=stop)
    assert (tmp_path / "parts" / STATE_FILE).exists()
    assert not (tmp_path / "parts" / SUPERNET_FILE).exists()
    epochs: list[int] = []
    again = trained(tmp_path / "parts", epoch=lambda epoch, loss: epochs.append(epoch))
    assert epochs == [3]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert again.digest() == whole.digest()


def test_a_state_that_cannot_be_read_starts_again(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole")
    for index, damage in enumerate((b"", b"no state")):
        folder = tmp_path / str(index)
        folder.mkdir()
        (folder / STATE_FILE).write_bytes(damage)
        assert trained(folder).digest() == whole.digest()


def test_a_state_that_is_read_in_part_starts_again(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole")

    def stop(epoch: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", epoch=stop)
    state = torch.load(tmp_path / "parts" / STATE_FILE, weights_only=True)
    state["optimiser"]["param_groups"] = []  # after factors and head
    torch.save(state, tmp_path / "parts" / STATE_FILE)
    assert trained(tmp_path / "parts").digest() == whole.digest()


def test_a_trained_supernet_is_found(tmp_path: Path) -> None:
    first = trained(tmp_path)
    epochs: list[int] = []
    again = trained(tmp_path, epoch=lambda epoch, loss: epochs.append(epoch))
    assert epochs == []
    for one, other in zip(first.supernet.parameters(), again.supernet.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(first.head.weight, again.head.weight)
    assert first.head.weight.any()
    assert again.supernet.configuration is None


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(SearchError, match="same settings: its supernet has seed 0 instead of 1"):
        trained(tmp_path, seed=1)
    assert contents(tmp_path) == before


def test_a_supernet_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    found = trained(tmp_path)
    model = make_base().fuse()
    with pytest.raises(SearchError, match="must be the head of 7 classes"):
        load_supernet(model, found.file, 7)
    with pytest.raises(SearchError, match=r"supernet-head\.safetensors must be the head"):
        load_supernet(model, tmp_path / "none" / "supernet.safetensors", 10)
    with pytest.raises(SearchError, match="must be a supernet of this model"):
        load_supernet(make_base(), found.file, 10)  # query, key and value apart
    assert not any(isinstance(part, Supernet) for part in model.modules())


def searched(folder: Path, **options: Any) -> list[search.Found]:
    return run(CONFIG, Options(folder, **options), make_task(), make_base(), console=QUIET)


def test_a_search_from_training_to_the_saved_adapter(tmp_path: Path) -> None:
    limits = (300, None)
    results = searched(tmp_path, limits=limits)
    assert [result.limit for result in results] == [300, None]
    for result, name in zip(results, ("limit-300", "no-limit"), strict=True):
        assert result.folder == tmp_path / name
        best = result.outcome.best
        assert len(result.outcome.trials) == CONFIG.search.trials
        assert all(trial.num_parameters >= 1 for trial in result.outcome.trials)
        if result.limit is not None:
            assert all(trial.num_parameters <= 300 for trial in result.outcome.trials)
        model = make_base().fuse()
        adapter = slt.load(model, result.folder / "adapter.safetensors")
        assert adapter.num_parameters == best.num_parameters
        head = new_head(model, 10)
        head.load_state_dict(load_file(result.folder / "head.safetensors"))
        task = make_task()
        assert evaluator(model, head, task.validation, 28)() == best.value
        assert evaluator(model, head, task.test, 28)() == result.test_accuracy
        content = json.loads((result.folder / "results.json").read_text())
        assert content["best"]["num_parameters"] == best.num_parameters
        assert content["best"]["configuration"] == best.configuration
        assert content["test_accuracy"] == result.test_accuracy
        assert content["space"]["size"] == str(900**8)
        assert content["seed"] == 0
        assert content["limit"] == result.limit
        counts = content["best"]["chosen"]["add_weight"]
        assert sum(counts.values()) == 8
        with (result.folder / "ranked.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        values = [(-float(row["value"]), int(row["num_parameters"])) for row in rows]
        assert len(rows) == CONFIG.search.trials
        assert values == sorted(values)


def test_a_second_run_evaluates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = searched(tmp_path)
    before = contents(tmp_path / "no-limit")

    def refuse(*arguments: Any) -> Any:
        def accuracy() -> float:
            raise AssertionError("nothing is left to evaluate")

        return accuracy

    monkeypatch.setattr(search, "evaluator", refuse)
    (again,) = searched(tmp_path)
    assert again.outcome == first.outcome
    assert contents(tmp_path / "no-limit") == before


def test_a_seed_decides_the_result(tmp_path: Path) -> None:
    one, same, other = (
        searched(tmp_path / name, seed=seed)[0] for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert one.outcome == same.outcome
    files = ("adapter.safetensors", "head.safetensors", "ranked.csv", "results.json")
    for name in files:
        assert (one.folder / name).read_bytes() == (same.folder / name).read_bytes()
        assert (one.folder / name).read_bytes() != (other.folder / name).read_bytes()


def test_two_objectives_give_a_front(tmp_path: Path) -> None:
    (result,) = searched(tmp_path, objectives=2)
    content = json.loads((result.folder / "results.json").read_text())
    front = [(point["num_parameters"], point["value"]) for point in content["front"]]
    assert front == sorted(front)
    assert front[-1][1] == max(trial.value for trial in result.outcome.trials)
    for count, value in front:
        for trial in result.outcome.trials:
            assert not (trial.num_parameters < count and trial.value >= value)


def test_a_saved_supernet_is_searched_as_it_is(tmp_path: Path) -> None:
    (first,) = searched(tmp_path / "a")
    before = contents(tmp_path / "a")
    (again,) = run(
        CONFIG,
        Options(tmp_path / "b"),
        make_task(),
        make_base(),
        saved=tmp_path / "a" / SUPERNET_FILE,
        console=QUIET,
    )
    assert again.outcome == first.outcome
    assert contents(tmp_path / "a") == before
    assert not (tmp_path / "b" / SUPERNET_FILE).exists()


def test_a_study_of_another_supernet_is_refused(tmp_path: Path) -> None:
    storage = str(tmp_path / "shared.db")
    searched(tmp_path / "a", storage=storage)
    with pytest.raises(ValueError, match="storage must hold a study of this search"):
        searched(tmp_path / "b", storage=storage, seed=1)
    trained(tmp_path / "other", seed=1)  # and all else the same
    saved = tmp_path / "other" / SUPERNET_FILE
    options = Options(tmp_path / "c", storage=storage)
    with pytest.raises(ValueError, match=r"of this search: .* has identity '[^']*' instead of"):
        run(CONFIG, options, make_task(), make_base(), saved=saved, console=QUIET)


def test_a_supernet_is_searched_on_the_images_it_was_trained_beside(tmp_path: Path) -> None:
    trained(tmp_path)
    saved = tmp_path / SUPERNET_FILE
    out = Options(tmp_path / "out")
    with pytest.raises(SearchError, match="must be searched on the images that it was trained"):
        run(CONFIG, out, make_task(seed=1), make_base(), saved=saved, console=QUIET)
    assert not list((tmp_path / "out").glob("*.db"))
    (tmp_path / "supernet.json").unlink()  # nothing is known then
    assert run(CONFIG, out, make_task(seed=1), make_base(), saved=saved, console=QUIET)


def test_a_limit_that_nothing_meets_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(SearchError, match="--limit must be at least 1"):
        searched(folder, limits=(0,))
    assert not folder.exists()


def test_the_base_stays_as_it_was(tmp_path: Path) -> None:
    base = make_base()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    run(CONFIG, Options(tmp_path), make_task(), base, console=QUIET)
    after = base.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_files_that_classify_otherwise_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter((5, 7, 6))  # validation, test, validation of what was loaded
    monkeypatch.setattr(search, "count_correct", lambda *arguments: next(counts))
    with pytest.raises(SearchError, match="5 validation images right then, 6 once it was loaded"):
        searched(tmp_path)


SLOW_RUN = """
import sys, time, torch
from pathlib import Path
from superlora.demo import fitting, search
from tests.demo.search_cases import CONFIG, make_base, make_task
torch.set_num_threads(1)
measured = search.evaluator
def slow(*arguments):
    accuracy = measured(*arguments)
    def call():
        time.sleep(0.1)
        return accuracy()
    return call
search.evaluator = slow
search.run(CONFIG, search.Options(Path(sys.argv[1])), make_task(), make_base())
"""


@pytest.mark.slow
def test_a_killed_search_goes_on_and_loses_no_finished_trial(tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    file = folder / search.STUDY_FILE

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
    assert not (folder / "no-limit").exists()
    before = finished()
    (again,) = searched(folder)
    assert [trial.value for trial in again.outcome.trials][: len(before)] == before
    assert len(again.outcome.trials) == CONFIG.search.trials


def test_vtab_is_searched_from_its_files(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    from superlora.demo.search_config import load_config
    from superlora.demo.tasks import load_task
    from tests.demo.search_cases import make_vtab

    packaged = load_config("vtab-1k", quick=True)
    config = dataclasses.replace(CONFIG, data="vtab-1k", tasks=packaged.tasks)
    data = make_vtab(tmp_path / "vtab")

    def refuse() -> bytes:
        raise AssertionError("VTAB-1K needs no digits")

    task = load_task(config, data, "dsprites_loc", refuse, 0)
    (result,) = run(config, Options(tmp_path / "out"), task, make_base(), console=QUIET)
    head = load_file(result.folder / "head.safetensors")
    assert head["weight"].shape == (16, 16)
    content = json.loads((result.folder / "results.json").read_text())
    assert content["images"] == {"train": 32, "validation": 16, "test": 16}
    assert content["task"] == "dsprites_loc"
