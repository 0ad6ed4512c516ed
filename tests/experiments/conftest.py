"""The package of the experiments, which is beside the library and not a part of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
if BENCHMARKS.is_dir():
    sys.path.append(str(BENCHMARKS))
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Train on one thread: for so small a model, more of them wait for each other."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
