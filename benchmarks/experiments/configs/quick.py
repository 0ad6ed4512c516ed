"""A few methods on a few digits, to see that all runs."""

import superlora as sl
from experiments.experiment import Experiment, Method, family

EXPERIMENT = Experiment(
    title="ViT-S/14 on 60 MNIST digits: a trial of the runner",
    task="digits",
    settings={
        **{"train": 60, "validation": 50, "test": 100, "resolution": 28},
        **{"epochs": 2, "batch_size": 20, "head_rate": 2e-3, "head_alone": 6e-3, "head_epochs": 5},
    },
    methods=[
        Method("head only", "", None),
        *family("LoRA", "r{rank}", sl.lora, rank=(1, 4)),
        Method("SuperLoRA 2-D", "r1", sl.Spec(rank=1, groups=1, fold="balanced")),
    ],
    rates=(1e-3, 1e-2),
    seeds=(0, 1),
)
