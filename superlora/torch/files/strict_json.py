"""JSON of files, read without trust: every key once, no number beyond a float or a seed."""

from __future__ import annotations

import json
import math
from typing import Any

MOST = 1 << 64


def parse(text: str | bytes) -> Any:
    """Return what a text says, or raise a ValueError or RecursionError that says why not."""
    return json.loads(
        text,
        object_pairs_hook=_once,
        parse_constant=_refuse,
        parse_float=_finite,
        parse_int=_bounded,
    )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"every key must be there once: got {twice[:200]!r} twice")
    return found


def _refuse(word: str) -> Any:
    raise ValueError(f"numbers must be finite: got {word}")


def _finite(digits: str) -> float:
    found = float(digits)
    return found if math.isfinite(found) else _refuse(digits[:50])


def _bounded(digits: str) -> int:
    if len(digits) > 21 or abs(int(digits)) > MOST:
        raise ValueError(f"integers must be at most 2**64: got {digits[:50]}")
    return int(digits)
