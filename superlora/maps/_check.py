"""The test of a map: that it is linear, and its adjoint its own."""

from __future__ import annotations

import dataclasses

import numpy

from superlora._backend import Array, backend_of, from_numpy, widened
from superlora.maps._base import Map

# Relative errors that rounding leaves, by the last digits of a dtype's name.
_TOLERANCES = {"64": 1e-9, "32": 1e-4}
_HALF = 5e-2
_SLICE = 1 << 12  # entries of the slice at most


def check(fixed: Map, before: int, size: int, *, like: Array | None = None) -> None:
    """Refuse a map that is not linear, or whose adjoint or slices are not its own.

    Parameters
    ----------
    fixed : Map
        The map, with all that a plan would bind.
    before, size : int
        Entries of the fold and of the group.
    like : array or dtype, optional
        Of the library, dtype and device of the random vectors; numpy's double precision by
        default.

    Raises
    ------
    TypeError
        If a result is of another library.
    ValueError
        If a result has another shape or dtype than it must, or one of ``F(-2 x) = -2 F x``,
        ``⟨F x, y⟩ = ⟨x, Fᵀ y⟩`` and ``apply_slice`` as ``apply`` is not so.

    Notes
    -----
    It takes two calls of `apply`, one of `adjoint` and, where the class has its own, one of
    `apply_slice` for at most 4096 entries.

    Examples
    --------
    >>> from superlora.maps import OneHot
    >>> check(OneHot(), 3, 8)
    """
    fixed.check(before, size)
    draw = numpy.random.default_rng(0).standard_normal
    x, y = (from_numpy(draw(n), numpy.empty(0) if like is None else like) for n in (before, size))
    tolerance = _TOLERANCES.get(str(x.dtype)[-2:], _HALF)
    name = f"{type(fixed).__name__} from {before} to {size} entries"
    forward = _numbers(fixed.apply(x, size), x, size, f"{name}: F x")
    twice = _numbers(fixed.apply(x * -2, size), x, size, f"{name}: F(-2 x)")
    backward = _numbers(fixed.adjoint(y, before), y, before, f"{name}: Fᵀ y")
    given, taken = _numbers(x, x, before, "x"), _numbers(y, y, size, "y")
    bound = tolerance * _norm(forward)
    place = int(abs(twice + 2 * forward).argmax())
    _same(f"{name}: F(-2 x)[{place}] must be -2 F x", -2 * forward[place], twice[place], bound)
    both = tolerance * (_norm(forward) * _norm(taken) + _norm(given) * _norm(backward))
    _same(f"{name}: ⟨x, Fᵀ y⟩ must be ⟨F x, y⟩", forward @ taken, given @ backward, both)
    if type(fixed).apply_slice is not Map.apply_slice:
        start, stop = size // 3, size // 3 + min(size - size // 3, _SLICE)
        rule = f"{name}: F x from {start} to {stop}"
        part = _numbers(fixed.apply_slice(x, size, start, stop), x, stop - start, rule)
        place = int(abs(part - forward[start:stop]).argmax())
        rule = f"{name}: apply_slice from {start} to {stop} must be what apply has at "
        _same(f"{rule}{start + place}", forward[start + place], part[place], bound)


def is_own(fixed: Map) -> bool:
    """Return whether a map, or one that it is made of, is of a class that is not the library's."""
    values = [getattr(fixed, item.name) for item in dataclasses.fields(fixed)]
    parts = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
    own = not type(fixed).__module__.startswith("superlora.maps.")
    return own or any(is_own(part) for part in parts if isinstance(part, Map))


def _numbers(found: Array, like: Array, size: int, what: str) -> numpy.ndarray:
    """Return a result in numpy's double precision, or refuse another kind than it must have."""
    library = backend_of(found, like)
    if tuple(found.shape) != (size,) or found.dtype != like.dtype:
        raise ValueError(
            f"{what} must have the shape ({size},) and dtype {like.dtype}: got "
            f"{tuple(found.shape)} and {found.dtype}"
        )
    values: numpy.ndarray = library.to_numpy(widened(found)).astype(numpy.float64)
    return values


def _norm(values: numpy.ndarray) -> float:
    return float(numpy.linalg.norm(values))


def _same(rule: str, expected: float, got: float, bound: float) -> None:
    if not abs(expected - got) <= bound:  # which no number is, either
        raise ValueError(f"{rule}: expected {expected:.9g}, got {got:.9g}")
