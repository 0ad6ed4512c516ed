"""Maps made of maps: one after the other, and one for each part."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy

from superlora._backend import Array
from superlora.checks import check_count
from superlora.maps._base import Map, Place
from superlora.maps._seeded import CheckedMap, joined

# Entries that may lie between two maps, besides 16 times as many as the group has.
_MOST_BETWEEN = 1 << 24


class CombinedMap(CheckedMap):
    """A map made of maps, which draw from streams of their own."""

    def check(self, before: int, size: int) -> None:  # noqa: D102  (inherited)
        for _, part, *sizes in self._each(before, size):
            part.check(*sizes)

    def gain(self, before: int, size: int) -> float:  # noqa: D102  (inherited)
        return math.prod(part.gain(*sizes) for _, part, *sizes in self._each(before, size))

    def constants(self, before: int, size: int) -> dict[str, numpy.ndarray]:
        """Return what all maps draw."""
        return {
            f"{place}.{name}": values
            for place, part, *sizes in self._each(before, size)
            for name, values in part.constants(*sizes).items()
        }

    def operations(self, before: int, size: int) -> int:  # noqa: D102  (inherited)
        return sum(part.operations(*sizes) for _, part, *sizes in self._each(before, size))

    def nbytes(self, before: int, size: int) -> int:  # noqa: D102  (inherited)
        return sum(part.nbytes(*sizes) for _, part, *sizes in self._each(before, size))

    @abc.abstractmethod
    def _each(self, before: int, size: int) -> Iterator[tuple[str, Map, int, int]]:
        """Yield the place and the map of every part, and its entries before and after."""


@dataclass(frozen=True, kw_only=True)
class Composed(CombinedMap):
    """Two maps, one after the other.

    Parameters
    ----------
    first, second : Map
        `first` is applied first. Those with a seed draw from streams of their own.
    between : {"before", "after"} or int
        How many entries lie between them: as many as the fold has, as the group has, or so many.

    Raises
    ------
    TypeError, ValueError
        If one is no map, or `between` is none of these.

    Examples
    --------
    >>> import numpy as np
    >>> from superlora.maps import Broadcast, Shuffle
    >>> fixed = Composed(first=Broadcast(along="inputs"), second=Shuffle(seed=0))
    >>> fixed.apply(np.array([1.0, 2.0]), 4)
    array([2., 2., 1., 1.])
    """

    first: Map
    second: Map
    between: str | int = "after"

    def __post_init__(self) -> None:
        for name in ("first", "second"):
            check_part(name, getattr(self, name))
        if isinstance(self.between, int):
            check_count("between", self.between)
        elif self.between not in ("before", "after"):
            raise ValueError(
                f"between must be 'before', 'after' or an integer: got {self.between!r}"
            )

    def bind(self, place: Place) -> Map:
        """Return the map as it is for one group of a plan."""
        inside = place if self.between == "after" else Place(place.group, (), False)
        first, second = self.first.bind(inside), self.second.bind(place)
        bound = dataclasses.replace(self, first=first, second=second)
        return self if bound == self else bound

    def fixed_entries(self, place: Place) -> int | None:
        """Return how many entries the map takes, where that is not the spec's choice."""
        if isinstance(self.between, int):
            return None
        decisive = self.first if self.between == "after" else self.second
        return decisive.fixed_entries(place)

    def check(self, before: int, size: int) -> None:
        """Refuse sizes that one of the maps cannot serve, and too many entries between them."""
        # A file may hold any number here.
        most = max(before, _MOST_BETWEEN + 16 * size)
        if self._middle(before, size) > most:
            raise ValueError(
                f"second must take at most {most:,} entries to {size:,}: got between={self.between}"
            )
        super().check(before, size)

    def _among(self, count: int, index: int) -> Map:
        first, second = self.first._among(count, index), self.second._among(count, index)
        return dataclasses.replace(self, first=first, second=second)

    @functools.cached_property
    def _own(self) -> tuple[Map, Map]:
        """Both maps, each with streams of its own: equal seeds must not cancel out."""
        return self.first._among(2, 0), self.second._among(2, 1)

    def _each(self, before: int, size: int) -> Iterator[tuple[str, Map, int, int]]:
        middle = self._middle(before, size)
        yield "first", self._own[0], before, middle
        yield "second", self._own[1], middle, size

    def _middle(self, before: int, size: int) -> int:
        if isinstance(self.between, int):
            return self.between
        return before if self.between == "before" else size

    def _forward(self, x: Array, size: int, start: int, stop: int) -> Array:
        middle = self._middle(x.shape[0], size)
        first, second = self._own
        return second.apply_slice(first.apply(x, middle), size, start, stop)

    def _backward(self, y: Array, before: int) -> Array:
        middle = self._middle(before, y.shape[0])
        first, second = self._own
        return first.adjoint(second.adjoint(y, middle), before)


