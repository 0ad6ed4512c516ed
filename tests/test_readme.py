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


def test_no_placeholder_is_left():
    assert not re.findall(r"^[A-Z_x]+$", README, flags=re.MULTILINE)
    assert "|" in README.split("<!-- demo -->")[1].split("<!-- /demo -->")[0]


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#:]+)\)", README))
def test_the_files_that_it_links_exist(path):
    assert (ROOT / path).exists()
