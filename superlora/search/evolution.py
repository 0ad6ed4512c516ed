"""`Evolution`: GLoRA's evolutionary operators, on configurations given as indices."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy

from superlora.checks import check_count
from superlora.search.limits import Indices, Limits


@dataclass(frozen=True)
class Evolution:
    """The settings of the evolutionary search, by default those of GLoRA's authors.

    Parameters
    ----------
    population : int
        Configurations a generation. Those of the first are random.
    parents : int
        How many of the best of all generations so far have children.
    mutations : int
        Children of one parent; each option is drawn anew with the probability below.
    crossovers : int
        Children of two parents; each option is that of either with probability 1/2.
    probability : float
        Of an option to be drawn anew, which may give the same again.
    tries : int
        How often a child is made until one is within the limits and new. Where none is, and
        up to the population, random configurations are taken.

    Raises
    ------
    TypeError
        If a count is no integer.
    ValueError
        If a value is out of its range.

    Examples
    --------
    >>> Evolution().population
    50
    """

    population: int = 50
    parents: int = 10
    mutations: int = 25
    crossovers: int = 25
    probability: float = 0.2
    tries: int = 10

    def __post_init__(self) -> None:
        for name in ("population", "parents", "tries"):
            check_count(name, getattr(self, name))
        for name in ("mutations", "crossovers"):
            check_count(name, getattr(self, name), least=0)
        if self.mutations + self.crossovers > self.population:
            raise ValueError(
                f"population must be at least mutations + crossovers: expected "
                f"{self.mutations + self.crossovers} or more, got {self.population}"
            )
        number = isinstance(self.probability, int | float) and self.probability is not True
        if not number or not 0 < self.probability <= 1:
            raise ValueError(f"probability must be in (0, 1]: got {self.probability!r}")

    def mutated(
        self, parent: Indices, sizes: Sequence[int], generator: numpy.random.Generator
    ) -> Indices:
        """Draw some options of a configuration anew, each of so many."""
        drawn = generator.random(len(parent)) < self.probability
        child: list[int] = numpy.where(drawn, generator.integers(sizes), parent).tolist()
        return tuple(child)

    def crossed(
        self, first: Indices, second: Indices, generator: numpy.random.Generator
    ) -> Indices:
        """Take each option from either of two configurations."""
        child: list[int] = numpy.where(generator.random(len(first)) < 0.5, first, second).tolist()
        return tuple(child)

    def generation(
        self,
        index: int,
        limits: Limits,
        best: Sequence[Indices],
        seen: Collection[Indices],
        seed: int,
    ) -> list[Indices]:
        """Make one generation, of parents that are the first of `best`, and of none of `seen`."""
        # There are fewer than the population only if there are no more within the limits.
        generator = numpy.random.default_rng((seed, index))
        sizes = [len(costs) for costs in limits.space.costs]
        parents = list(best[: self.parents])
        taken = set(seen)
        children: list[Indices] = []

        def mutation() -> Indices:
            return self.mutated(parents[int(generator.integers(len(parents)))], sizes, generator)

        def crossover() -> Indices:
            first, second = generator.choice(len(parents), 2, replace=False).tolist()
            return self.crossed(parents[first], parents[second], generator)

        makers = [mutation] * (self.mutations if parents else 0)
        makers += [crossover] * (self.crossovers if len(parents) > 1 else 0)
        for make in makers:
            for child in (make() for _ in range(self.tries)):
                if child not in taken and limits.hold(child):
                    taken.add(child)
                    children.append(child)
                    break
        while len(children) < self.population:
            drawn = limits.unseen(generator, taken)
            if drawn is None:
                break
            taken.add(drawn)
            children.append(drawn)
        return children
