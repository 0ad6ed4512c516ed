"""MiniLM on 256 tweets of two authors, every method's rate searched."""

from experiments.families import on_texts

EXPERIMENT = on_texts("MiniLM on 256 tweets of two authors, query and value weights", "tweets")
