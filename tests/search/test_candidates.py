"""Candidates without a search: what each of them is."""

import numpy
import pytest

from superlora.search import Space, candidates
from tests.search.spaces import MIDDLE, SMALL, count, every


def test_by_their_size():
    found = candidates(SMALL)
    counts = [count(SMALL, configuration) for configuration in every(SMALL)]
    assert count(SMALL, found["largest"]) == max(counts)
    assert count(SMALL, found["smallest"]) == min(counts) == 0
    # Of each choice's options: 2, 1, none and vector, constant, none.
    assert found["median"] == SMALL.fixed(add_weight=1, add_bias="constant")


def test_by_what_training_had():
    generator = numpy.random.default_rng(0)
    drawn = [MIDDLE.sample(generator) for _ in range(50)]
    losses = generator.permutation(50).tolist()
    found = candidates(MIDDLE, zip(drawn, losses, strict=True))
    for rank in range(3):
        assert found[f"least loss {rank + 1}"] == drawn[losses.index(rank)]
    for layer, operation in MIDDLE.categoricals:
        chosen = [configuration[layer][operation] for configuration in drawn]
        assert chosen.count(found["most frequent"][layer][operation]) == max(
            map(chosen.count, chosen)
        )
    assert len(found) == 7


def test_equal_ones_are_there_once():
    space = Space({"q": (3, 2)}, (1,), {"add_weight": (1, "none")})
    found = candidates(space, [(space.fixed(add_weight=1), 0.5)] * 4)
    assert list(found) == ["median", "smallest"]


def test_a_configuration_of_another_space_is_refused():
    with pytest.raises(ValueError, match="configuration must have exactly the keys"):
        candidates(SMALL, [(MIDDLE.fixed(), 1.0)])
