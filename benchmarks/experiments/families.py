"""Methods that several experiments compare, on square weights or on any."""

from collections.abc import Iterable
from typing import Any

import superlora as sl
from experiments.experiment import Experiment, Method, family
from superlora import maps

RATIOS = (0.5, 0.25, 0.1, 0.02, 0.01)


def planar(rank: int, **changes: Any) -> sl.Spec:
    """Return the design with all weights in one group, folded to a nearly square matrix."""
    return sl.Spec(rank=rank, groups=1, fold="balanced", **changes)


def projected(name: str, own: maps.Map, ratios: Iterable[float] = RATIOS) -> list[Method]:
    """Return the square fold of rank 8 behind a map, from several shares of the entries."""
    return family(
        f"2-D r8, {name}", "ρ {ratio}", lambda ratio: planar(8, map=own, ratio=ratio), ratio=ratios
    )


def cubic(rank: int) -> sl.Spec:
    """Return the design with all weights in one group, folded to a nearly cubic tensor."""
    return sl.lorta(rank=rank, groups=1)


def main(*, square: Iterable[int] = (1, 2, 4, 8)) -> list[Method]:
    """Return the head alone, LoRA, the square and the cubic fold, and dense."""
    return [
        Method("head only", "", None),
        *family("LoRA", "r{rank}", sl.lora, rank=(1, 2, 4, 8)),
        *family("SuperLoRA 2-D", "r{rank}", planar, rank=square),
        *family("LoRTA 3-D", "r{rank}", cubic, rank=(5, 8, 16)),
        Method("dense", "", sl.dense()),
    ]


def few() -> list[Method]:
    """Return what is compared on texts."""
    return [
        *(method for method in main(square=(2, 4, 8)) if method.family != "LoRTA 3-D"),
        *random_dense(),
        *family("WaveFT", "{size} a weight", sl.waveft, size=(100, 500)),
    ]


def fewest() -> list[Method]:
    """Return what tells whether an adapter is better than the head alone."""
    return [
        Method("head only", "", None),
        Method("LoRA", "r8", sl.lora(rank=8)),
        Method("SuperLoRA 2-D", "r8", planar(8)),
        Method("dense", "", sl.dense()),
    ]


def random_dense() -> list[Method]:
    """Return all entries behind one random projection, from few numbers."""
    return family(
        "dense, fastfood",
        "ρ {ratio}",
        lambda ratio: sl.Spec(order=1, groups=1, map=maps.Fastfood(), ratio=ratio),
        ratio=(0.01, 0.001),
    )


SHOWN = (
    *("LoRA", "SuperLoRA 2-D", "LoRTA 3-D", "2-D r8, fastfood", "2-D r8, one-hot"),
    *("dense, fastfood", "WaveFT", "LoKr", "LoTR", "Uni-LoRA"),
)
"""Families with a colour of their own in the figures."""


def on_texts(title: str, data: str, methods: list[Method], *, bfloat16: bool = False) -> Experiment:
    """Return the experiment of few texts of a data set of `tasks/texts`."""
    return Experiment(
        title=title,
        task="texts",
        settings={
            **{"data": data, "train": 400, "validation": 1000, "test": 800, "tokens": 32},
            **{"epochs": 4, "batch_size": 16, "head_rate": 2e-3, "head_alone": 6e-3},
            "bfloat16": bfloat16,
        },
        methods=methods,
        shown=tuple(name for name in SHOWN if name in {own.family for own in methods}),
        confirm=(101, 102),  # near the largest rate, some starts of a method fail
    )
