"""Does GLoRA's search pay on four images of a digit, beside methods with searched rates too?"""

import dataclasses

import superlora as sl
from experiments.experiment import Experiment, Method, family
from experiments.tasks.glora import Searched

FEW, MORE = 150_000, 300_000  # the limits, about the parameters of LoRA of rank 2 and of rank 4
EPOCHS = 100  # of a supernet


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
    Method("GLoRA {2}", f"≤ {FEW:,}", Searched((2,), FEW, EPOCHS)),
    *[Method("GLoRA {4, 2}", f"≤ {own:,}", Searched((4, 2), own, EPOCHS)) for own in (FEW, MORE)],
    Method("GLoRA {8, 4}", f"≤ {MORE:,}", Searched((8, 4), MORE, EPOCHS)),
]

EXPERIMENT = Experiment(
    title="ViT-S/14 on 40 MNIST digits of 28 pixels, all linear layers",
    task="glora",
    settings={
        **{"train": 40, "validation": 200, "test": 1000, "resolution": 28},
        **{"epochs": 30, "batch_size": 20, "head_rate": 5e-3, "head_alone": 6e-3, "trials": 100},
    },
    methods=METHODS,
    shown=(
        *("LoRA", "RepAdapter", "FacT-TT", "GLoRA everywhere, no search"),
        *("GLoRA {2}", "GLoRA {4, 2}", "GLoRA {8, 4}"),
    ),
)

SEEN = EXPERIMENT.settings["train"] * EPOCHS  # images, with repetition, by a supernet


def with_shots(count: int) -> Experiment:
    """Return the comparison of equally long trainings, on so many images of each digit."""
    train = 10 * count
    epochs, rest = divmod(SEEN, train)
    if rest:
        raise ValueError(f"count must divide {SEEN // 10}: got {count}")
    return dataclasses.replace(
        EXPERIMENT,
        title=f"ViT-S/14 on {train} MNIST digits of 28 pixels, {SEEN:,} images seen",
        settings={
            **EXPERIMENT.settings,
            **{"train": train, "batch_size": min(20, train), "epochs": epochs},
        },
        methods=[
            *(own for own in METHODS if own.name in ("head only", "LoRA r2", "LoRA r4")),
            Method("GLoRA {8, 4}", f"≤ {MORE:,}", Searched((8, 4), MORE, epochs)),
        ],
        shown=("LoRA", "GLoRA {8, 4}"),
    )
