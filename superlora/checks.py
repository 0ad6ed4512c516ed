"""What a user may pass as a value: counts, and lists made hashable."""

from __future__ import annotations

import numbers
from typing import Any


def hashable(value: Any) -> Any:
    """Return lists as tuples, at any depth, and numbers as Python's own.

    Parameters
    ----------
    value : Any
        A field of a spec or a map.

    Returns
    -------
    Any
        A hashable value, where the items are.
    """
    if isinstance(value, (list, tuple)):
        return tuple(map(hashable, value))
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def check_count(name: str, value: object, least: int = 1) -> int:
    """Return `value` if it is an integer of at least `least`, or say what it must be.

    Parameters
    ----------
    name : str
        What the error message calls the value.
    value : object
        The value to check; ``bool`` is not an integer here.
    least : int
        The smallest value allowed.

    Returns
    -------
    int
        `value`, unchanged.

    Raises
    ------
    TypeError
        If `value` is not an integer.
    ValueError
        If `value` is below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer: got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}: got {value}")
    return value
