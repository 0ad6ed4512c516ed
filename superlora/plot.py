"""Pictures of a plan: weights as bands on every group's fold, a weight's network as a diagram."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy

from superlora.design.layout import Layout
from superlora.design.network import Network, Term
from superlora.design.placement import placements

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Cells of a picture of a fold along each side; a larger fold is sampled.
_CELLS = 400
# Groups that are drawn.
_GROUPS = 12


def draw_folds(layout: Layout) -> Figure:
    """Draw which weight every part of each group's fold is of; a stack of modes is one side."""
    groups = range(min(_GROUPS, len(layout.groups)))
    figure, places = new_figure(len(groups))
    names = list(layout.shapes)
    for group, place in zip(groups, places, strict=True):
        fold = layout.groups[group].fold
        rows, columns = math.prod(fold[:-1]), fold[-1]
        row, column = (
            numpy.linspace(0, size - 1, min(size, _CELLS)).round().astype(int)
            for size in (rows, columns)
        )
        entries = row[:, None] * columns + column
        owner = numpy.full(entries.shape, numpy.nan)
        members = layout.grouping.members[group]
        for name in members:
            for each in placements(layout, name):
                if each.group == group and each.boxes:
                    owner[(each.start <= entries) & (entries < each.stop)] = names.index(name)
        place.imshow(
            owner, aspect="auto", cmap="tab20", vmin=0, vmax=max(1, len(names) - 1),
            extent=(0, columns, rows, 0), interpolation="nearest",
        )  # fmt: skip
        shown = ", ".join(members[:3]) + (f", … {len(members)} in all" if members[3:] else "")
        mixed = "" if layout.in_place(group) else ", mixed by its map"
        place.set_title(f"group {group}: {' × '.join(map(str, fold))}{mixed}\n{shown}", size=8)
    left = len(layout.groups) - len(groups)
    if left:
        figure.suptitle(f"{left} groups more are not shown", size=8)
    return figure


def draw_network(network: Network, name: str) -> Figure:
    """Draw blocks as points, joined where they share a label; open ends are axes of the update."""
    terms = list(network.terms())
    figure, places = new_figure(min(_GROUPS, len(terms)))
    for term, place in zip(terms, places, strict=False):
        _draw_term(network, term, place)
    figure.suptitle(name, size=9)
    return figure


def _draw_term(network: Network, term: Term, place: Axes) -> None:
    path = term.contraction
    count = len(term.operands)
    angles = [2 * math.pi * index / count for index in range(count)]
    points = [(math.cos(angle), math.sin(angle)) for angle in angles]
    ends: dict[int, list[int]] = {}
    for index, operand in enumerate(term.operands):
        for label in operand.labels:
            ends.setdefault(label, []).append(index)
        place.plot(*points[index], "o", color="lightsteelblue", markersize=14, zorder=2)
        block = network.sources[operand.source].block
        place.annotate(block, points[index], ha="center", va="center", size=7, zorder=3)
    opened = [label for label in path.output if label in ends]
    for label, own in ends.items():
        lines = [(points[one], points[other]) for one, other in itertools.pairwise(own)]
        if label in opened:
            x, y = points[own[0]]
            turn = 0.3 * (opened.index(label) - (len(opened) - 1) / 2)
            lines.append(((x, y), (1.6 * x - turn * y, 1.6 * y + turn * x)))
        for (x0, y0), (x1, y1) in lines:
            place.plot((x0, x1), (y0, y1), color="0.5", zorder=1)
            place.annotate(str(path.sizes[label]), ((x0 + 2 * x1) / 3, (y0 + 2 * y1) / 3), size=7)
    place.set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), aspect="equal")
    place.axis("off")


def new_figure(count: int, width: float = 3.2, height: float = 2.6) -> tuple[Figure, list[Any]]:
    """Return a figure of so many places of a size in inches, which no window shows."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "pictures need the extra 'plot': pip install 'superlora[plot]'", name=error.name
        ) from error
    across = max(1, min(4, count))
    down = max(1, -(-count // across))
    figure = Figure(figsize=(width * across, height * down), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(down, across, index + 1) for index in range(count)]
