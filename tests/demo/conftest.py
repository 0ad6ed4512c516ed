"""Small results and a tiny transformer that several tests share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conftest import is_installed, on_one_thread


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with on_one_thread() if is_installed("torch") else contextlib.nullcontext():
        yield


@pytest.fixture
def make_result() -> Callable[..., Any]:
    """Return a function that makes a `Result` from a family, a rank and three numbers."""
    from superlora.demo.methods import Result

    def make(
        family: str, rank: int | None, parameters: int, test: float, validation: float = 0.5
    ) -> Result:
        return Result(
            method=family if rank is None else f"{family} r{rank}",
            family=family,
            rank=rank,
            parameters=parameters,
            rate=1e-3,
            validation_accuracy=validation,
            test_accuracy=test,
            test_correct=round(1000 * test),
            seconds=1.25,
            file_bytes=4 * parameters,
        )

    return make
