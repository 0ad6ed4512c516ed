"""`Tilted`: random configurations of a wanted size, as close to uniform as that permits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy
from scipy.special import softmax

# Halvings of an interval of slopes; its ends leave every choice its cheapest or dearest option.
_STEPS = 60
_STEEPEST = 1e6


class Tilted:
    """Independent draws, each option as probable as exp(-slope · cost), of a given mean count.

    Parameters
    ----------
    costs : sequence of sequence of int
        The number of parameters of every option of every choice.
    mean : float
        The mean number of parameters of a draw; the nearest possible, if it is out of reach.

    Notes
    -----
    Of all distributions with that mean this is the one of largest entropy ([1]_), and
    configurations of the same count are equally probable. A choice that costs next to nothing stays
    nearly uniform, however small the mean is.

    References
    ----------
    .. [1] E. T. Jaynes, "Information Theory and Statistical Mechanics", 1957.

    Examples
    --------
    >>> tilted = Tilted([[0, 100]] * 50 + [[0, 1]] * 50, mean=1025)
    >>> drawn = tilted.draw(numpy.random.default_rng(0))
    >>> sum(drawn[:50]), sum(drawn[50:])
    (12, 27)
    """

    def __init__(self, costs: Sequence[Sequence[int]], mean: float) -> None:
        self._last = numpy.array([len(own) - 1 for own in costs])
        table = numpy.array([*itertools.zip_longest(*costs, fillvalue=numpy.nan)]).T
        there, values = numpy.isfinite(table), numpy.nan_to_num(table)
        largest = values.max() or 1

        def shares(slope: float) -> numpy.ndarray:
            exponents = numpy.where(there, -slope * values / largest, -numpy.inf)
            found: numpy.ndarray = softmax(exponents, axis=1)
            return found

        low, high = -_STEEPEST, _STEEPEST
        for _ in range(_STEPS):
            middle = (low + high) / 2
            if (shares(middle) * values).sum() > mean:
                low = middle
            else:
                high = middle
        self._ends = shares(high).cumsum(axis=1)

    def draw(self, generator: numpy.random.Generator) -> list[int]:
        """Draw the index of an option for every choice."""
        places = generator.random((len(self._ends), 1))
        # The last end may be rounded to less than one.
        found: list[int] = numpy.minimum((places > self._ends).sum(axis=1), self._last).tolist()
        return found
