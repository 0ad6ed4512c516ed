"""What the maps of the library share: checks of arguments, a seed, the shape of one weight."""

from __future__ import annotations

import abc
import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy

from superlora._backend import Array, backend_of, cast, check_floating, widened
from superlora.checks import check_count, hashable
from superlora.maps._base import Map, Place
from superlora.maps.permutations import Permutation, permutation_rows
from superlora.random import VERSION, check_seed, coarse_normals, signs

NORMALIZE = ("isometric", "variance", None)
# Seeds of one map: signs, numbers, permutations small and large, each with streams of its own.
SIGNS, NORMALS, ORDERS, ROWS = range(1, 5)
CHECKED = 1 << 12  # entries of every draw that a checksum is of
_GROUPS = 1 << 24  # that can have streams of their own


@dataclass(frozen=True, kw_only=True)
class CheckedMap(Map):
    """A map that refuses wrong arguments, and computes in single precision at least."""

    choices: ClassVar[dict[str, tuple[object, ...]]] = {}

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            name, value = item.name, getattr(self, item.name)
            allowed = (True, False) if item.type == "bool" else self.choices.get(name)
            # 1 is not True here: a file would hold the number.
            if allowed and not any(type(value) is type(one) and value == one for one in allowed):
                raise ValueError(f"{name} must be one of {allowed}: got {value!r}")

    def apply(self, x: Array, size: int) -> Array:
        """Return F x."""
        return self.apply_slice(x, size, 0, size)

    def apply_slice(self, x: Array, size: int, start: int, stop: int) -> Array:
        """Return some entries of F x."""
        check_vector("x", x)
        check_count("size", size)
        check_count("start", start, least=0)
        check_count("stop", stop)
        if not 0 <= start < stop <= size:
            raise ValueError(
                f"start and stop must be a slice of {size} entries: got {start} and {stop}"
            )
        self.check(x.shape[0], size)
        return cast(self._forward(widened(x), size, start, stop), like=x)

    def adjoint(self, y: Array, size: int) -> Array:
        """Return Fᵀ y."""
        check_vector("y", y)
        check_count("size", size)
        try:
            self.check(size, y.shape[0])
        except ValueError as error:
            raise ValueError(f"{error}; of the map from {size} to {y.shape[0]} entries") from None
        return cast(self._backward(widened(y), size), like=y)

    @abc.abstractmethod
    def _forward(self, x: Array, size: int, start: int, stop: int) -> Array: ...

    @abc.abstractmethod
    def _backward(self, y: Array, before: int) -> Array: ...


@dataclass(frozen=True, kw_only=True)
class SeededMap(CheckedMap):
    """A map whose constants are drawn from a seed."""

    seed: int = 0  # the same numbers on every library, device, release and platform
    shared: bool = True  # by all groups of one size; else each draws its own
    version: int = VERSION  # of the derivation of all numbers from the seed
    substream: int = 0  # set by a plan where the map is not shared: the group's index

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)
        if check_count("version", self.version) != VERSION:
            raise ValueError(f"version must be {VERSION}, the derivation here: got {self.version}")
        if check_count("substream", self.substream, least=0) >= _GROUPS:
            raise ValueError(f"substream must be below {_GROUPS}: got {self.substream}")

    def bind(self, place: Place) -> Map:
        """Return the map as it is for one group of a plan."""
        return self if self.shared else self.part(place.group)

    def part(self, index: int) -> Map:
        """Return the same map with other streams, independent of those of any other index."""
        return dataclasses.replace(self, substream=index)

    def _among(self, count: int, index: int) -> Map:
        return self.part(self.substream * count + index)

    def _fixed(self, like: Array, draw: str, *args: int) -> Array:
        return self.kept(like, draw, *args, keep=getattr(self, "stored", True))

    def _stream(self, kind: int) -> int:
        return kind << 56 | self.substream << 32

    def _order(self, size: int, kind: int = ORDERS) -> Permutation:
        return Permutation(self.seed, self._stream(kind), size)

    def _orders(self, size: int, first: int, last: int, inverse: bool = False) -> numpy.ndarray:
        """Return some permutations of one size, a row each."""
        return permutation_rows(self.seed, self._stream(ROWS), size, first, last, inverse=inverse)

    def _draw_signs(self, start: int, stop: int, kind: int = SIGNS) -> numpy.ndarray:
        return signs(self.seed, self._stream(kind), start, stop)

    def _draw_normals(self, start: int, stop: int, kind: int = NORMALS) -> numpy.ndarray:
        return coarse_normals(self.seed, self._stream(kind), start, stop)


