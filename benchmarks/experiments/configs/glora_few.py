"""As `glora`, with four images of each digit to train with."""

import dataclasses

from experiments.configs import glora
from experiments.tasks.glora import Searched

EXPERIMENT = dataclasses.replace(
    glora.EXPERIMENT,
    title="ViT-S/14 on 40 MNIST digits of 28 pixels, all linear layers",
    settings={**glora.EXPERIMENT.settings, "train": 40, "batch_size": 20, "epochs": 30},
    methods=[
        method
        for method in glora.METHODS
        if not isinstance(method.design, Searched)
        or (method.design.every_option and method.design.epochs == 100)
    ],
)
