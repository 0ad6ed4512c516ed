"""Spaces small enough to go through, and objectives whose optimum is known."""

from __future__ import annotations

import itertools

from hypothesis import strategies as st

from superlora.search import Space
from superlora.search.options import KINDS

SMALL = Space(
    {"q": (3, 2), "v": (4, 5)},
    ranks=(2, 1),
    operations={"add_weight": (2, 1, "none"), "add_bias": ("vector", "constant", "none")},
)
MIDDLE = Space({f"blocks.{i}.q": (6, 4) for i in range(3)}, ranks=(2,))


def every(space):
    """Return all configurations of a space."""
    pairs = [(layer, operation) for layer in space.layers for operation in space.operations]
    for chosen in itertools.product(*(space.options(*pair) for pair in pairs)):
        found = {layer: {} for layer in space.layers}
        for (layer, operation), option in zip(pairs, chosen, strict=True):
            found[layer][operation] = option
        yield found


def count(space, configuration):
    """Count parameters option by option, as the table of the paper's appendix has them."""
    total = 0
    for layer, options in configuration.items():
        outputs, inputs = space.layers[layer]
        for operation, option in options.items():
            column = operation == "weight_to_bias"
            if option == "vector":
                total += inputs if column else outputs
            elif option == "constant":
                total += 1
            elif option != "none":
                total += option * inputs + (option if column else option * outputs)
    return total


def separable(configuration):
    """A value that each option adds to on its own, unequal for different configurations."""
    value = 0.0
    for i, (_, options) in enumerate(sorted(configuration.items())):
        for operation, option in options.items():
            wanted = ("constant", "vector", 2)[(i + len(operation)) % 3]
            value += (option == wanted) + 0.01 * (option != "none") * (1 + i)
    return value


@st.composite
def spaces(draw):
    """Draw a space of one or two layers with at most a few hundred configurations."""
    several = {"min_size": 1, "max_size": 2, "unique": True}
    names = draw(st.lists(st.sampled_from(["q", "v", "a/b.c"]), **several))
    width = st.integers(1, 6)
    layers = {name: (draw(width), draw(width)) for name in names}
    ranks = tuple(draw(st.lists(st.integers(1, 4), **several)))
    chosen = draw(st.lists(st.sampled_from(list(KINDS)), **several))
    operations = {}
    for name in chosen:
        allowed = [*(ranks if "rank" in KINDS[name] else ()), *KINDS[name]]
        allowed = [option for option in allowed if option != "rank"]
        operations[name] = draw(
            st.lists(st.sampled_from(allowed), min_size=1, max_size=4, unique=True)
        )
    bare = draw(st.lists(st.sampled_from(list(layers)), unique=True, max_size=len(layers) - 1))
    return Space(layers, ranks, operations, bare)
