"""Text classification with few examples, every method's rate searched."""

from experiments.experiment import Experiment
from experiments.families import SHOWN, few

EXPERIMENT = Experiment(
    title="MiniLM on 500 news of 20 groups, query and value weights",
    task="texts",
    settings={
        **{"data": "20newsgroups", "train": 500, "validation": 1400, "test": 1000, "tokens": 32},
        **{"epochs": 4, "batch_size": 20, "head_rate": 2e-3, "head_alone": 6e-3},
    },
    methods=few(),
    shown=SHOWN,
)
