"""`candidates`: configurations that are good without any search."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from superlora.search.space import Configuration, Space

LEAST_LOSSES = 3
"""How many configurations of training are taken for their loss."""


def candidates(
    space: Space, history: Iterable[tuple[Configuration, float]] = ()
) -> dict[str, Configuration]:
    """Choose up to seven configurations of a trained supernet without a search.

    Parameters
    ----------
    space : Space
        The configurations.
    history : iterable of (Configuration, float)
        The configuration of each step of training, as `Supernet.draw` gives it, and its loss.

    Returns
    -------
    dict of str to Configuration
        ``"largest"``, ``"smallest"`` and ``"median"`` take the option of most, fewest and middle
        cost of every layer and operation; ``"most frequent"`` the option that training had most
        often, and ``"least loss 1"`` to ``"least loss 3"`` the steps of least loss, where there is
        a history. One that equals an earlier one is left out.

    Raises
    ------
    TypeError, ValueError
        If a configuration is none of the space.

    Notes
    -----
    As neural low-rank search takes them ([1]_): evaluated first (``search(…, first=…)``), they
    show whether a search is worth its evaluations.

    References
    ----------
    .. [1] J. P. Muñoz et al., "LoNAS: Elastic Low-Rank Adapters for Efficient Large Language
       Models", 2024.

    Examples
    --------
    >>> space = Space({"q": (3, 2)}, (2, 1), {"add_weight": (2, 1, "none")})
    >>> {name: own["q"]["add_weight"] for name, own in candidates(space).items()}
    {'median': 1, 'largest': 2, 'smallest': 'none'}
    """
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
