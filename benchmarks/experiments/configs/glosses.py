"""The SuperLoRA poster's table of data to text in small: glosses of nouns from name and type.

The poster adapts GPT-2 medium to the E2E NLG challenge; `e2e` is that, ready for a GPU.
"""

import superlora as sl
from experiments.experiment import Experiment, Method, family
from experiments.families import planar

METHODS = [
    Method("not adapted", "", None),
    Method("dense", "", sl.dense()),
    *family("LoRA", "r{rank}", sl.lora, rank=(1, 2, 4)),
    # About a third of each LoRA's parameters.
    *family("SuperLoRA 2-D", "r{rank}", planar, rank=(3, 5, 10)),
]

EXPERIMENT = Experiment(
    title="SmolLM2-135M on 288 WordNet glosses, query and value weights",
    task="glosses",
    settings={
        **{"train": 288, "validation": 96, "test": 160, "tokens": 32},
        **{"bfloat16": True, "epochs": 1, "batch_size": 4, "generate": 50},
    },
    methods=METHODS,
    metric="test log likelihood per token",
    percent=False,
    shown=("LoRA", "SuperLoRA 2-D"),
)
