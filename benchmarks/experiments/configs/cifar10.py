"""SuperLoRA's setting: ViT-B/16 on CIFAR-10, 5,000 steps of SGD. Not run: it needs a GPU."""

import superlora as sl
from experiments.experiment import Experiment, family
from experiments.families import SHOWN, main, projected, random_dense
from superlora import maps

EXPERIMENT = Experiment(
    title="ViT-B/16 on CIFAR-10, query and value weights",
    task="cifar",
    settings={"data": "cifar10", "steps": 5000, "batch_size": 128},
    methods=[
        *main(square=(1, 2, 4, 8, 16)),
        *projected("fastfood", maps.Fastfood()),
        *projected("one-hot", maps.OneHot()),
        *random_dense(),
        *family("WaveFT", "{size} a weight", sl.waveft, size=(100, 500, 2000)),
    ],
    rates=(5e-3, 1.6e-2, 5e-2, 0.16, 0.5, 1.6),  # around the paper's .05
    shown=SHOWN[:7],
)
