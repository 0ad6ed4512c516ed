"""The figures of the GLoRA experiment: what the layers chose, and where the parameters went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.patches import Patch

from superlora.search import Space

Row = dict[str, Any]
# No date and no random identifiers, so that the same numbers make the same file.
matplotlib.rcParams["svg.hashsalt"] = "superlora"
LETTERS = {
    "scale_weight": "A",
    "add_weight": "B",
    "weight_to_bias": "C",
    "scale_bias": "D",
    "add_bias": "E",
}
KINDS = ("none", "constant", "vector", "the smaller of two ranks", "the only rank, or the larger")
COLOURS = ("#f0f0f0", "#f0e442", "#56b4e9", "#e69f00", "#b2182b")
TYPE_COLOURS = ("#0072b2", "#56b4e9", "#d55e00", "#e69f00")


def kind(option: int | str, ranks: Sequence[int]) -> int:
    """Return which of `KINDS` an option is."""
    if isinstance(option, str):
        return KINDS.index(option)
    return 4 if option == max(ranks) else 3


def by_type(layers: Sequence[str]) -> list[str]:
    """Return the layers sorted by type, then by block."""
    types = list(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))
    return sorted(layers, key=lambda layer: types.index(layer.rpartition(".")[2]))


def choices(rows: Sequence[Row], path: Path) -> None:
    """Draw what each layer chose, a panel a search, a line a support tensor and seed."""
    names = list(dict.fromkeys(row["method"] for row in rows))
    figure, panels = pyplot.subplots(
        len(names), 1, figsize=(9, 0.5 + 2.1 * len(names)), squeeze=False
    )
    norm = BoundaryNorm([index - 0.5 for index in range(len(KINDS) + 1)], len(KINDS))
    for axes, name in zip(panels[:, 0], names, strict=True):
        own = [row for row in rows if row["method"] == name]
        layers = by_type(list(own[0]["configuration"]))
        grid = [
            [kind(row["configuration"][layer][operation], row["ranks"]) for layer in layers]
            for operation in LETTERS
            for row in own
        ]
        axes.imshow(grid, aspect="auto", cmap=ListedColormap(COLOURS), norm=norm)
        axes.set_title(name, fontsize=9, loc="left")
        middles = [(index + 0.5) * len(own) - 0.5 for index in range(len(LETTERS))]
        axes.set_yticks(middles, LETTERS.values())
        for index in range(1, len(LETTERS)):
            axes.axhline(index * len(own) - 0.5, color="#333333", linewidth=0.8)
        ends = _ends(layers)
        for end in list(ends.values())[:-1]:
            axes.axvline(end - 0.5, color="#333333", linewidth=0.8)
        starts = [0, *ends.values()][: len(ends)]
        centres = [(a + b - 1) / 2 for a, b in zip(starts, ends.values(), strict=True)]
        axes.set_xticks(centres, [f"{kind}, first to last block" for kind in ends], fontsize=8)
        axes.tick_params(length=0)
    handles = [Patch(color=colour, label=name) for name, colour in zip(KINDS, COLOURS, strict=True)]
    figure.legend(handles=handles, ncols=len(KINDS), fontsize=8, loc="lower center", frameon=False)
    figure.tight_layout(rect=(0, 0.25 / figure.get_figheight(), 1, 1))
    _save(figure, path)


def agreement(rows: Sequence[Row]) -> tuple[int, int, float]:
    """Return how many choices there are, in how many all seeds agree, and what chance would give.

    Chance is what each search chose for an operation, shuffled over the layers.
    """
    count, agreed, expected = 0, 0, 0.0
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row["configuration"] for row in rows if row["method"] == name]
        layers = list(own[0])
        for operation in LETTERS:
            chosen = [[each[layer][operation] for layer in layers] for each in own]
            count += len(layers)
            agreed += sum(len(set(options)) == 1 for options in zip(*chosen, strict=True))
            for option in set(chosen[0]):
                shares = [each.count(option) / len(layers) for each in chosen]
                expected += len(layers) * math.prod(shares)
    return count, agreed, expected


def _ends(layers: Sequence[str]) -> dict[str, int]:
    return {layer.rpartition(".")[2]: index + 1 for index, layer in enumerate(layers)}


def where(row: Row, space: Space) -> dict[str, int]:
    """Return the parameters of a configuration by the type of the layers."""
    costs = dict.fromkeys((layer.rpartition(".")[2] for layer in space.layers), 0)
    indices = space.indices(row["configuration"])
    for (layer, _), options, index in zip(space.categoricals, space.costs, indices, strict=True):
        costs[layer.rpartition(".")[2]] += options[index]
    return costs


def _widths(space: Space) -> dict[str, int]:
    """Return LoRA's parameters by the type of the layer, for a rank of 1."""
    found: dict[str, int] = {}
    for layer, widths in space.layers.items():
        name = layer.rpartition(".")[2]
        found[name] = found.get(name, 0) + sum(widths)
    return found


def parameters(rows: Sequence[Row], spaces: dict[str, Space], path: Path) -> None:
    """Draw where the parameters of each search went, in shares, as means over the seeds."""
    spent: dict[str, list[dict[str, int]]] = {}
    for row in rows:
        spent.setdefault(row["method"], []).append(where(row, spaces[row["space"]]))
    spent["LoRA, for comparison"] = [_widths(next(iter(spaces.values())))]
    figure, axes = pyplot.subplots(figsize=(8, 1.0 + 0.36 * len(spent)))
    for place, own in enumerate(spent.values()):
        left = 0.0
        for colour, kind_of in zip(TYPE_COLOURS, own[0], strict=False):
            share = sum(100 * each[kind_of] / sum(each.values()) for each in own) / len(own)
            label = kind_of if place == 0 else None
            axes.barh(place, share, left=left, color=colour, label=label)
            if share > 6:
                axes.text(left + share / 2, place, f"{share:.0f}", ha="center", va="center")
            left += share
    axes.set_yticks(range(len(spent)), spent, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("% of the parameters, mean over the seeds")
    axes.set_xlim(0, 100)
    figure.legend(fontsize=8, ncols=4, loc="outside upper center", frameon=False)
    figure.set_layout_engine("constrained")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    figure.savefig(path, dpi=150, metadata=metadata)
    pyplot.close(figure)
