"""GLoRA's claims: does a supernet's search pay, beside methods whose rates were searched too?"""

import superlora as sl
from experiments.experiment import Experiment, Method, family
from experiments.tasks.glora import Searched

LIMITS = (150_000, 300_000)  # about those of LoRA of rank 2 and 4
SPACES = {"{2}": (2,), "{4, 2}": (4, 2), "{8, 4}": (8, 4)}


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
    *[
        Method(f"GLoRA {name}, {epochs} epochs", f"≤ {limit:,}", Searched(ranks, limit, epochs))
        for epochs in (30, 100)
        for name, ranks in SPACES.items()
        for limit in LIMITS
    ],
    *[
        Method("GLoRA {4, 2}, B low rank", f"≤ {limit:,}", Searched((4, 2), limit, 100, False))
        for limit in LIMITS
    ],
]

EXPERIMENT = Experiment(
    title="ViT-S/14 on 400 MNIST digits of 28 pixels, all linear layers",
    task="glora",
    settings={
        **{"train": 400, "validation": 200, "test": 1000, "resolution": 28},
        **{"epochs": 8, "batch_size": 25, "head_rate": 5e-3, "head_alone": 6e-3, "trials": 150},
    },
    methods=METHODS,
    shown=("LoRA", "RepAdapter", "FacT-TT", "GLoRA everywhere, no search"),
)
