"""The Kronecker product of tensors, mode by mode."""

from __future__ import annotations

import math
from collections.abc import Sequence

from superlora._backend import Array, backend_of
from superlora.algebra.contract import run
from superlora.design.contraction import contract


def kronecker(tensors: Sequence[Array]) -> Array:
    """Kronecker product of tensors of one order.

    Parameters
    ----------
    tensors : sequence of K arrays (d_k1, …, d_kM)
        Left to right, as in ``X_1 ⊗ X_2 ⊗ … ⊗ X_K``. Tensors of fewer modes are
        not padded: numpy and torch do that in front, the peers at the end.

    Returns
    -------
    array, (prod_k d_k1, …, prod_k d_kM)
        ``prod_k X_k[i_k1, …, i_kM]`` where mode m's index has the digits
        ``i_1m … i_Km``, split 1 most significant.

    Raises
    ------
    TypeError
        If `tensors` is no list, or the arrays are of different libraries.
    ValueError
        If there is none, or their orders differ.

    Examples
    --------
    >>> import numpy as np
    >>> kronecker([np.array([[1.0, 2.0]]), np.array([[1.0], [10.0]])])
    array([[ 1.,  2.],
           [10., 20.]])
    """
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"tensors must be a list of arrays: got {type(tensors).__name__}")
    if not tensors:
        raise ValueError("tensors must hold at least one tensor: got none")
    library = backend_of(*tensors)
    order = len(tensors[0].shape)
    for index, tensor in enumerate(tensors):
        if len(tensor.shape) != order:
            raise ValueError(
                f"tensors[{index}] must have {order} modes like tensors[0]: got shape "
                f"{tuple(tensor.shape)}"
            )
    count = len(tensors)
    if count == 1:
        return library.copy(tensors[0])
    # The digit of tensor k in mode m has the label m K + k; those of size 1 are left out, of which
    # there can be more than an array has axes.
    sizes = {
        mode * count + index: size
        for index, tensor in enumerate(tensors)
        for mode, size in enumerate(tensor.shape)
        if size > 1
    }
    operands = [tuple(m for m in sorted(sizes) if m % count == index) for index in range(count)]
    arrays = [
        library.reshape(tensor, tuple(sizes[label] for label in labels))
        for tensor, labels in zip(tensors, operands, strict=True)
    ]
    product = run(contract(operands, tuple(sorted(sizes)), sizes), arrays)
    shapes = zip(*(tensor.shape for tensor in tensors), strict=True)
    return library.reshape(product, tuple(map(math.prod, shapes)))