def scale_of(normalize: str | None, before: int, size: int) -> float:
    """Return the factor for columns that have unit entries: 1 / sqrt(size) is isometric."""
    counts = {"isometric": size, "variance": before, None: 1}
    scale: float = counts[normalize] ** -0.5
    return scale


def chunks(width: int, size: int, start: int, stop: int) -> list[tuple[int, int]]:
    """Return the bounds of those runs of `width` entries, of `size` in all, that hold a slice."""
    return [
        (first, min(first + width, size)) for first in range(start // width * width, stop, width)
    ]


def joined(runs: list[Array]) -> Array:
    """Return vectors one after the other, which takes no copy of one alone."""
    return runs[0] if len(runs) == 1 else backend_of(runs[0]).concatenate(runs, axis=0)


def check_vector(name: str, array: Array) -> None:
    """Refuse what is no vector of floating-point numbers, of 16 bits at least."""
    check_floating(name, array)
    if any(short in str(array.dtype) for short in ("float8", "float6_", "float4_")):
        raise TypeError(f"{name} must have numbers of at least 16 bits: got {array.dtype}")
    check_rank(name, array)


def check_rank(name: str, array: Array) -> None:
    """Refuse what is no vector of at least one entry."""
    if len(array.shape) != 1 or not array.shape[0]:
        raise ValueError(f"{name} must be a vector of entries: got shape {tuple(array.shape)}")


def check_enough(before: int, size: int, kind: str) -> None:
    """Refuse fewer outputs than inputs where some inputs would then have no effect."""
    if size < before:
        raise ValueError(
            f"size must be at least {before}, the entries before {kind}: got {size}; take a "
            "smaller ratio, size or fold"
        )


@dataclass(frozen=True, kw_only=True)
class WeightMap(CheckedMap):
    """A map of one whole weight, (outputs, inputs); in a plan it has the weight's shape."""

    shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        freeze_counts(self, "shape", least=1)
        if self.shape is not None and len(self.shape) != 2:
            raise ValueError(f"shape must have two axes: got {self.shape}")

    def bind(self, place: Place) -> Map:
        bound = super().bind(place)
        if self.shape is not None or not place.shapes:
            return bound
        return dataclasses.replace(bound, **{"shape": weight_shape(self, place)})

    def check(self, before: int, size: int) -> None:
        axes = self._axes(size)
        if math.prod(axes) != size:
            raise ValueError(f"shape must have {size} entries, those of the group: got {axes}")

    def _axes(self, size: int = 0) -> tuple[int, ...]:
        if self.shape is None:
            raise ValueError("shape must be given for a map outside a plan: got None")
        return self.shape


@dataclass(frozen=True, kw_only=True)
class PlacedMap(WeightMap, SeededMap):
    """Coefficients at some places of a transform, random ones or given ones."""

    given: ClassVar[str]  # the field of given places

    def __post_init__(self) -> None:
        super().__post_init__()
        freeze_counts(self, self.given, least=0)
        places = self._places_given
        if places is not None and len(set(places)) < len(places):
            raise ValueError(f"{self.given} must all be different: got {places}")

    @property
    def _places_given(self) -> tuple[int, ...] | None:
        places: tuple[int, ...] | None = getattr(self, self.given)
        return places

    def check(self, before: int, size: int) -> None:
        """Refuse a shape of another size, and more coefficients than places."""
        check_enough(before, size, type(self).__name__)
        super().check(before, size)
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
        """Return the places."""
        if self._places_given is not None:
            return {}
        return {self.given: self._chosen(min(before, CHECKED), size)}

    def _chosen(self, before: int, size: int) -> numpy.ndarray:
        if self._places_given is not None:
            return numpy.array(self._places_given)
        return self._order(size).forward(0, before)


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


def weight_shape(fixed: Map, place: Place) -> tuple[int, int]:
    """Return the shape of the one weight of a group, or refuse another group."""
    if len(place.shapes) != 1 or not place.whole:
        other = ", or a shape" if hasattr(fixed, "shape") else ""
        raise ValueError(
            f"map={type(fixed).__name__}() must have one whole weight a group, groups='weight'"
            f"{other}: got {len(place.shapes)} weights in group {place.group}"
        )
    return place.shapes[0]
