"""What README.md says is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def test_it_is_short_and_no_placeholder_is_left():
    assert len(README.splitlines()) <= 150
    assert not re.findall(r"^[A-Z_x]+$", README, flags=re.MULTILINE)


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#:]+)\)", README))
def test_the_files_that_it_links_exist(path):
    assert (ROOT / path).exists()
