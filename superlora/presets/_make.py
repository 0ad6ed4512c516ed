"""What the presets share."""

from __future__ import annotations

from typing import Any

from superlora.spec import Spec


def make(changes: dict[str, Any], **fields: Any) -> Spec:
    """Return a spec of a preset's fields, those that the user changed last."""
    return Spec(**{**fields, **changes})


def refuse_rank(preset: str, changes: dict[str, Any]) -> None:
    """Refuse a rank where the preset has none."""
    if "rank" in changes:
        raise TypeError(f"{preset}() must have no rank, it is fixed: got {changes['rank']}")
