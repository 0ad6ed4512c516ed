"""As `digits`, with a head that is trained before, and then fixed."""

import dataclasses

from experiments.configs import digits
from experiments.families import main, projected
from superlora import maps

EXPERIMENT = dataclasses.replace(
    digits.EXPERIMENT,
    title="ViT-S/14 on 500 MNIST digits of 28 pixels; the head is trained first, and then fixed",
    settings={**digits.EXPERIMENT.settings, "frozen_head": True},
    methods=[*main(), *projected("one-hot", maps.OneHot(), (0.1,))],
    shown=("LoRA", "SuperLoRA 2-D", "LoRTA 3-D"),
)
