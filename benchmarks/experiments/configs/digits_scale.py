"""As `digits`, with the scale of the update searched beside the rate."""

import dataclasses

import superlora as sl
from experiments.configs import digits
from experiments.experiment import family
from experiments.families import planar

EXPERIMENT = dataclasses.replace(
    digits.EXPERIMENT,
    title="ViT-S/14 on 500 MNIST digits of 28 pixels; the scale is searched too",
    methods=[
        *family("LoRA", "r{rank}", sl.lora, rank=(2, 4)),
        *family("SuperLoRA 2-D", "r{rank}", planar, rank=(4, 8)),
    ],
    scales=(0.25, 1.0, 4.0),
    shown=("LoRA", "SuperLoRA 2-D"),
)
