"""SuperLoRA's image generation in small: a U-Net that draws digits learns to draw others."""

import superlora as sl
from experiments.experiment import Experiment, Method, family
from superlora import maps


def planar(rank: int, **changes: object) -> sl.Spec:
    """All weights in one group, which is folded to a nearly square matrix."""
    return sl.Spec(rank=rank, groups=1, fold="balanced", **changes)  # type: ignore[arg-type]


MAPS = {"fastfood": maps.Fastfood(), "one-hot": maps.OneHot()}

METHODS = [
    Method("not adapted", "", None),
    Method("dense", "", sl.dense()),
    *family("LoRA", "r{rank}", sl.lora, rank=(1, 2, 4, 8)),
    *family("SuperLoRA 2-D", "r{rank}", planar, rank=(1, 4, 8, 16, 32)),
    *family("LoRTA 3-D", "r{rank}", lambda rank: sl.lorta(rank=rank, groups=1), rank=(8, 16, 32)),
    *family("LoKr", "r{rank}", sl.lokr, rank=(2, 8)),
    *[
        made
        for name, own in MAPS.items()
        for made in family(
            f"2-D r32, {name}",
            "ρ {ratio}",
            lambda ratio, own=own: planar(32, map=own, ratio=ratio),
            ratio=(0.5, 0.25, 0.1),
        )
    ],
]

EXPERIMENT = Experiment(
    title="U-Net of 0.6 million weights, pre-trained on MNIST's 0 to 4, that learns 5 to 9",
    task="drawing",
    settings={
        # In images of ten digits, half of which are new.
        **{"judged": 2000, "train": 1000, "validation": 500, "test": 1480},
        "pretraining": {"steps": 2500, "batch_size": 64, "rate": 2e-3},
        "judging": {"steps": 600, "batch_size": 64, "rate": 3e-3},
        **{"steps": 300, "batch_size": 32, "drawn": 100, "sampler_steps": 15},
    },
    methods=METHODS,
    rates=(2e-4, 0.2),
    metric="minus the Fréchet distance",
)
