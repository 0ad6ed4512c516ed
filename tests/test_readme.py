"""What README.md says is what the code does."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("tables", None)


def test_the_table_of_presets_is_generated(tables):
    assert tables.between(README, "presets") == tables.preset_table()


def _blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_lines_of_numpy_run(capsys):
    names: dict = {}
    exec(_blocks()[0], names)
    assert names["delta"].shape == (768, 768)
    assert "trainable parameters" in capsys.readouterr().out


def test_the_lines_of_torch_run(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    model = torch.nn.ModuleDict({name: torch.nn.Linear(8, 8) for name in ("query", "value", "key")})
    names = {"torch": torch, "model": model}
    monkeypatch.chdir(tmp_path)
    exec(_blocks()[1], names)
    assert names["adapter"].merged
    assert (tmp_path / "adapter.safetensors").stat().st_size > 8 * 8 * 4 * 4


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#:]+)\)", README))
def test_the_files_that_it_links_exist(path):
    assert (ROOT / path).exists()
