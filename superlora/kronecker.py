"""The products of splits: Kronecker, mode by mode, and Hadamard."""

from __future__ import annotations

from collections.abc import Sequence

from superlora._backend import Array, backend_of


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
    product = tensors[0]
    for tensor in tensors[1:]:
        left, right, shape = [], [], []
        for rows, columns in zip(product.shape, tensor.shape, strict=True):
            left += [rows, 1]
            right += [1, columns]
            shape.append(rows * columns)
        product = library.reshape(product, tuple(left)) * library.reshape(tensor, tuple(right))
        product = library.reshape(product, tuple(shape))
    return product


def hadamard(tensors: Sequence[Array]) -> Array:
    """Multiply tensors of one shape, entry by entry.

    Parameters
    ----------
    tensors : sequence of arrays
        At least one.

    Returns
    -------
    array
        Of the same shape: ``X_1 ∘ X_2 ∘ … ∘ X_K``, as in LoHa (Hyeon-Woo et al. 2022,
        FedPara).
    """
    product = tensors[0]
    for tensor in tensors[1:]:
        product = product * tensor
    return product


def khatri_rao_columns(tensors: Sequence[Array]) -> Array:
    """Multiply every combination of the last indices of tensors of equal leading modes.

    Parameters
    ----------
    tensors : sequence of arrays (d_1, …, d_M, r_k)
        At least one.

    Returns
    -------
    array, (d_1, …, d_M, prod_k r_k)
        ``prod_k X_k[i, j_k]`` at ``[i, (j_1 … j_K)]``, the last index fastest: the face-splitting
        product, which turns a Hadamard product of low-rank matrices into one of their factors.
    """
    product = tensors[0]
    for tensor in tensors[1:]:
        both = product[..., :, None] * tensor[..., None, :]
        shape = (*both.shape[:-2], both.shape[-2] * both.shape[-1])
        product = backend_of(both).reshape(both, shape)
    return product
