"""MiniLM on Reuters news of 52 topics: is an adapter better than the head alone?"""

from experiments.families import fewest, on_texts

EXPERIMENT = on_texts(
    "MiniLM on 400 Reuters news of 52 topics, query and value weights", "reuters-r52", fewest()
)
