"""As `glora_few`, some designs trained for as many epochs as its supernets."""

import dataclasses

from experiments.configs import glora_few

NAMES = ("LoRA r2", "LoRA r4", "RepAdapter r2", "GLoRA everywhere, no search r1")

EXPERIMENT = dataclasses.replace(
    glora_few.EXPERIMENT,
    title="ViT-S/14 on 40 MNIST digits of 28 pixels, for as many epochs as a supernet",
    settings={**glora_few.EXPERIMENT.settings, "epochs": glora_few.EPOCHS},
    methods=[method for method in glora_few.EXPERIMENT.methods if method.name in NAMES],
    shown=("LoRA",),
)
