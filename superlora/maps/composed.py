"""Maps made of maps: one after the other, and one for each part."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy

from superlora._backend import Array, backend_of
from superlora.maps._base import Map, Place
from superlora.maps._seeded import CheckedMap
from superlora.values import check_count


@dataclass(frozen=True, kw_only=True)
class Composed(CheckedMap):
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
        """Return the map as it is for one group of a plan.

        Parameters
        ----------
        place : Place
            The group and the weights in it.

        Returns
        -------
        Map
            Both parts bound.
        """
        inside = place if self.between == "after" else part_of(place)
        return self._of(self.first.bind(inside), self.second.bind(place))

    def most_between(self) -> int:  # noqa: D102  (inherited)
        own = self.between if isinstance(self.between, int) else 0
        return max(own, super().most_between())

    def fixed_entries(self, place: Place) -> int | None:
        """Return how many entries the map takes, where that is not the spec's choice.

        Parameters
        ----------
        place : Place
            The group and the weights in it.

        Returns
        -------
        int or None
            What the one map says between whose entries and the group there is no other size.
        """
        if isinstance(self.between, int):
            return None
        decisive = self.first if self.between == "after" else self.second
        return decisive.fixed_entries(place)

    def check(self, before: int, size: int) -> None:
        """Refuse sizes that one of the maps cannot serve.

        Parameters
        ----------
        before, size : int
            Entries of the fold and of the group.

        Raises
        ------
        ValueError
            If it is so.
        """
        middle = self._middle(before, size)
        self.first.check(before, middle)
        self.second.check(middle, size)

    def gain(self, before: int, size: int) -> float:
        """Return the mean square of an output for inputs of mean square 1.

        Parameters
        ----------
        before, size : int
            Entries of the fold and of the group.

        Returns
        -------
        float
            The product of both.
        """
        middle = self._middle(before, size)
        return self.first.gain(before, middle) * self.second.gain(middle, size)

    def constants(self, before: int, size: int) -> dict[str, numpy.ndarray]:
        """Return what both maps draw.

        Parameters
        ----------
        before, size : int
            Entries of the fold and of the group.

        Returns
        -------
        dict of str to numpy.ndarray
            With ``"first."`` and ``"second."`` before their names.
        """
        middle = self._middle(before, size)
        first = self._own[0].constants(before, middle)
        second = self._own[1].constants(middle, size)
        return {f"first.{k}": v for k, v in first.items()} | {
            f"second.{k}": v for k, v in second.items()
        }

    def operations(self, before: int, size: int) -> int:
        """Return about how many additions and multiplications `apply` takes.

        Parameters
        ----------
        before, size : int
            Entries of the fold and of the group.

        Returns
        -------
        int
            The sum of both.
        """
        middle = self._middle(before, size)
        return self.first.operations(before, middle) + self.second.operations(middle, size)

    def nbytes(self, before: int, size: int) -> int:
        """Return how many bytes of constants are kept.

        Parameters
        ----------
        before, size : int
            Entries of the fold and of the group.

        Returns
        -------
        int
            The sum of both.
        """
        middle = self._middle(before, size)
        return self.first.nbytes(before, middle) + self.second.nbytes(middle, size)

    def _of(self, first: Map, second: Map) -> Map:
        same = first is self.first and second is self.second
        return self if same else Composed(first=first, second=second, between=self.between)

    def _among(self, count: int, index: int) -> Map:
        return self._of(self.first._among(count, index), self.second._among(count, index))

    @functools.cached_property
    def _own(self) -> tuple[Map, Map]:
        """Both maps, each with streams of its own: equal seeds must not cancel out."""
        return self.first._among(2, 0), self.second._among(2, 1)

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
class BlockDiagonal(CheckedMap):
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
        """Return the map as it is for one group of a plan.

        Parameters
        ----------
        place : Place
            The group and the weights in it.

        Returns
        -------
        Map
            All parts bound.
        """
        inside = place if len(self.parts) == 1 else part_of(place)
        bound = tuple(part.bind(inside) for part in self.parts)
        return self if bound == self.parts else BlockDiagonal(parts=bound)

    def check(self, before: int, size: int) -> None:
        """Refuse sizes that one of the maps cannot serve.

        Parameters
        ----------
        before, size : int
            Entries of the fold and of the group.

        Raises
        ------
        ValueError
            If it is so.
        """
        count = len(self.parts)
        if min(before, size) < count:
            raise ValueError(
                f"parts must be at most {min(before, size)}, the entries of {before} before and "
                f"{size} after: got {count}"
            )
        for part, _, sizes in self._cut(before, size):
            part.check(*sizes)

    def gain(self, before: int, size: int) -> float:
        """Return the mean square of an output for inputs of mean square 1.

        Parameters
        ----------
        before, size : int
            Entries of the fold and of the group.

        Returns
        -------
        float
            The mean over the parts.
        """
        gains = [part.gain(*sizes) * sizes[1] for part, _, sizes in self._cut(before, size)]
        return sum(gains) / size

    def constants(self, before: int, size: int) -> dict[str, numpy.ndarray]:
        """Return what all maps draw.

        Parameters
        ----------
        before, size : int
            Entries of the fold and of the group.

        Returns
        -------
        dict of str to numpy.ndarray
            With a part's index before its names.
        """
        return {
            f"{index}.{name}": values
            for index, (part, _, sizes) in enumerate(self._cut(before, size))
            for name, values in part.constants(*sizes).items()
        }

    def operations(self, before: int, size: int) -> int:
        """Return about how many additions and multiplications `apply` takes.

        Parameters
        ----------
        before, size : int
            Entries of the fold and of the group.

        Returns
        -------
        int
            The sum of all.
        """
        return sum(part.operations(*sizes) for part, _, sizes in self._cut(before, size))

    def nbytes(self, before: int, size: int) -> int:
        """Return how many bytes of constants are kept.

        Parameters
        ----------
        before, size : int
            Entries of the fold and of the group.

        Returns
        -------
        int
            The sum of all.
        """
        return sum(part.nbytes(*sizes) for part, _, sizes in self._cut(before, size))

    @functools.cached_property
    def _own(self) -> tuple[Map, ...]:
        """The parts, each with its own streams."""
        count = len(self.parts)
        return tuple(part._among(count, index) for index, part in enumerate(self.parts))

    def _among(self, count: int, index: int) -> Map:
        return BlockDiagonal(parts=tuple(part._among(count, index) for part in self.parts))

    def _cut(
        self, before: int, size: int
    ) -> Iterator[tuple[Map, tuple[int, int], tuple[int, int]]]:
        """Yield every part, where its entries begin before and after, and how many there are."""
        count = len(self.parts)
        bounds = [
            [index * (total // count) + min(index, total % count) for index in range(count + 1)]
            for total in (before, size)
        ]
        pairs = zip(*(itertools.pairwise(bound) for bound in bounds), strict=True)
        for part, ((first, last), (start, stop)) in zip(self._own, pairs, strict=True):
            yield part, (first, start), (last - first, stop - start)

    def _forward(self, x: Array, size: int, start: int, stop: int) -> Array:
        runs = []
        for part, (first, begin), (before, width) in self._cut(x.shape[0], size):
            low, high = max(start - begin, 0), min(stop - begin, width)
            if low < high:
                runs.append(part.apply_slice(x[first : first + before], width, low, high))
        return backend_of(x).concatenate(runs, axis=0)

    def _backward(self, y: Array, before: int) -> Array:
        runs = [
            part.adjoint(y[start : start + width], entries)
            for part, (_, start), (entries, width) in self._cut(before, y.shape[0])
        ]
        return backend_of(y).concatenate(runs, axis=0)


def part_of(place: Place) -> Place:
    """Return the place of a map that makes a part of a group's entries, or none of them."""
    return Place(place.group, (), False)


def check_part(name: str, part: object) -> None:
    """Refuse what is no map, or is one of all groups at once."""
    if not isinstance(part, Map):
        raise TypeError(f"{name} must be a superlora.maps.Map: got {part!r}")
    if part.joint:
        raise ValueError(f"{name} must be a map of one group: got {part!r}")
