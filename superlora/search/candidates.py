"""`candidates`: configurations that are good without any search."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from superlora.search.space import Configuration, Space

LEAST_LOSSES = 3  # configurations of training that are taken for their loss


def candidates(
    space: Space, history: Iterable[tuple[Configuration, float]] = ()
) -> dict[str, Configuration]:
    """Choose up to seven configurations of a trained supernet without a search."""
    orders = [sorted(range(len(own)), key=own.__getitem__) for own in space.costs]
    found = {
        "median": tuple(order[len(order) // 2] for order in orders),
        "largest": tuple(order[-1] for order in orders),
        "smallest": tuple(order[0] for order in orders),
    }
    steps = [(loss, space.indices(configuration)) for configuration, loss in history]
    if steps:
        columns = zip(*(indices for _, indices in steps), strict=True)
        found["most frequent"] = tuple(Counter(own).most_common(1)[0][0] for own in columns)
        best = dict.fromkeys(indices for _, indices in sorted(steps))
        for number, indices in enumerate(list(best)[:LEAST_LOSSES], 1):
            found[f"least loss {number}"] = indices
    distinct: dict[tuple[int, ...], str] = {}
    for name, indices in found.items():
        distinct.setdefault(indices, name)
    return {name: space.configuration(indices) for indices, name in distinct.items()}
