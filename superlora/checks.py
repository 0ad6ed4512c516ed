"""What a user may pass as a value: counts, and lists made hashable."""

from __future__ import annotations

import numbers
from typing import Any


def hashable(value: Any) -> Any:
    """Return lists as tuples, at any depth, and numbers as Python's own."""
    if isinstance(value, (list, tuple)):
        return tuple(map(hashable, value))
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def check_count(name: str, value: object, least: int = 1) -> int:
    """Return `value` if it is an integer of at least `least`, or say what it must be."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer: got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}: got {value}")
    return value
