"""`Map`: what every fixed linear map has, and how a spec and a file name it."""

from __future__ import annotations

import abc
import dataclasses
import inspect
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy

from superlora._backend import Array, backend_of, constant
from superlora.checks import hashable


@dataclass(frozen=True)
class Place:
    """Where a map stands in a plan.

    Attributes
    ----------
    group : int
        Index of the group.
    shapes : tuple of (int, int)
        Output and input width of the group's weights, in order; none where the map
        makes no whole group, but a part of a vector.
    whole : bool
        Whether no weight is cut by the group's boundary.
    """

    group: int
    shapes: tuple[tuple[int, int], ...]
    whole: bool


@dataclass(frozen=True)
class Map(abc.ABC):
    """A fixed linear map from ``before`` entries to ``size`` entries.

    Derive a frozen dataclass from it and implement `apply` and `adjoint`; the
    class is then known to ``Spec.from_dict`` by its name, and its fields are what a
    file stores.

    Attributes
    ----------
    keeps_size : bool
        Of the class: whether it has as many entries after as before, so that a spec
        has no ratio with it.
    keeps_fold : bool
        Of the class: whether the spec's fold is that of the weights, as without a map.
    joint : bool
        Of the class or the map: whether it takes all groups together.
    sliced : bool
        Of the class or the map: whether `apply_slice` costs less than `apply`.
    reads : bool
        Of the class: whether each output is one entry, maybe with a sign, of inputs that
        `normalized` scales; such a map has `gather` and `scatter` too.
    in_place : bool
        Of the class: whether the entries of the folded tensor stay where they are, or are mapped
        mode by mode, so that one weight is made without the others.
    is_identity : bool
        Of the class: whether the entries are taken as they are, as by `Identity`.

    Notes
    -----
    What a map draws from its seed is kept by the map from the first call with some sizes, on
    each device, and is no part of its value. ``torch.compile`` cannot trace the drawing:
    apply such a map once before. One that keeps nothing cannot be compiled.

    Raises
    ------
    TypeError
        When a second class of the same name is defined by another module.
    """

    _known: ClassVar[dict[str, type[Map]]] = {}
    keeps_size: ClassVar[bool] = False
    keeps_fold: ClassVar[bool] = False
    joint: ClassVar[bool] = False
    sliced: ClassVar[bool] = False
    in_place: ClassVar[bool] = False
    reads: ClassVar[bool] = False
    is_identity: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        other = Map._known.get(cls.__name__)
        if other is not None and other.__module__ != cls.__module__:
            raise TypeError(f"a map named {cls.__name__!r} exists already in {other.__module__}")
        Map._known[cls.__name__] = cls

    @abc.abstractmethod
    def apply(self, x: Array, size: int) -> Array:
        """Return F x.

        Parameters
        ----------
        x : array, (before,)
            The folded tensor, raveled in row-major order.
        size : int
            Entries of the group.

        Returns
        -------
        array, (size,)
            Same library, dtype and device as `x`.
        """

    @abc.abstractmethod
    def adjoint(self, y: Array, size: int) -> Array:
        """Return Fᵀ y.

        Parameters
        ----------
        y : array, (after,)
            A vector of the group's entries.
        size : int
            Entries of the fold.

        Returns
        -------
        array, (size,)
            Same library, dtype and device as `y`.
        """

    def apply_slice(self, x: Array, size: int, start: int, stop: int) -> Array:
        """Return some entries of F x.

        Parameters
        ----------
        x : array, (before,)
            The folded tensor, raveled in row-major order.
        size : int
            Entries of the group.
        start, stop : int
            Which entries, ``start <= position < stop``.

        Returns
        -------
        array, (stop - start,)
            What `apply` has there.
        """
        return self.apply(x, size)[start:stop]

    def mixes(self, before: int, size: int) -> bool:
        """Return whether a slice of so many entries costs about as much as all of them."""
        return self.keeps_size or not self.sliced

    def bind(self, place: Place) -> Map:
        """Return the map as it is for one group of a plan.

        Parameters
        ----------
        place : Place
            The group and the weights in it.

        Returns
        -------
        Map
            Itself, unless it depends on the group.
        """
        return self

    def repeated(self) -> str:
        """Return what a vector is repeated along to make a weight; empty where it is no vector."""
        return ""

    def mapped(self, order: int) -> tuple[int, ...]:
        """Return which of so many modes are mapped on their own, by `map_mode`."""
        return ()

    def mode(self, index: int) -> Map:
        """Return the map of one mode; those of split k of M modes begin at ``k M``."""
        return self

    def joined(self, splits: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> Map:
        """Return the map of all modes of splits, of whose sizes before and after it is made."""
        return self

    def sizes_before(self, after: tuple[int, ...], share: float) -> tuple[int, ...]:
        """Return the mode sizes before, where every mapped mode has a share of its entries."""
        return after

    def check_fold(self, order: int) -> None:  # noqa: B027
        """Refuse a fold of an order that the map cannot serve."""

    def map_mode(
        self, tensor: Array, axis: int, index: int, size: int, *, adjoint: bool = False
    ) -> Array:
        """Apply the map of one mode, or its adjoint, along an axis of a tensor."""
        raise NotImplementedError(f"{type(self).__name__}() is no map of single modes")

    def normalized(self, x: Array, size: int) -> Array:
        """Return the entries before the map as `gather` reads them; this is its own adjoint."""
        raise NotImplementedError(f"{type(self).__name__}() reads no single entries")

    def gather(self, x: Array, size: int, start: int, stop: int) -> Array:
        """Return some entries of F x, of inputs that are normalised already."""
        raise NotImplementedError(f"{type(self).__name__}() reads no single entries")

    def scatter(self, y: Array, into: Array, size: int, start: int) -> None:
        """Add the adjoint of `gather`, of entries from `start` on, to a torch tensor in place."""
        raise NotImplementedError(f"{type(self).__name__}() reads no single entries")

    def product_operations(self, before: int, shape: tuple[int, int]) -> tuple[int, int] | None:
        """Return the multiplications and moved entries of `multiply` for an input, if there is."""
        return None

    def multiply(self, values: Array, x: Array) -> Array:
        """Multiply inputs (n, input width) by the weight of some entries, without forming it."""
        raise NotImplementedError(f"{type(self).__name__}() multiplies no inputs")

    def fixed_entries(self, place: Place) -> int | None:
        """Return how many entries the map takes; None where the spec's ratio or size says it."""
        return None

    def check(self, before: int, size: int) -> None:  # noqa: B027
        """Raise a `ValueError` for sizes of fold and group that the map cannot serve."""

    def gain(self, before: int, size: int) -> float:
        """Return the mean square of an output for inputs of mean square 1.

        Parameters
        ----------
        before, size : int
            Entries of the fold and of the group.

        Returns
        -------
        float
            ``before / size`` for an isometric map; 1 where nothing else is known.
        """
        return 1.0

    def constants(self, before: int, size: int) -> dict[str, numpy.ndarray]:
        """Return what the map draws from its seed: all of it, or the first part.

        Parameters
        ----------
        before, size : int
            Entries of the fold and of the group.

        Returns
        -------
        dict of str to numpy.ndarray
            What `checksum` is taken of; empty where nothing is drawn.
        """
        return {}

    def checksum(self, before: int, size: int) -> int | None:
        """Return a number that tells whether the map is drawn as it was.

        Parameters
        ----------
        before, size : int
            Entries of the fold and of the group.

        Returns
        -------
        int or None
            The CRC-32 of `constants`; None where nothing is drawn.
        """
        drawn = self.constants(before, size)
        total = 0
        for name, values in drawn.items():
            # The bytes of one byte order, and of integers of one size.
            kind = "<i8" if values.dtype.kind == "i" else "<f8"
            total = zlib.crc32(name.encode() + values.astype(kind).tobytes(), total)
        return total if drawn else None

    def operations(self, before: int, size: int) -> int:
        """Return about how many additions and multiplications `apply` takes.

        Parameters
        ----------
        before, size : int
            Entries of the fold and of the group.

        Returns
        -------
        int
            Moves of entries not counted.
        """
        return 0

    def nbytes(self, before: int, size: int) -> int:
        """Return how many bytes of constants are kept for these sizes, not stored in any file.

        Parameters
        ----------
        before, size : int
            Entries of the fold and of the group.

        Returns
        -------
        int
            For `apply` and `adjoint` both.
        """
        return 0

    def to_dict(self) -> dict[str, Any]:
        """Return the map's name and fields as plain JSON values.

        Returns
        -------
        dict
            ``{"name": class name, field: value, …}``.
        """
        fields = self.__getstate__().items()
        return {"name": type(self).__name__, **{key: _plain(value) for key, value in fields}}

    def kept(self, like: Array, draw: str, *args: int, keep: bool = True) -> Array:
        """Return what a method of the map gives, for arithmetic with an array.

        Parameters
        ----------
        like : array
            Of any library.
        draw : str
            Name of the method, which returns a `numpy.ndarray`.
        *args : int
            What it takes: all that its result depends on, besides the map's fields.
        keep : bool
            Whether the result is kept for the next call.

        Returns
        -------
        array
            On the device of `like`, of the method's dtype.

        Notes
        -----
        For a map of your own: constants kept here are no part of its value, and are
        there once for each library and device.
        """
        # Those of torch that have no values must not be kept for those that have.
        if not keep or hasattr(like, "fake_mode"):
            return constant(getattr(self, draw)(*map(int, args)), like)
        args = tuple(map(int, args))  # torch's sizes may be symbols
        kept = self.__dict__.get("_constants")
        if kept is None:
            kept = self.__dict__.setdefault("_constants", {})
        device = str(like.device) if hasattr(like, "is_meta") else ""
        key = (draw, args, backend_of(like).backend_name, device)
        found = kept.get(key)
        if found is None:
            found = constant(getattr(self, draw)(*args), like)
            if not hasattr(found, "fake_mode"):
                kept[key] = found
        return found

    def _among(self, count: int, index: int) -> Map:
        """Return the map with streams of its own, as one of so many."""
        return self

    # What is kept is no part of the value.
    def __getstate__(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}

    def __deepcopy__(self, memo: dict[int, Any]) -> Map:
        return self  # it cannot change


def _plain(value: Any) -> Any:
    if isinstance(value, Map):
        return value.to_dict()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def map_from_dict(values: object) -> Map:
    """Make a map from what `Map.to_dict` gave.

    Parameters
    ----------
    values : Map or mapping
        A map is returned as it is.

    Returns
    -------
    Map
        The map.

    Raises
    ------
    TypeError
        If `values` is neither.
    ValueError
        If the name is unknown or a field is wrong.
    """
    if isinstance(values, Map):
        return values
    if not isinstance(values, Mapping):
        raise TypeError(f"map must be a mapping with a name: got {values!r}")
    fields = dict(values)
    name = fields.pop("name", None)
    known = {key: kind for key, kind in Map._known.items() if not inspect.isabstract(kind)}
    if not isinstance(name, str) or name not in known:
        raise ValueError(
            f"map must be one of {sorted(known)}; a map of your own must be imported before "
            f"its file is read: got {name!r}"
        )
    try:
        return known[name](**{key: _parsed(value) for key, value in fields.items()})
    except TypeError as error:
        raise ValueError(f"map {name} has wrong fields: {error}") from None


def _parsed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return map_from_dict(value)
    return tuple(map(_parsed, value)) if isinstance(value, (list, tuple)) else hashable(value)
