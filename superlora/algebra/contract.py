"""Contract arrays of any library along a path that was found on integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from superlora._backend import Array, backend_of
from superlora.design.contraction import Arranged, Contraction, Pair


def run(contraction: Contraction, operands: Sequence[Array], library: Any = None) -> Array:
    """Contract a network."""
    library = library or backend_of(operands[0])
    values = list(operands)
    for step in contraction.steps:
        values.append(contract_pair(library, step.pair, values[step.left], values[step.right]))
    axes = contraction.axes
    return values[-1] if axes is None else library.transpose(values[-1], axes)


def contract_pair(library: Any, pair: Pair, left: Array, right: Array) -> Array:
    """Contract two arrays."""
    one, other = matrices(library, pair, left, right)
    if pair.summed is None:
        found = library.matmul(one, other)
        if pair.shape is not None:
            found = library.reshape(found, pair.shape)
    else:
        found = one * other
        if pair.summed:
            found = library.sum(found, axis=pair.summed)
    return found if pair.axes is None else library.transpose(found, pair.axes)


def matrices(library: Any, pair: Pair, left: Array, right: Array) -> tuple[Array, Array]:
    """Return the two stacks of matrices whose product, by entry or by matrix, is summed."""
    one = left if pair.left is None else _arranged(library, left, pair.left)
    other = right if pair.right is None else _arranged(library, right, pair.right)
    return (other, one) if pair.turned else (one, other)


def _arranged(library: Any, array: Array, how: Arranged) -> Array:
    if how.axes is not None:
        array = library.transpose(array, how.axes)
    if how.shape is not None:
        array = library.reshape(array, how.shape)
    return array if how.swapped is None else library.transpose(array, how.swapped)
