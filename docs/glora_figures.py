"""The figure of `glora-example.md`, from what the page's own code finds.

``python docs/glora_figures.py`` draws it anew.
"""

from __future__ import annotations

import doctest
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy
from matplotlib import pyplot
from matplotlib.axes import Axes

HERE = Path(__file__).parent
PAGE = HERE / "glora-example.md"
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def found() -> dict[str, Any]:
    """Run the page up to where the supernet is taken off, and return all names."""
    names: dict[str, Any] = {}
    folder = Path.cwd()
    with tempfile.TemporaryDirectory() as empty:
        os.chdir(empty)
        try:
            for block in FENCE.findall(PAGE.read_text("utf-8")):
                if "supernet.extract" in block:
                    break
                exec(doctest.script_from_examples(block), names)
        finally:
            os.chdir(folder)
    return names


def draw_values(axes: Axes, names: dict[str, Any]) -> None:
    """Draw value against parameters, with the front and the named configurations."""
    space, explained = names["space"], names["explained"]
    trials, front = names["both"].trials, names["front"]
    axes.scatter(
        [trial.num_parameters for trial in trials],
        [trial.value for trial in trials],
        s=8,
        color="0.75",
        label="evaluated, two objectives",
    )
    axes.step(
        [trial.num_parameters for trial in front],
        [trial.value for trial in front],
        where="post",
        marker=".",
        color="C0",
        label="their front",
    )
    best = names["best"]
    axes.plot(
        best.num_parameters,
        best.value,
        "*",
        markersize=11,
        color="C3",
        label="best of at most 100 parameters",
    )
    for name, configuration in names["named"].items():
        place = space.num_parameters(configuration), explained(configuration)
        axes.plot(*place, "x", color="black")
        axes.annotate(name, place, xytext=(4, -10), textcoords="offset points", fontsize=8)
    axes.set_xlabel("parameters")
    axes.set_ylabel("explained share of the variance")
    axes.legend(fontsize=8, loc="lower right")


def draw_choices(axes: Axes, names: dict[str, Any]) -> None:
    """Draw what the best configuration has for each layer and operation, darker for more."""
    space, configuration = names["space"], names["best"].configuration
    layers, operations = list(space.layers), list(space.operations)
    chosen = zip(space.costs, space.indices(configuration), strict=True)
    parameters = numpy.array([costs[index] for costs, index in chosen])
    shade = numpy.log1p(parameters).reshape(len(layers), len(operations))
    axes.imshow(shade, cmap="Blues", vmax=2 * shade.max())
    for row, layer in enumerate(layers):
        for column, name in enumerate(operations):
            option = configuration[layer][name]
            text = f"rank {option}" if isinstance(option, int) else option
            axes.text(column, row, text, ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(operations)), operations, rotation=30, ha="right")
    axes.set_yticks(range(len(layers)), [f"layer {layer}" for layer in layers])
    axes.set_title(f"the best: {names['best'].num_parameters} parameters", fontsize=10)


def main() -> None:
    """Draw the figure."""
    names = found()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.5, 4), width_ratios=[5, 4])
    draw_values(left, names)
    draw_choices(right, names)
    figure.tight_layout()
    figure.savefig(HERE / "_static" / "supernet-example.png", dpi=120)


if __name__ == "__main__":
    main()
