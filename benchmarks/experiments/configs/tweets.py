"""MiniLM on tweets of two authors: whose they are is more than their topic."""

from experiments.families import few, on_texts

EXPERIMENT = on_texts(
    "MiniLM on 400 tweets of two authors, query and value weights",
    "tweets",
    few(),
    bfloat16=True,
)
