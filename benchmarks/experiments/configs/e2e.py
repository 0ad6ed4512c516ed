"""The SuperLoRA poster's table: GPT-2 medium on the E2E NLG challenge, query and value weights.

Needs a GPU, and in the cache folder `e2e-dataset` with the dataset's three CSV files and
`gpt2-medium` with the model as transformers saves it. The poster states the model, the methods and
their sizes; the training and the decoding are those of LoRA's published code.
"""

import superlora as sl
from experiments.experiment import Experiment, Method, family


def planar(rank: int) -> sl.Spec:
    """All weights in one group, which is folded to a nearly square matrix."""
    return sl.Spec(rank=rank, groups=1, fold="balanced")


METHODS = [
    Method("dense", "", sl.dense()),
    # LoRA's 0.40 million parameters, and SuperLoRA's 0.12.
    Method("LoRA", "r4", sl.lora(rank=4, alpha=32)),
    *family("SuperLoRA 2-D", "r{rank}", planar, rank=(2, 4, 8)),
    *family("LoRTA 3-D", "r{rank}", sl.lorta, rank=(16, 32)),
]

EXPERIMENT = Experiment(
    title="GPT-2 medium on the E2E NLG challenge, query and value weights",
    task="e2e",
    settings={
        **{"data": "e2e-dataset", "model": "gpt2-medium", "device": "cuda"},
        **{"tokens": 512, "epochs": 5, "batch_size": 8, "warm_up": 0.02},
        **{"weight_decay": 0.01, "smoothing": 0.1, "dropout": 0.1},
        "generate": 630,  # all of the test part
        "decoding": {"num_beams": 10, "length_penalty": 0.8, "no_repeat_ngram_size": 4},
    },
    methods=METHODS,
    rates=(2e-5, 2e-2),
    metric="test log likelihood per token",
)
