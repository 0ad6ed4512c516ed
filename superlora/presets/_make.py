"""What the presets share."""

from __future__ import annotations

from typing import Any

from superlora.design.spec import Spec


def make(changes: dict[str, Any], **fields: Any) -> Spec:
    """Return a spec of a preset's fields, those that the user changed last."""
    return Spec(**{**fields, **changes})


def by_rank(changes: dict[str, Any], rank: int) -> dict[str, Any]:
    """Return changes with the scale that alpha makes of this rank, which the spec's are not."""
    scales = {name: changes[name] for name in ("alpha", "rslora", "scale") if name in changes}
    others = {name: value for name, value in changes.items() if name not in scales}
    return {**others, "scale": Spec(rank=rank, **scales).scaling} if scales else others


def refuse_rank(preset: str, changes: dict[str, Any]) -> None:
    """Refuse a rank where the preset has none."""
    if "rank" in changes:
        raise TypeError(f"{preset}() must have no rank, it is fixed: got {changes['rank']}")
