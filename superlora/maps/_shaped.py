"""What the maps of one whole weight share: its shape, and coefficients at some places."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy

from superlora.maps._base import Map, Place
from superlora.maps._seeded import CHECKED, ORDERS, SeededMap, check_enough
from superlora.permutations import Permutation
from superlora.values import check_count, hashable


@dataclass(frozen=True, kw_only=True)
class PlacedMap(SeededMap):
    """Coefficients at some places of a transform, random ones or given ones.

    Parameters
    ----------
    shape : tuple of int, optional
        The two axes of the transform, in a plan those of the weight.
    """

    shape: tuple[int, ...] | None = None

    given: ClassVar[str]  # the field of given places

    def __post_init__(self) -> None:
        super().__post_init__()
        freeze_shape(self)
        freeze_counts(self, self.given, least=0)
        places = self._places_given
        if places is not None and len(set(places)) < len(places):
            raise ValueError(f"{self.given} must all be different: got {places}")

    @property
    def _places_given(self) -> tuple[int, ...] | None:
        places: tuple[int, ...] | None = getattr(self, self.given)
        return places

    def bind(self, place: Place) -> Map:
        """Return the map with the shape of the group's weight.

        Parameters
        ----------
        place : Place
            The group and the weights in it.

        Returns
        -------
        Map
            With a shape.
        """
        return with_shape(super().bind(place), place)

    def check(self, before: int, size: int) -> None:
        """Refuse a shape of another size, and more coefficients than places.

        Parameters
        ----------
        before, size : int
            Entries of the fold and of the group.

        Raises
        ------
        ValueError
            If it is so.
        """
        check_enough(before, size, type(self).__name__)
        check_axes(self._axes(size), size)
        places = self._places_given
        if places is None:
            return
        if len(places) != before:
            raise ValueError(
                f"{self.given} must be {before}, one for each entry of the fold: got {len(places)}"
            )
        if max(places) >= size:
            raise ValueError(
                f"{self.given} must be below {size}, the group's size: got {max(places)}"
            )

    def constants(self, before: int, size: int) -> dict[str, numpy.ndarray]:
        """Return the places.

        Parameters
        ----------
        before, size : int
            Entries of the fold and of the group.

        Returns
        -------
        dict of str to numpy.ndarray
            At most 4096 of them; empty where they are given.
        """
        if self._places_given is not None:
            return {}
        return {self.given: self._chosen(min(before, CHECKED), size)}

    def _axes(self, size: int) -> tuple[int, ...]:
        return (1, size) if self.shape is None else self.shape

    def _chosen(self, before: int, size: int) -> numpy.ndarray:
        if self._places_given is not None:
            return numpy.array(self._places_given)
        return Permutation(self.seed, self._stream(ORDERS), size).forward(0, before)


def freeze_counts(fixed: Map, name: str, least: int) -> None:
    """Make a field a tuple of integers, or refuse it; None stays where it is the default."""
    values = hashable(getattr(fixed, name))
    object.__setattr__(fixed, name, values)
    if values is None and hasattr(type(fixed), name):
        return
    if not isinstance(values, tuple) or not values:
        raise TypeError(f"{name} must be a tuple of integers: got {values!r}")
    for index, value in enumerate(values):
        check_count(f"{name}[{index}]", value, least=least)


def freeze_shape(fixed: Map) -> None:
    """Make the field `shape` a tuple of two integers, or refuse it; None stays."""
    freeze_counts(fixed, "shape", least=1)
    shape = getattr(fixed, "shape", None)
    if shape is not None and len(shape) != 2:
        raise ValueError(f"shape must have two axes: got {shape}")


def check_axes(axes: tuple[int, ...], size: int) -> None:
    """Refuse axes that have not as many entries as the group."""
    if math.prod(axes) != size:
        raise ValueError(f"shape must have {size} entries, those of the group: got {axes}")


def shape_given(fixed: Map) -> tuple[int, ...]:
    """Return a map's shape, or refuse a map that has none."""
    shape: tuple[int, ...] | None = getattr(fixed, "shape", None)
    if shape is None:
        raise ValueError("shape must be given for a map outside a plan: got None")
    return shape


def weight_shape(fixed: Map, place: Place) -> tuple[int, int]:
    """Return the shape of the one weight of a group, or refuse another group."""
    if len(place.shapes) != 1 or not place.whole:
        other = ", or a shape" if hasattr(fixed, "shape") else ""
        raise ValueError(
            f"map={type(fixed).__name__}() must have one whole weight a group, groups='weight'"
            f"{other}: got {len(place.shapes)} weights in group {place.group}"
        )
    return place.shapes[0]


def with_shape(fixed: Map, place: Place) -> Map:
    """Return a map with the shape of the group's weight, unless it has one or has no weight."""
    if getattr(fixed, "shape", None) is not None or not place.shapes:
        return fixed
    return dataclasses.replace(fixed, **{"shape": weight_shape(fixed, place)})
