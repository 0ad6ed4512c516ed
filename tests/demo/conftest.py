"""Small results and a tiny transformer that several tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def make_result() -> Callable[..., Any]:
    """Return a function that makes a `Result` from a family, a rank and three numbers."""
    pytest.importorskip("rich")
    from superlora.demo.points import Result

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
            key=f"{family}-{rank}",
        )

    return make
