"""As `glora_few_long`, with sixteen images of each digit to train with, and a search beside."""

from experiments.configs.glora_few import with_shots

EXPERIMENT = with_shots(16)
