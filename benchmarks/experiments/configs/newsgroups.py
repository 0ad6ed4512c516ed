"""MiniLM on news of 20 groups: is an adapter better than the head alone?"""

from experiments.families import fewest, on_texts

EXPERIMENT = on_texts(
    "MiniLM on 400 news of 20 groups, query and value weights", "20newsgroups", fewest()
)
