"""As `glora`, some designs trained for as many epochs as its supernets."""

import dataclasses

from experiments.configs import glora
from experiments.configs.glora_few_long import NAMES

EXPERIMENT = dataclasses.replace(
    glora.EXPERIMENT,
    title="ViT-S/14 on 200 MNIST digits of 28 pixels, for as many epochs as a supernet",
    settings={**glora.EXPERIMENT.settings, "epochs": 100},
    methods=[method for method in glora.METHODS if method.name in NAMES],
    shown=("LoRA",),
)
