"""MiniLM on 256 Reuters news of 52 topics, every method's rate searched."""

from experiments.families import on_texts

EXPERIMENT = on_texts(
    "MiniLM on 256 Reuters news of 52 topics, query and value weights", "reuters-r52"
)
