"""`Limits`: how many parameters a configuration may have, and configurations that meet that."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy

from superlora.checks import check_count
from superlora.search.space import Space
from superlora.search.tilted_draws import Tilted

Indices = tuple[int, ...]  # a configuration, as `Space.indices` gives it
UNIFORM_TRIES = 10  # uniform draws before cheap or dear options are preferred
TILTED_TRIES = 20  # such draws before one is repaired
UNSEEN_TRIES = 100  # draws before the configurations are gone through in order


@dataclass(frozen=True)
class Limits:
    """The numbers of parameters that a search may spend, and how it meets them.

    Parameters
    ----------
    space : Space
        The configurations.
    least : int
        No configuration has fewer parameters.
    most : int, optional
        No configuration has more; None for no limit.

    Raises
    ------
    TypeError
        If a limit is no integer.
    ValueError
        If no configuration meets the limits. The message says the least possible number.

    Notes
    -----
    A random configuration is drawn uniformly. Where ten draws miss the limits, options are made
    less probable by what they cost, or more, so that the mean number of parameters is the limit
    that was missed: the distribution is then as close to uniform as that mean permits, and a
    support that costs little is as free as before. Between limits that even such draws miss, the
    last is repaired: in a random order, operations of layers are given cheaper options, each
    uniformly among its cheaper ones, until the number is small enough, and then dearer ones that
    still fit until it is large enough.

    Examples
    --------
    >>> space = Space({"q": (8, 8)}, ranks=(4,))
    >>> limits = Limits(space, most=20)
    >>> space.count(limits.draw(numpy.random.default_rng(0))) <= 20
    True
    """

    space: Space
    least: int = 0
    most: int | None = None

    def __post_init__(self) -> None:
        check_count("limits[0]", self.least, least=0)
        if self.most is not None:
            check_count("limits[1]", self.most, least=0)
            if self.most < self.least:
                raise ValueError(
                    f"limits[1] must be at least limits[0]: expected {self.least} or more, "
                    f"got {self.most}"
                )
        fewest, largest = self.space.least_parameters, self.space.most_parameters
        if self.high < fewest:
            raise ValueError(
                f"limits[1] must be at least {fewest}, the least possible number of parameters: "
                f"got {self.high}"
            )
        if self.least > largest:
            raise ValueError(
                f"limits[0] must be at most {largest}, the largest possible number of parameters: "
                f"got {self.least}"
            )
        # Both limits bind: an exact sum may not exist. Draws are cheaper than the proof.
        generator = numpy.random.default_rng(0)
        if self.least > fewest and self.high < largest and self.draw(generator) is None:
            self._refuse_unreachable()

    @property
    def high(self) -> int:
        """The largest number of parameters allowed."""
        return self.space.most_parameters if self.most is None else self.most

    def hold(self, indices: Sequence[int]) -> bool:
        """Return whether a configuration meets the limits."""
        return self.least <= self.space.count(indices) <= self.high

    def draw(self, generator: numpy.random.Generator) -> Indices | None:
        """Draw a configuration within the limits."""
        for attempt in range(UNIFORM_TRIES + TILTED_TRIES):
            source = self.space if attempt < UNIFORM_TRIES else self._tilted
            drawn = source.draw(generator)
            if self.hold(drawn):
                return tuple(drawn)
        return self._repaired(drawn, generator)

    @functools.cached_property
    def _tilted(self) -> Tilted:
        uniform = sum(sum(costs) / len(costs) for costs in self.space.costs)
        return Tilted(self.space.costs, min(max(uniform, self.least), self.high))

    def unseen(
        self, generator: numpy.random.Generator, seen: Collection[Indices]
    ) -> Indices | None:
        """Draw a configuration within the limits that is not among those seen."""
        for _ in range(UNSEEN_TRIES):
            drawn = self.draw(generator)
            if drawn is not None and drawn not in seen:
                return drawn
        return next((found for found in self._each(generator) if found not in seen), None)

    def _repaired(self, indices: list[int], generator: numpy.random.Generator) -> Indices | None:
        count = self.space.count(indices)
        for _ in range(max(map(len, self.space.costs))):
            for place in generator.permutation(len(indices)).tolist():
                if self.least <= count <= self.high:
                    return tuple(indices)
                costs = self.space.costs[place]
                rest = count - costs[indices[place]]
                if count > self.high:
                    better = [i for i, cost in enumerate(costs) if rest + cost < count]
                    # A step below the other limit only where no smaller one is possible.
                    better = [i for i in better if rest + costs[i] >= self.least] or better
                else:
                    better = [i for i, cost in enumerate(costs) if count < rest + cost <= self.high]
                if better:
                    indices[place] = better[int(generator.integers(len(better)))]
                    count = rest + costs[indices[place]]
        return tuple(indices) if self.least <= count <= self.high else None

    def _each(self, generator: numpy.random.Generator) -> Iterator[Indices]:
        """Yield every configuration within the limits; no step leads to a dead end."""
        costs = self.space.costs
        orders = [generator.permutation(len(options)).tolist() for options in costs]
        begun: list[tuple[Indices, int]] = [((), 0)]  # and their counts; the last is next
        while begun:
            chosen, count = begun.pop()
            place = len(chosen)
            if place == len(costs):
                yield chosen
                continue
            for option in reversed(orders[place]):
                total = count + costs[place][option]
                if self._can_end(place + 1, total):
                    begun.append(((*chosen, option), total))

    def _can_end(self, place: int, count: int) -> bool:
        """Return whether the operations from one on can bring a count within the limits."""
        fewest, largest = self._bounds[place]
        if count + fewest >= self.least:
            return count + fewest <= self.high
        if count + largest <= self.high:
            return count + largest >= self.least
        window = (1 << (self.high - self.least + 1)) - 1
        return bool((self._sums[place] >> (self.least - count)) & window)

    @functools.cached_property
    def _bounds(self) -> list[tuple[int, int]]:
        bounds = [(0, 0)]
        for costs in reversed(self.space.costs):
            bounds.append((bounds[-1][0] + min(costs), bounds[-1][1] + max(costs)))
        return bounds[::-1]

    @functools.cached_property
    def _sums(self) -> list[int]:
        """Bit n of entry k: whether the operations from k on can have n parameters."""
        mask = (1 << (self.high + 1)) - 1
        sums = [1]
        for costs in reversed(self.space.costs):
            sums.append(_shifted(sums[-1], costs) & mask)
        return sums[::-1]

    def _refuse_unreachable(self) -> None:
        sums = functools.reduce(_shifted, self.space.costs, 1)
        if (sums >> self.least) & ((1 << (self.high - self.least + 1)) - 1):
            return
        below = (sums & ((1 << self.least) - 1)).bit_length() - 1
        above = sums >> (self.high + 1)
        nearest = self.high + (above & -above).bit_length()
        raise ValueError(
            f"limits must be met by some configuration: got {(self.least, self.most)}; the least "
            f"possible number of parameters is {self.space.least_parameters}, the nearest are "
            f"{below} and {nearest}"
        )


def _shifted(sums: int, costs: Sequence[int]) -> int:
    return functools.reduce(int.__or__, (sums << cost for cost in set(costs)))
