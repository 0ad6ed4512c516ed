"""MiniLM on 256 news of 20 groups, every method's rate searched."""

from experiments.families import on_texts

EXPERIMENT = on_texts("MiniLM on 256 news of 20 groups, query and value weights", "20newsgroups")
