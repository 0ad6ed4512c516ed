"""SuperLoRA's setting: ViT-B/16 on CIFAR-100, 5,000 steps of SGD. Not run: it needs a GPU."""

from experiments.experiment import Experiment
from experiments.families import SHOWN, main, projected
from superlora import maps

EXPERIMENT = Experiment(
    title="ViT-B/16 on CIFAR-100, query and value weights",
    task="cifar",
    settings={"data": "cifar100", "steps": 5000, "batch_size": 128},
    methods=[
        *main(square=(1, 2, 4, 8, 16)),
        *projected("fastfood", maps.Fastfood()),
        *projected("one-hot", maps.OneHot()),
    ],
    rates=(5e-3, 1.6e-2, 5e-2, 0.16, 0.5, 1.6),  # around the paper's .05
    shown=SHOWN[:5],
)
