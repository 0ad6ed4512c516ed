"""Models and data: each module has `load(**settings)`, which returns a `Task`.

`SOURCES` of a module names the files that its runs depend on besides, of this package's folder or
of superlora.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol


class Task(Protocol):
    """A pre-trained model with data, on which a design can be trained."""

    def measure(self, design: Any, *, rate: float, scale: float, seed: int) -> dict[str, Any]:
        """Train a design, and return `parameters`, `validation`, `test`, `seconds` and more.

        Of `validation` and `test`, more is better. The model is afterwards as it was. `rate` is the
        design's learning rate, or the head's for None; `scale` multiplies the update.
        """


def module(name: str) -> Any:
    """Return the module of a task."""
    return importlib.import_module(f"experiments.tasks.{name}")


def load(name: str, settings: Mapping[str, Any]) -> Task:
    """Return the task of a module."""
    found: Task = module(name).load(**settings)
    return found
