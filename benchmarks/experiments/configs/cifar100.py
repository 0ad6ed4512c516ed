"""As `cifar10`, on CIFAR-100."""

import dataclasses

from experiments.configs import cifar10

EXPERIMENT = dataclasses.replace(
    cifar10.EXPERIMENT,
    title="ViT-B/16 on CIFAR-100, query and value weights",
    settings={**cifar10.EXPERIMENT.settings, "data": "cifar100"},
)