@dataclass(frozen=True, kw_only=True)
class BlockDiagonal(CombinedMap):
    """One map for each part of the entries: ``diag(F_1, …, F_B)``.

    Parameters
    ----------
    parts : tuple of Map
        The maps; both the entries before and after are cut into as many parts, whose sizes
        differ by at most one, the larger ones first. Those with a seed draw from streams of
        their own, so that one map may stand there many times.

    Raises
    ------
    TypeError, ValueError
        If they are no maps, or none.

    Examples
    --------
    >>> import numpy as np
    >>> from superlora.maps import Broadcast
    >>> BlockDiagonal(parts=(Broadcast(), Broadcast())).apply(np.array([1.0, 2.0]), 5)
    array([1., 1., 1., 2., 2.])
    """

    parts: tuple[Map, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.parts, (tuple, list)) or not self.parts:
            raise TypeError(f"parts must be a tuple of maps: got {self.parts!r}")
        object.__setattr__(self, "parts", tuple(self.parts))
        for index, part in enumerate(self.parts):
            check_part(f"parts[{index}]", part)

    @property
    def sliced(self) -> bool:  # type: ignore[override]
        """Whether a slice costs less than the whole."""
        return len(self.parts) > 1

    def bind(self, place: Place) -> Map:
        """Return the map as it is for one group of a plan."""
        inside = place if len(self.parts) == 1 else Place(place.group, (), False)
        bound = tuple(part.bind(inside) for part in self.parts)
        return self if bound == self.parts else BlockDiagonal(parts=bound)

    def check(self, before: int, size: int) -> None:
        """Refuse sizes that one of the maps cannot serve."""
        count = len(self.parts)
        if min(before, size) < count:
            raise ValueError(
                f"parts must be at most {min(before, size)}, the entries of {before} before and "
                f"{size} after: got {count}"
            )
        super().check(before, size)

    def gain(self, before: int, size: int) -> float:
        """Return the mean square of an output for inputs of mean square 1."""
        gains = [part.gain(*sizes) * sizes[1] for _, part, *sizes in self._each(before, size)]
        return sum(gains) / size

    @functools.cached_property
    def _own(self) -> tuple[Map, ...]:
        """The parts, each with its own streams."""
        count = len(self.parts)
        return tuple(part._among(count, index) for index, part in enumerate(self.parts))

    def _among(self, count: int, index: int) -> Map:
        return BlockDiagonal(parts=tuple(part._among(count, index) for part in self.parts))

    def _cut(self, before: int, size: int) -> Iterator[tuple[Map, slice, slice]]:
        """Yield every part, and which entries it takes and makes."""
        taken = done = 0
        for _, part, given, made in self._each(before, size):
            yield part, slice(taken, taken + given), slice(done, done + made)
            taken, done = taken + given, done + made

    def _each(self, before: int, size: int) -> Iterator[tuple[str, Map, int, int]]:
        count = len(self.parts)
        for index, part in enumerate(self._own):
            given, made = (total // count + (index < total % count) for total in (before, size))
            yield str(index), part, given, made

    def _forward(self, x: Array, size: int, start: int, stop: int) -> Array:
        runs = []
        for part, given, made in self._cut(x.shape[0], size):
            low, high = max(start, made.start), min(stop, made.stop)
            if low < high:
                bounds = low - made.start, high - made.start
                runs.append(part.apply_slice(x[given], made.stop - made.start, *bounds))
        return joined(runs)

    def _backward(self, y: Array, before: int) -> Array:
        runs = [
            part.adjoint(y[made], given.stop - given.start)
            for part, given, made in self._cut(before, y.shape[0])
        ]
        return joined(runs)


def check_part(name: str, part: object) -> None:
    """Refuse what is no map, or is one of all groups at once."""
    if not isinstance(part, Map):
        raise TypeError(f"{name} must be a superlora.maps.Map: got {part!r}")
    if part.joint:
        raise ValueError(f"{name} must be a map of one group: got {part!r}")
