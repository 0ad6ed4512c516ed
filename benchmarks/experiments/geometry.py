"""What trained updates look like: spectra, subspaces of seeds and families, what groups share.

SuperLoRA's appendix A.6 draws the updates of a group. Here the methods of an experiment are trained
at their chosen rates, and the updates of each weight are compared by their singular vectors.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments import figures, results, tasks
from experiments.experiment import experiment

METHODS = (
    *("LoRA r8", "SuperLoRA 2-D r8", "LoRTA 3-D r16", "LoTR r16"),
    *("WaveFT 500 a weight", "dense, fastfood ρ 0.01", "dense"),
)
LEADING = 4  # singular vectors that make a subspace


@dataclass(frozen=True)
class Decomposed:
    """Singular values of an update, and its leading vectors, of the output and of the input."""

    values: Tensor
    bases: tuple[Tensor, Tensor]


Updates = Mapping[str, Decomposed]


def decomposed(updates: Mapping[str, Tensor], count: int = LEADING) -> dict[str, Decomposed]:
    """Return the singular value decomposition of every weight's update."""
    found = {}
    for name, own in updates.items():
        left, values, right = torch.linalg.svd(own, full_matrices=False)
        found[name] = Decomposed(values, (left[:, :count].clone(), right.mT[:, :count].clone()))
    return found


def spectrum(updates: Updates, count: int = 32) -> list[float]:
    """Return the squares of the singular values over their sum, averaged over the weights."""
    shares = [own.values[:count] ** 2 / (own.values**2).sum() for own in updates.values()]
    found: list[float] = torch.stack(shares).mean(0).tolist()
    return found


def stable_rank(updates: Updates) -> float:
    """Return ‖ΔW‖² over the square of the largest singular value, averaged over the weights."""
    ranks = [(own.values**2).sum() / own.values[0] ** 2 for own in updates.values()]
    return float(torch.stack(ranks).mean())


def overlap(one: Tensor, other: Tensor) -> float:
    """Return ‖UᵀV‖² / k of two orthonormal bases: 1 for one subspace, k / n by chance."""
    return float((one.mT @ other).square().sum()) / one.shape[1]


def mean_overlap(one: Updates, other: Updates) -> float:
    """Return the overlap of two updates' subspaces, averaged over weights and sides."""
    found = [
        overlap(own.bases[side], other[name].bases[side])
        for name, own in one.items()
        for side in (0, 1)
    ]
    return sum(found) / len(found)


def across_layers(updates: Updates, side: int) -> float:
    """Return the overlap of the subspaces of different layers' weights of one kind."""
    kinds: dict[str, list[Tensor]] = {}
    for name, own in updates.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(own.bases[side])
    found = [
        overlap(one, other)
        for own in kinds.values()
        for one, other in itertools.combinations(own, 2)
    ]
    return sum(found) / len(found)


def compared(found: Mapping[tuple[str, int], Updates]) -> dict[str, Any]:
    """Return spectra and overlaps of updates by method and seed."""
    methods = list(dict.fromkeys(method for method, _ in found))
    seeds = sorted({seed for _, seed in found})
    width = len(next(iter(next(iter(found.values())).values())).bases[1])

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    def pair(one: str, other: str) -> float:
        """Average over pairs of different seeds within a method, of equal ones between two."""
        if one == other:
            own = [(a, b) for a, b in itertools.combinations(seeds, 2)]
        else:
            own = [(seed, seed) for seed in seeds]
        return mean([mean_overlap(found[one, a], found[other, b]) for a, b in own])

    spectra = {
        method: torch.tensor([spectrum(found[method, seed]) for seed in seeds]).mean(0).tolist()
        for method in methods
    }
    return {
        "methods": methods,
        "leading": LEADING,
        "by_chance": LEADING / width,
        "spectra": spectra,
        "stable_rank": {m: mean([stable_rank(found[m, s]) for s in seeds]) for m in methods},
        "overlap": {one: {other: pair(one, other) for other in methods} for one in methods},
        "layers": {
            method: [
                mean([across_layers(found[method, s], side) for s in seeds]) for side in (0, 1)
            ]
            for method in methods
        },
    }


def measure(name: str, folder: Path = results.FOLDER) -> dict[str, Any]:
    """Train the methods of an experiment at their chosen rates, and compare the updates."""
    own = experiment(name)
    _, rows = results.read(folder, name)
    designs = {method.name: method.design for method in own.methods}
    torch.set_num_threads(1)  # as the runs had
    task: Any = tasks.load(own.task, own.settings, folder)
    found: dict[tuple[str, int], Updates] = {}
    for row in rows:
        if row["chosen"] and row["method"] in METHODS:
            settings = {key: row[key] for key in ("rate", "scale", "seed")}
            with task.trained(designs[row["method"]], **settings) as trained:
                deltas = trained.adapter.deltas()
                found[row["method"], row["seed"]] = decomposed(
                    {key: delta.detach().double() for key, delta in deltas.items()}
                )
    ordered = {(m, s): found[m, s] for m in METHODS for s in own.seeds if (m, s) in found}
    return {"experiment": name, "title": own.title, **compared(ordered)}


def write(made: dict[str, Any], folder: Path = results.FOLDER) -> None:
    """Write the comparison as JSON."""
    text = json.dumps(made, indent=1, default=float)
    (folder / "geometry.json").write_text(text + "\n", "utf-8")


def read(folder: Path = results.FOLDER) -> dict[str, Any]:
    """Return what was written."""
    found: dict[str, Any] = json.loads((folder / "geometry.json").read_text("utf-8"))
    return found


def overlaps(made: dict[str, Any]) -> str:
    """Return the overlaps as a Markdown table, whose columns are the rows' numbers."""
    methods = made["methods"]
    numbers = [str(place) for place in range(1, len(methods) + 1)]
    lines = [f"| overlap with | {' | '.join(numbers)} |", f"|---|{'--:|' * len(methods)}"]
    for number, one in zip(numbers, methods, strict=True):
        cells = [f"{made['overlap'][one][other]:.2f}" for other in methods]
        lines.append(f"| {number}. {one} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table(made: dict[str, Any]) -> str:
    """Return the stable ranks, and what the layers share, as a Markdown table."""
    lines = ["| method | stable rank | layers, output | layers, input |", "|---|--:|--:|--:|"]
    for one in made["methods"]:
        output, inputs = (f"{value:.2f}" for value in made["layers"][one])
        lines.append(f"| {one} | {made['stable_rank'][one]:.1f} | {output} | {inputs} |")
    return "\n".join(lines)


def draw(made: dict[str, Any], path: Path) -> None:
    """Draw the mean spectra."""
    figure, axes = figures.new(7, 4, yscale="log")
    for place, method in enumerate(made["methods"]):
        values = [value for value in made["spectra"][method] if value > 1e-12]
        axes.plot(range(1, len(values) + 1), values, f"C{place}.-", label=method)
    axes.set_xlabel("singular value")
    axes.set_ylabel("share of the update's energy")
    axes.set_ylim(bottom=1e-5)
    axes.legend(frameon=False, fontsize=8)
    figures.save(figure, path, "geometry")
