"""Drawings of several designs side by side, beside real digits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from torch import Tensor

from experiments import results, tasks
from experiments.analysis import points
from experiments.experiment import experiment
from experiments.judge import features_of, frechet_distance, recognised
from experiments.tasks.drawing import Drawing
from superlora.demo.data import Images

Panel = tuple[str, Any, float]
"""A title, a design or None, and its learning rate."""


METHODS = (
    *("not adapted", "LoRA r1", "LoRA r8", "SuperLoRA 2-D r8", "LoRTA 3-D r16"),
    *("2-D r8, fastfood ρ 0.1", "dense"),
)
SEED, EACH = 0, 8  # of the figure in the docs
COLUMNS = 4


def of_results(folder: Path) -> tuple[Figure, str]:
    """Return the drawings of some methods at the rates that the experiment chose, and checks."""
    own = experiment("drawing")
    _, rows = results.read(folder, "drawing")
    rates = {point.method: point.rate for point in points(rows)}
    missing = [name for name in METHODS if name not in rates]
    if missing:
        raise ValueError(f"drawing must have results of {METHODS}: {missing} have none")
    designs = {method.name: method.design for method in own.methods}
    torch.set_num_threads(1)  # as the runs had
    task: Any = tasks.load(own.task, own.settings, folder)
    panels = [(name, designs[name], rates[name]) for name in METHODS]
    return drawings(task, panels, seed=SEED, each=EACH), checks(task, own.seeds)


def checks(task: Drawing, seeds: Sequence[int]) -> str:
    """Say how far real digits are from each other, and how the old digits are drawn and read."""
    own = [task.parts(seed) for seed in seeds]
    real = [
        frechet_distance(
            *(features_of(task.judge, part.pixels) for part in (each.test, each.train))
        )
        for each in own
    ]
    drawn = task.draw(None, rate=0.0, scale=1.0, seed=SEED, each=task.drawn)
    return (
        f"real digits to real ones: {min(real):.1f} to {max(real):.1f}; old digits that are drawn "
        f"and read as they should be: {recognised(task.judge, drawn):.0%}"
    )


def drawings(task: Drawing, panels: Sequence[Panel], *, seed: int, each: int) -> Figure:
    """Return real digits and each design's drawings from one noise, a row for each digit."""
    found = {"real": first_of_each(task.parts(seed).test, each)}
    for title, design, rate in panels:
        drawn = task.draw(design, rate=rate, scale=1.0, seed=seed, each=each)
        found[title] = mosaic(drawn.pixels, each)
    return figure(found)


def first_of_each(images: Images, each: int) -> Tensor:
    """Return so many images of each label as a mosaic."""
    rows = [images.pixels[images.labels == label][:each] for label in images.labels.unique()]
    return mosaic(torch.cat(rows), each)


def mosaic(pixels: Tensor, columns: int) -> Tensor:
    """Return images (rows · columns, side, side) as one image, row by row."""
    tiles = pixels.unflatten(0, (-1, columns)).transpose(1, 2)
    whole: Tensor = tiles.flatten(2).flatten(0, 1)
    return whole


def figure(mosaics: Mapping[str, Tensor]) -> Figure:
    """Return titled mosaics from left to right, row by row."""
    columns = min(COLUMNS, len(mosaics))
    rows = math.ceil(len(mosaics) / columns)
    drawn = pyplot.figure(figsize=(2.2 * columns, 1.6 * rows), layout="constrained")
    for number, (title, own) in enumerate(mosaics.items(), 1):
        place = drawn.add_subplot(rows, columns, number)
        place.imshow(own.numpy(), cmap="gray_r", vmin=0, vmax=255, interpolation="nearest")
        place.set_title(title, fontsize=9)
        place.set_axis_off()
    return drawn


def save(drawn: Figure, path: Path) -> None:
    """Write a figure as PNG or SVG, by the path's ending."""
    # No date, so that the same drawings make the same file.
    drawn.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else {})
    pyplot.close(drawn)
