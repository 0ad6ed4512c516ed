"""Models and data: each module has `load(**settings)`, which returns a `Task`.

`SOURCES` of a module names the files that its runs depend on besides, of this package's folder or
of superlora, `PACKAGES`, where there is one, the libraries besides torch and NumPy.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

FOLDERS = ("SUPERLORA_CIFAR", "SUPERLORA_VIT", "SUPERLORA_E2E", "SUPERLORA_LM")
"""Environment variables that name folders of models and data."""


class Task(Protocol):
    """A pre-trained model with data, on which a design can be trained."""

    def measure(
        self, design: Any, *, rate: float, scale: float, seed: int, test: bool
    ) -> dict[str, Any]:
        """Train a design, and return `parameters`, `seconds`, and `test` or `validation`.

        Of these two, more is better. The model is afterwards as it was. `rate` is the design's
        learning rate, or the head's for None; `scale` multiplies the update.
        """


def module(name: str) -> Any:
    """Return the module of a task."""
    return importlib.import_module(f"experiments.tasks.{name}")


def load(name: str, settings: Mapping[str, Any], folder: Path) -> Task:
    """Return the task of a module, which may keep what it trains beside the runs of a folder."""
    own = module(name)
    kept = {"folder": folder} if "folder" in inspect.signature(own.load).parameters else {}
    found: Task = own.load(**settings, **kept)
    return found
