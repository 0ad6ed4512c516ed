"""Figures as SVG: the same results make the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def new(width: float, height: float, **axes: Any) -> tuple[Any, Any]:
    """Return a figure of so many inches and its axes, without a window."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot(**axes)


def save(figure: Any, path: Path, salt: str) -> None:
    """Write a figure without a date, and with identifiers that the salt fixes."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(path, format="svg", metadata={"Date": None})
