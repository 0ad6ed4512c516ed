"""Say which extra is missing. This imports the standard library alone."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence


def require(modules: Sequence[str], extra: str) -> None:
    """End the program with one line where a module of an extra is not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"superlora: {', '.join(missing)} not installed; this command needs the extra "
            f"{extra!r}: pip install 'superlora[{extra}]'"
        )
