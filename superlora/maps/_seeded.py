"""What the maps of the library share: one check of their arguments, and a seed."""

from __future__ import annotations

import abc
import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from superlora._backend import Array, backend_of, cast, check_floating, widened
from superlora.maps._base import Map, Place
from superlora.random import VERSION, check_seed
from superlora.values import check_count

NORMALIZE = ("isometric", "variance", None)
# Seeds of one map: signs, numbers, permutations small and large, each with streams of its own.
SIGNS, NORMALS, ORDERS, ROWS = range(1, 5)
CHECKED = 1 << 12  # entries of every draw that a checksum is of
_GROUPS = 1 << 24  # that can have streams of their own


@dataclass(frozen=True, kw_only=True)
class CheckedMap(Map):
    """A map that refuses wrong arguments, and computes in single precision at least."""

    def apply(self, x: Array, size: int) -> Array:
        """Return F x.

        Parameters
        ----------
        x : array, (before,)
            Floating point; half precision is computed in single.
        size : int
            Entries of the result.

        Returns
        -------
        array, (size,)
            Same library, dtype and device as `x`.

        Raises
        ------
        TypeError
            If `x` is not of a floating-point type, or `size` is not an integer.
        ValueError
            If `x` is not a vector, or the map cannot serve these sizes.
        """
        return self.apply_slice(x, size, 0, size)

    def apply_slice(self, x: Array, size: int, start: int, stop: int) -> Array:
        """Return some entries of F x.

        Parameters
        ----------
        x : array, (before,)
            Floating point; half precision is computed in single.
        size : int
            Entries of the whole.
        start, stop : int
            Which entries, ``start <= position < stop``.

        Returns
        -------
        array, (stop - start,)
            What `apply` has there.

        Raises
        ------
        TypeError
            If `x` is not of a floating-point type, or a number is not an integer.
        ValueError
            If `x` is not a vector, the map cannot serve these sizes, or the slice is not
            within them.
        """
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
        """Return Fᵀ y.

        Parameters
        ----------
        y : array, (after,)
            Floating point; half precision is computed in single.
        size : int
            Entries of the fold.

        Returns
        -------
        array, (size,)
            Same library, dtype and device as `y`.

        Raises
        ------
        TypeError
            If `y` is not of a floating-point type, or `size` is not an integer.
        ValueError
            If `y` is not a vector, or the map cannot serve these sizes.
        """
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
    """A map whose constants are drawn from a seed.

    Parameters
    ----------
    seed : int
        In [0, 2**64): the same numbers on every library, device, release and platform.
    shared : bool
        Whether all groups of one size have the same map; else each draws its own.
    version : int
        Of the derivation of all numbers from the seed.
    substream : int
        Set by a plan where the map is not shared: the group's index.
    """

    seed: int = 0
    shared: bool = True
    version: int = VERSION
    substream: int = 0

    choices: ClassVar[dict[str, tuple[object, ...]]] = {}

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if check_count("version", self.version) != VERSION:
            raise ValueError(f"version must be {VERSION}, the derivation here: got {self.version}")
        if check_count("substream", self.substream, least=0) >= _GROUPS:
            raise ValueError(f"substream must be below {_GROUPS}: got {self.substream}")
        for item in dataclasses.fields(self):
            name, value = item.name, getattr(self, item.name)
            allowed = (True, False) if item.type == "bool" else self.choices.get(name)
            # 1 is not True here: a file would hold the number.
            if allowed and not any(type(value) is type(one) and value == one for one in allowed):
                raise ValueError(f"{name} must be one of {allowed}: got {value!r}")

    def bind(self, place: Place) -> Map:
        """Return the map as it is for one group of a plan.

        Parameters
        ----------
        place : Place
            The group and the weights in it.

        Returns
        -------
        Map
            Itself where it is shared, else with the group's own streams.
        """
        return self if self.shared else self.part(place.group)

    def part(self, index: int) -> Map:
        """Return the same map with other streams.

        Parameters
        ----------
        index : int
            At least 0.

        Returns
        -------
        Map
            Draws that are independent of those of any other index.
        """
        return dataclasses.replace(self, substream=index)

    def _among(self, count: int, index: int) -> Map:
        return self.part(self.substream * count + index)

    def _fixed(self, like: Array, draw: str, *args: int) -> Array:
        return self.kept(like, draw, *args, keep=getattr(self, "stored", True))

    def _stream(self, kind: int) -> int:
        return kind << 56 | self.substream << 32


def scale_of(normalize: str | None, before: int, size: int) -> float:
    """Return the factor for columns that have unit entries: 1 / sqrt(size) is isometric."""
    if normalize is None:
        return 1.0
    scale: float = (size if normalize == "isometric" else before) ** -0.5
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
    if len(array.shape) != 1 or not array.shape[0]:
        raise ValueError(f"{name} must be a vector of entries: got shape {tuple(array.shape)}")


def check_enough(before: int, size: int, kind: str) -> None:
    """Refuse fewer outputs than inputs where some inputs would then have no effect."""
    if size < before:
        raise ValueError(
            f"size must be at least {before}, the entries before {kind}: got {size}; take a "
            "smaller ratio, size or fold"
        )
