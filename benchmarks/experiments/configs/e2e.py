"""The SuperLoRA poster's table: GPT-2 medium on the E2E NLG challenge, query and value weights.

Not run: it needs a GPU. The poster states the model, the methods and their sizes; the training and
the decoding are those of LoRA's published code, but for the rates and for the gradients, which are
clipped here.
"""

import superlora as sl
from experiments.experiment import Experiment, Method, family
from experiments.families import cubic, planar

METHODS = [
    Method("dense", "", sl.dense()),
    # LoRA's 0.40 million parameters, and SuperLoRA's 0.12.
    Method("LoRA", "r4", sl.lora(rank=4, alpha=32)),
    *family("SuperLoRA 2-D", "r{rank}", planar, rank=(2, 4, 8)),
    *family("LoRTA 3-D", "r{rank}", cubic, rank=(16, 32)),
]

EXPERIMENT = Experiment(
    title="GPT-2 medium on the E2E NLG challenge, query and value weights",
    task="e2e",
    settings={
        **{"tokens": 512, "epochs": 5, "batch_size": 8, "warm_up": 0.02},
        **{"weight_decay": 0.01, "smoothing": 0.1, "dropout": 0.1},
        "generate": 630,  # all of the test part
        "decoding": {"num_beams": 10, "length_penalty": 0.8, "no_repeat_ngram_size": 4},
    },
    methods=METHODS,
    rates=(2e-5, 6e-5, 2e-4, 6e-4, 2e-3, 6e-3),
    metric="test log likelihood per token",
    percent=False,
    shown=("LoRA", "SuperLoRA 2-D", "LoRTA 3-D"),
)
