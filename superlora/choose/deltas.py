"""Given updates: their axes, and their numbers in double precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy

from superlora._backend import Array, check_floating
from superlora.algebra.fit import as_numpy
from superlora.design.axes import Axes
from superlora.design.grouping import check_shapes


def axes_of(
    deltas: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...] | Axes] | None = None
) -> dict[str, Axes]:
    """Return the axes of given updates: those of their shapes, where none are said."""
    if not isinstance(deltas, Mapping):
        raise TypeError(f"deltas must map names to arrays: got {type(deltas).__name__}")
    for name, delta in deltas.items():
        check_floating(f"deltas[{name!r}]", delta)
    own = {name: tuple(delta.shape) for name, delta in deltas.items()}
    axes = check_shapes(own if shapes is None else shapes)
    for name in {**own, **axes}:
        expected = axes[name].shape if name in axes else None
        if own.get(name) != expected:
            raise ValueError(
                f"shapes must be those of deltas: {name!r} has {expected} and {own.get(name)}"
            )
    return {name: axes[name] for name in own}


def singular_values(delta: Array, axes: Axes) -> numpy.ndarray[Any, Any]:
    """Return a weight's singular values, descending: (matrices of its stack, least width)."""
    matrices = as_numpy(delta).reshape(axes.matrices, axes.out, axes.matrix[1])
    found: numpy.ndarray[Any, Any] = numpy.linalg.svd(matrices, compute_uv=False)
    return found
