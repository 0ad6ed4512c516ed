"""Contract arrays of any library along a path that was found on integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from superlora._backend import Array, backend_of
from superlora.design.contraction import Arranged, Contraction, Pair, Step


def run(contraction: Contraction, operands: Sequence[Array]) -> Array:
    """Contract a network.

    Parameters
    ----------
    contraction : Contraction
        The path.
    operands : sequence of array
        Of one library, with the labels and sizes of the path's operands.

    Returns
    -------
    array
        The result, with the labels of the path's output.

    Examples
    --------
    >>> import numpy as np
    >>> from superlora.design.contraction import contract
    >>> path = contract([(0, 1), (1, 2)], (0, 2), {0: 2, 1: 3, 2: 2})
    >>> run(path, [np.ones((2, 3)), np.ones((3, 2))])
    array([[3., 3.],
           [3., 3.]])
    """
    library = backend_of(operands[0])
    values: list[Any] = list(operands)
    for step, done in zip(contraction.steps, contraction.last_uses, strict=True):
        value = take_step(library, step, values)
        for index in done:
            values[index] = None
        values.append(value)
    return transposed(library, values[-1], contraction.axes)


def take_step(library: Any, step: Step, values: Sequence[Array]) -> Array:
    """Return what one step of a path makes of the values so far."""
    if step.pair is None:
        return library.sum(values[step.left], axis=step.summed)
    return contract_pair(library, step.pair, values[step.left], values[step.right])


def contract_pair(library: Any, pair: Pair, left: Array, right: Array) -> Array:
    """Contract two arrays."""
    one = _arranged(library, left, pair.left)
    other = _arranged(library, right, pair.right)
    if pair.summed is not None:
        found = one * other
        if pair.summed:
            found = library.sum(found, axis=pair.summed)
    else:
        found = library.matmul(other, one) if pair.turned else library.matmul(one, other)
        if pair.shape is not None:
            found = library.reshape(found, pair.shape)
    return transposed(library, found, pair.axes)


def matrices(library: Any, pair: Pair, left: Array, right: Array) -> tuple[Array, Array]:
    """Return the two matrices whose product a contraction is."""
    one = _arranged(library, left, pair.left)
    other = _arranged(library, right, pair.right)
    return (other, one) if pair.turned else (one, other)


def transposed(library: Any, array: Array, axes: tuple[int, ...] | None) -> Array:
    """Return an array with its axes in another order, itself for None."""
    return array if axes is None else library.transpose(array, axes)


def _arranged(library: Any, array: Array, how: Arranged) -> Array:
    if how.axes is not None:
        array = library.transpose(array, how.axes)
    if how.shape is not None:
        array = library.reshape(array, how.shape)
    if how.swapped:
        array = library.transpose(array, (1, 0) if len(array.shape) == 2 else (0, 2, 1))
    return array
