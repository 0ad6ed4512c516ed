"""One map for each mode: a projection that needs no ΔW."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy

from superlora._backend import Array, backend_of, cast, move_axis, widened
from superlora.maps._base import Map, Place
from superlora.maps._seeded import freeze_counts
from superlora.maps.composed import CombinedMap, check_part
from superlora.maps.fastfood import Fastfood
from superlora.maps.index_maps import Identity, padded

_DENSE = 1 << 24  # entries of a mode's matrix that is kept, so that a product takes its place
_MODES = 4096  # that can have streams of their own


@dataclass(frozen=True, kw_only=True)
class Separable(CombinedMap):
    """A Kronecker product of maps, one for each mode of the fold.

    Parameters
    ----------
    inner : Map
        The map of every mode, a `Fastfood` by default; one with a seed draws from streams
        of their own for the modes.
    modes : tuple of int, optional
        The modes that have it; all by default. The others stay as they are.
    before, after : tuple of int, optional
        The mode sizes of the tensor before and after. In a plan the spec's fold is the one
        after, and the one before follows from its ratio: every mapped mode has
        ``ratio ** (1 / modes)`` as many entries, rounded up.

    Raises
    ------
    TypeError, ValueError
        If a field is out of its range, or only one of `before` and `after` is given.

    Notes
    -----
    ``F = F_1 ⊗ … ⊗ F_M``, so that ``F vec(X) = vec(X x_1 F_1 … x_M F_M)``: a Kronecker
    fast Johnson–Lindenstrauss transform [1]_. If the maps of the modes are isometric in the
    mean and independent, so is F; its deviations are larger. A Tucker factorisation stays
    one, with factors ``F_m A_m``, so that weights are applied without being formed as they are
    without a map.

    References
    ----------
    .. [1] R. Jin, T. Kolda and R. Ward, "Faster Johnson–Lindenstrauss Transforms via Kronecker
       Products", 2019.

    Examples
    --------
    >>> import numpy as np
    >>> fixed = Separable(inner=Fastfood(values="sign"), before=(2, 2), after=(4, 4))
    >>> y = fixed.apply(np.array([1.0, 2.0, 3.0, 4.0]), 16)
    >>> float(round(y @ y, 12))
    30.0
    """

    inner: Map = field(default_factory=Fastfood)
    modes: tuple[int, ...] | None = None
    before: tuple[int, ...] | None = None
    after: tuple[int, ...] | None = None

    keeps_fold: ClassVar[bool] = True
    in_place: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_part("inner", self.inner)
        if isinstance(self.inner, (Separable, Identity)):
            raise ValueError(f"inner must be a map of one mode: got {self.inner!r}")
        for name, least in (("modes", 0), ("before", 1), ("after", 1)):
            freeze_counts(self, name, least)
        if self.modes is not None and len(set(self.modes)) < len(self.modes):
            raise ValueError(f"modes must all be different: got {self.modes}")
        if (self.before is None) != (self.after is None):
            raise ValueError("before and after must be given together: got one of them")
        if self.before is not None and self.after is not None:
            self._check_modes(len(self.after))
            if len(self.before) != len(self.after):
                raise ValueError(
                    f"before must have {len(self.after)} modes, those of after: got {self.before}"
                )
            for mode, (old, new) in enumerate(zip(self.before, self.after, strict=True)):
                if mode not in self.mapped(len(self.after)) and old != new:
                    raise ValueError(
                        f"before[{mode}] must be {new}, the size after, in a mode without a map: "
                        f"got {old}"
                    )

    def bind(self, place: Place) -> Map:
        """Return the map as it is for one group of a plan."""
        inner = self.inner.bind(Place(place.group, (), False))
        if place.group >= _MODES and inner is not self.inner:
            raise ValueError(
                f"groups must be at most {_MODES} with map=Separable() of an inner map that is not "
                f"shared: got group {place.group}"
            )
        return self if inner is self.inner else dataclasses.replace(self, inner=inner)

    def check_fold(self, order: int) -> None:
        """Refuse a fold of an order that the map cannot serve, or sizes besides it."""
        self._check_modes(order)
        if self.before is not None:
            raise ValueError(
                "map=Separable() must leave before and after to the fold and the ratio: got "
                f"before={self.before}"
            )

    def _among(self, count: int, index: int) -> Map:
        inner = self.inner._among(count, index)
        return self if inner is self.inner else dataclasses.replace(self, inner=inner)

    def _check_modes(self, order: int) -> None:
        if self.modes is not None and max(self.modes) >= order:
            raise ValueError(
                f"modes must be below {order}, the order of the fold: got {self.modes}"
            )

    def mapped(self, order: int) -> tuple[int, ...]:
        """Return the modes that have a map."""
        return tuple(range(order)) if self.modes is None else tuple(sorted(self.modes))

    def mode(self, index: int) -> Map:
        """Return the map of one mode, or of one split's mode."""
        if index not in self._of_modes:
            self._of_modes[index] = self.inner._among(_MODES, index)
        return self._of_modes[index]

    @functools.cached_property
    def _of_modes(self) -> dict[int, Map]:
        return {}

    def sizes_before(self, after: tuple[int, ...], share: float) -> tuple[int, ...]:
        """Return the mode sizes before, of a fold or a split of it."""
        mapped = self.mapped(len(after))
        return tuple(
            min(size, max(1, math.ceil(size * share - 1e-9))) if mode in mapped else size
            for mode, size in enumerate(after)
        )

    def joined(self, splits: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> Separable:
        """Return the map of all modes of all splits."""
        order = len(splits[0][0])
        modes = [k * order + mode for k in range(len(splits)) for mode in self.mapped(order)]
        before, after = (sum((sizes[side] for sizes in splits), ()) for side in (0, 1))
        return Separable(inner=self.inner, modes=tuple(modes), before=before, after=after)

    def map_mode(
        self, tensor: Array, axis: int, index: int, size: int, *, adjoint: bool = False
    ) -> Array:
        """Apply one mode's map, or its adjoint, along an axis."""
        library = backend_of(tensor)
        width = tensor.shape[axis]
        if width * size <= _DENSE:
            before, after = (size, width) if adjoint else (width, size)
            wide = widened(tensor)
            double = "float64" in str(wide.dtype)
            matrix = cast(self.kept(wide, "_matrix", index, before, after, double), like=wide)
            product = library.tensordot(matrix, wide, axes=([0 if adjoint else 1], [axis]))
            product = cast(product, like=tensor)
        else:
            fixed = self.mode(index)
            columns = library.reshape(move_axis(tensor, axis, 0), (width, -1))
            move = fixed.adjoint if adjoint else fixed.apply
            results = [move(columns[:, column], size) for column in range(columns.shape[1])]
            rest = [entries for mode, entries in enumerate(tensor.shape) if mode != axis]
            product = library.reshape(library.stack(results, axis=1), (size, *rest))
        return move_axis(product, 0, axis)

    def check(self, before: int, size: int) -> None:
        """Refuse sizes that are not those of the modes."""
        given, made = self._sizes
        if math.prod(given) != before:
            raise ValueError(f"before must have {before} entries, those of x: got {given}")
        if math.prod(made) < size:
            raise ValueError(f"after must cover {size} entries: got {made}")
        super().check(before, size)

    def operations(self, before: int, size: int) -> int:
        """Return about how many additions and multiplications `apply` takes."""
        total = 0
        for _, fixed, width, after in self._each(before, size):
            dense = width * after <= _DENSE
            each = 2 * width * after if dense else fixed.operations(width, after)
            total += before // width * each
            before = before // width * after
        return total

    def nbytes(self, before: int, size: int) -> int:
        """Return how many bytes of matrices are kept, or of what the modes' maps keep."""
        return sum(
            8 * width * after if width * after <= _DENSE else fixed.nbytes(width, after)
            for _, fixed, width, after in self._each(before, size)
        )

    def _each(self, before: int, size: int) -> Iterator[tuple[str, Map, int, int]]:
        if self.before is not None and self.after is not None:
            for mode in self.mapped(len(self.after)):
                yield str(mode), self.mode(mode), self.before[mode], self.after[mode]

    def _matrix(self, index: int, before: int, after: int, double: bool) -> numpy.ndarray:
        """Return the matrix of a mode's map, (after, before)."""
        fixed = dataclasses.replace(self.mode(index))  # what it keeps is of no use afterwards
        matrix = numpy.empty((after, before), dtype=numpy.float64 if double else numpy.float32)
        for column in range(before):
            matrix[:, column] = fixed.apply(numpy.eye(1, before, column)[0], after)
        return matrix

    def _forward(self, x: Array, size: int, start: int, stop: int) -> Array:
        return self._moved(x, *self._sizes, adjoint=False)[start:stop]

    def _backward(self, y: Array, before: int) -> Array:
        return self._moved(y, *self._sizes[::-1], adjoint=True)

    @property
    def _sizes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if self.before is None or self.after is None:
            raise ValueError("before and after must be given for a map outside a plan: got neither")
        return self.before, self.after

    def _moved(
        self, x: Array, given: tuple[int, ...], made: tuple[int, ...], *, adjoint: bool
    ) -> Array:
        tensor = backend_of(x).reshape(padded(x, math.prod(given)), given)
        for mode in self.mapped(len(made)):
            tensor = self.map_mode(tensor, mode, mode, made[mode], adjoint=adjoint)
        return backend_of(x).reshape(tensor, (-1,))
