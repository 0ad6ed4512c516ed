"""GLoRA's claims: does a supernet's search pay, beside methods whose rates were searched too?"""

import superlora as sl
from experiments.experiment import Experiment, Method, family
from experiments.tasks.glora import Searched

FEW, MORE = 150_000, 300_000  # the limits, about the parameters of LoRA of rank 2 and of rank 4


def fact_tt(rank: int) -> sl.Spec:
    """Return one tensor train of all weights, each cut by rows into squares."""
    return sl.fact_tt(rank=rank, fold=(144, 384, 384))


METHODS = [
    Method("head only", "", None),
    *family("LoRA", "r{rank}", sl.lora, rank=(1, 2, 4, 8)),
    Method("BitFit", "", sl.bitfit()),
    Method("SSF", "", sl.ssf()),
    *family("FacT-TT", "r{rank}", fact_tt, rank=(8, 16)),
    *family("RepAdapter", "r{rank}", sl.repadapter, rank=(2, 4)),
    *family("GLoRA everywhere, no search", "r{rank}", sl.glora, rank=(1, 4)),
    Method("dense", "", sl.dense()),
    Method("GLoRA {2}", f"≤ {FEW:,}", Searched((2,), FEW, 100)),
    *[Method("GLoRA {4, 2}", f"≤ {own:,}", Searched((4, 2), own, 100)) for own in (FEW, MORE)],
    Method("GLoRA {8, 4}", f"≤ {MORE:,}", Searched((8, 4), MORE, 100)),
    Method("GLoRA {4, 2}, B low rank", f"≤ {MORE:,}", Searched((4, 2), MORE, 100, False)),
    *[
        Method(f"GLoRA {{4, 2}}, {own} epochs", f"≤ {MORE:,}", Searched((4, 2), MORE, own))
        for own in (10, 30)
    ],
]

EXPERIMENT = Experiment(
    title="ViT-S/14 on 200 MNIST digits of 28 pixels, all linear layers",
    task="glora",
    settings={
        **{"train": 200, "validation": 200, "test": 1000, "resolution": 28},
        **{"epochs": 12, "batch_size": 25, "head_rate": 5e-3, "head_alone": 6e-3, "trials": 100},
    },
    methods=METHODS,
    shown=(
        *("LoRA", "RepAdapter", "FacT-TT", "GLoRA everywhere, no search"),
        *("GLoRA {2}", "GLoRA {4, 2}", "GLoRA {8, 4}"),
    ),
)
