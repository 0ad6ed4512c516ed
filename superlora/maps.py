"""The fixed linear maps F between a folded tensor and its group.

A map takes a vector of the fold's entries to one of the group's entries; it has
no trainable parameters. A map of your own is a frozen dataclass that derives
from `Map`; its fields are what a file stores.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from superlora._backend import Array, backend_of, zeros
from superlora.values import hashable


@dataclass(frozen=True)
class Map(abc.ABC):
    """A fixed linear map from ``before`` entries to ``size`` entries.

    Derive a frozen dataclass from it and implement `apply` and `adjoint`; the
    class is then known to ``Spec.from_dict`` by its name.

    Raises
    ------
    TypeError
        When a second class of the same name is defined by another module.
    """

    _known: ClassVar[dict[str, type[Map]]] = {}

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

    def to_dict(self) -> dict[str, Any]:
        """Return the map's name and fields as plain JSON values.

        Returns
        -------
        dict
            ``{"name": class name, field: value, …}``.
        """
        return {"name": type(self).__name__, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class Identity(Map):
    """The map of plain methods: keep the first entries, drop the cover's tail.

    Examples
    --------
    >>> import numpy as np
    >>> Identity().apply(np.arange(6.0), 4)
    array([0., 1., 2., 3.])
    >>> Identity().adjoint(np.ones(4), 6)
    array([1., 1., 1., 1., 0., 0.])
    """

    def apply(self, x: Array, size: int) -> Array:
        """Return the first `size` entries of `x`.

        Parameters
        ----------
        x : array, (before,)
            At least `size` entries.
        size : int
            Entries to keep.

        Returns
        -------
        array, (size,)
            A slice of `x`.

        Raises
        ------
        ValueError
            If `x` has fewer than `size` entries.
        """
        if x.shape[0] < size:
            raise ValueError(f"size must be at most {x.shape[0]}, the entries of x: got {size}")
        return x[:size]

    def adjoint(self, y: Array, size: int) -> Array:
        """Return `y` followed by zeros.

        Parameters
        ----------
        y : array, (after,)
            At most `size` entries.
        size : int
            Entries of the result.

        Returns
        -------
        array, (size,)
            Same library, dtype and device as `y`.

        Raises
        ------
        ValueError
            If `y` has more than `size` entries.
        """
        missing = size - y.shape[0]
        if missing < 0:
            raise ValueError(f"size must be at least {y.shape[0]}, the entries of y: got {size}")
        if missing == 0:
            return y
        return backend_of(y).concatenate([y, zeros((missing,), like=y)], axis=0)


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
    if name not in Map._known:
        raise ValueError(
            f"map must be one of {sorted(Map._known)}; a map of your own must be imported before "
            f"its file is read: got {name!r}"
        )
    try:
        return Map._known[name](**{key: hashable(value) for key, value in fields.items()})
    except TypeError as error:
        raise ValueError(f"map {name} has wrong fields: {error}") from None
