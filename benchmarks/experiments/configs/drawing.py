"""SuperLoRA's image generation in small: a U-Net that draws digits learns to draw others."""

import superlora as sl
from experiments.experiment import Experiment, Method, family
from experiments.families import cubic, planar, projected
from superlora import maps

METHODS = [
    Method("not adapted", "", None),
    *family("LoRA", "r{rank}", sl.lora, rank=(1, 2, 4, 8)),
    *family("SuperLoRA 2-D", "r{rank}", planar, rank=(4, 8, 16, 32)),
    *family("LoRTA 3-D", "r{rank}", cubic, rank=(8, 16)),
    *projected("fastfood", maps.Fastfood(), (0.1, 0.02)),
    *family("LoKr", "r{rank}", sl.lokr, rank=(8,)),
    Method("dense", "", sl.dense()),
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
    metric="minus the Fréchet distance",
    percent=False,
    shown=("LoRA", "SuperLoRA 2-D", "LoRTA 3-D", "2-D r8, fastfood", "LoKr"),
)
