"""Merge operations: how a support tensor changes a layer's weight, bias and outputs, and adjoints.

The last stage of the equation. Each operation is linear in its support tensor S; its change is
always that of the base W₀ and b₀, so that several add up in any order.
"""

from __future__ import annotations

from collections.abc import Mapping

from superlora._backend import Array, backend_of
from superlora.design.supports import OF_BIAS, OPERATIONS, check_operation, support_shape

# Those that give a layer without bias one.
GIVES_BIAS = frozenset({"weight_to_bias", "add_bias"})


def change(operation: str, support: Array, weight: Array, bias: Array | None = None) -> Array:
    """Return what a support tensor adds to a layer's weight, or to its bias.

    Parameters
    ----------
    operation : str
        One of `superlora.OPERATIONS`.
    support : array
        S, of the shape that `superlora.support_shape` gives.
    weight : array, (output width, input width)
        W₀.
    bias : array, (output width,), optional
        b₀; zero if there is none.

    Returns
    -------
    array
        (output width, input width) for an operation of the weight, (output width,) for one of
        the bias.

    Raises
    ------
    TypeError
        If the arrays are of different libraries.
    ValueError
        If there is no such operation, or a shape does not fit.

    Notes
    -----
    GLoRA, equation 10, as its released code computes it ([1]_), with the matrix products of
    RepAdapter beside it::

        add_weight      S          right_weight    W₀ S        weight_to_bias  W₀ S
        scale_weight    W₀ ∘ S     left_weight     S W₀        scale_bias      b₀ ∘ S
                                                               add_bias        S

    References
    ----------
    .. [1] A. Chavan et al., "One-for-All: Generalized LoRA for Parameter-Efficient
       Fine-tuning", 2023.

    Examples
    --------
    >>> import numpy as np
    >>> change("scale_weight", np.full((2, 2), 0.5), np.eye(2))
    array([[0.5, 0. ],
           [0. , 0.5]])
    """
    _check(operation, support, weight, bias)
    library = backend_of(support, weight, *([] if bias is None else [bias]))
    found = changed(operation, support, weight, bias)
    return library.copy(found) if operation in ("add_weight", "add_bias") else found


def changed(operation: str, support: Array, weight: Array, bias: Array | None) -> Array:
    """Return the same of operands that are known to fit; maybe the support itself."""
    library = backend_of(support)
    if operation in ("scale_bias", "add_bias"):
        column = library.reshape(support, (-1,))
        if operation == "add_bias":
            return column
        return 0 * column if bias is None else bias * column
    if operation == "scale_weight":
        return weight * support
    if operation == "left_weight":
        return library.matmul(support, weight)
    if operation == "add_weight":
        return support
    found = library.matmul(weight, support)
    return library.reshape(found, (-1,)) if operation == "weight_to_bias" else found


def apply(
    operation: str, x: Array, support: Array, weight: Array, bias: Array | None = None
) -> Array:
    """Return what a support tensor adds to a layer's outputs.

    Parameters
    ----------
    operation : str
        One of `superlora.OPERATIONS`.
    x : array, (..., input width)
        The layer's inputs.
    support : array
        S, of the shape that `superlora.support_shape` gives.
    weight : array, (output width, input width)
        W₀.
    bias : array, (output width,), optional
        b₀; zero if there is none.

    Returns
    -------
    array
        ``x changeᵀ``, (..., output width), for an operation of the weight; the change itself,
        (output width,), which is the same for all inputs, for one of the bias.

    Raises
    ------
    TypeError
        If the arrays are of different libraries.
    ValueError
        If there is no such operation, or a shape does not fit.

    Notes
    -----
    The product of a matrix operation is not formed: ``x (W₀ S)ᵀ = (x Sᵀ) W₀ᵀ`` and
    ``x (S W₀)ᵀ = (x W₀ᵀ) Sᵀ``.

    Examples
    --------
    >>> import numpy as np
    >>> weight, support = np.array([[1.0, 2.0]]), np.array([[3.0]])
    >>> apply("left_weight", np.array([[1.0, 1.0]]), support, weight)
    array([[9.]])
    """
    _check(operation, support, weight, bias)
    library = backend_of(x, support, weight, *([] if bias is None else [bias]))
    if x.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"x must have {weight.shape[1]} entries in its last axis, the input width: got shape "
            f"{tuple(x.shape)}"
        )
    if operation in OF_BIAS:
        return change(operation, support, weight, bias)
    chains = {"right_weight": (support, weight), "left_weight": (weight, support)}
    found = x
    for matrix in chains.get(operation) or (change(operation, support, weight),):
        found = library.tensordot(found, matrix, axes=([len(x.shape) - 1], [1]))
    return found


def adjoint(operation: str, gradient: Array, weight: Array, bias: Array | None = None) -> Array:
    """Return the gradient of a support tensor from that of the weight, or of the bias.

    Parameters
    ----------
    operation : str
        One of `superlora.OPERATIONS`.
    gradient : array
        What `change` of this operation returns, in shape.
    weight : array, (output width, input width)
        W₀.
    bias : array, (output width,), optional
        b₀; zero if there is none.

    Returns
    -------
    array
        Of the shape that `superlora.support_shape` gives.

    Raises
    ------
    TypeError
        If the arrays are of different libraries.
    ValueError
        If there is no such operation, or a shape does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> adjoint("weight_to_bias", np.array([1.0, 2.0]), np.eye(2))
    array([[1.],
           [2.]])
    """
    check_operation(operation)
    rows, columns = _matrix(weight)
    expected = (rows,) if operation in OF_BIAS else (rows, columns)
    if tuple(gradient.shape) != expected:
        raise ValueError(f"gradient must have shape {expected}: got {tuple(gradient.shape)}")
    _check_bias(bias, rows)
    library = backend_of(gradient, weight, *([] if bias is None else [bias]))
    if operation == "scale_weight":
        return weight * gradient
    if operation == "right_weight":
        return library.matmul(library.transpose(weight), gradient)
    if operation == "left_weight":
        return library.matmul(gradient, library.transpose(weight))
    if operation == "add_weight":
        return library.copy(gradient)
    column = library.reshape(gradient, (-1, 1))
    if operation == "weight_to_bias":
        return library.matmul(library.transpose(weight), column)
    if operation == "add_bias":
        return library.copy(column)
    return 0 * column if bias is None else library.reshape(bias, (-1, 1)) * column


def merge(
    weight: Array, bias: Array | None, supports: Mapping[str, Array]
) -> tuple[Array, Array | None]:
    """Merge support tensors into a layer's weight and bias.

    Parameters
    ----------
    weight : array, (output width, input width)
        W₀.
    bias : array, (output width,), or None
        b₀.
    supports : mapping of str to array
        Support tensors by operation, any subset of `superlora.OPERATIONS`.

    Returns
    -------
    array, (output width, input width)
        ``W₀ + W₀ ∘ S_scale + S_add + W₀ S_right + S_left W₀``.
    array, (output width,), or None
        ``b₀ + b₀ ∘ S_scale + S_add + W₀ S_to_bias``; None where neither `bias` nor an operation
        gives one.

    Raises
    ------
    TypeError
        If the arrays are of different libraries.
    ValueError
        If there is no such operation, or a shape does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> merge(np.eye(2), None, {"add_bias": np.ones((2, 1))})
    (array([[1., 0.],
           [0., 1.]]), array([1., 1.]))
    """
    of_weight, of_bias = changes(weight, bias, supports)
    copy = backend_of(weight).copy
    merged = copy(weight) if of_weight is None else weight + of_weight
    if of_bias is None:
        return merged, None if bias is None else copy(bias)
    return merged, of_bias if bias is None else bias + of_bias


def changes(
    weight: Array, bias: Array | None, supports: Mapping[str, Array]
) -> tuple[Array | None, Array | None]:
    """Return what support tensors add to a layer's weight and bias together.

    Parameters
    ----------
    weight : array, (output width, input width)
        W₀.
    bias : array, (output width,), or None
        b₀.
    supports : mapping of str to array
        Support tensors by operation.

    Returns
    -------
    array, (output width, input width), or None
        None where no operation changes the weight.
    array, (output width,), or None
        None where no operation changes the bias.

    Raises
    ------
    TypeError
        If the arrays are of different libraries.
    ValueError
        If there is no such operation, or a shape does not fit.
    """
    for operation, support in supports.items():
        _check(operation, support, weight, bias)
    backend_of(weight, *supports.values(), *([] if bias is None else [bias]))
    total: dict[bool, Array] = {}
    for operation in OPERATIONS:  # one order of the sum, whatever that of the mapping
        if operation not in supports or (operation == "scale_bias" and bias is None):
            continue
        found = changed(operation, supports[operation], weight, bias)
        kind = operation in OF_BIAS
        total[kind] = total[kind] + found if kind in total else found
    return total.get(False), total.get(True)


def _check(operation: str, support: Array, weight: Array, bias: Array | None) -> None:
    rows, columns = _matrix(weight)
    expected = support_shape(operation, (rows, columns))
    if tuple(support.shape) != expected:
        raise ValueError(
            f"the support of {operation!r} must have shape {expected} for a weight of shape "
            f"{(rows, columns)}: got {tuple(support.shape)}"
        )
    _check_bias(bias, rows)


def _check_bias(bias: Array | None, rows: int) -> None:
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(f"bias must have shape {(rows,)}: got {tuple(bias.shape)}")


def _matrix(weight: Array) -> tuple[int, int]:
    shape = tuple(weight.shape)
    if len(shape) != 2:
        raise ValueError(f"weight must have two axes, (output, input): got shape {shape}")
    return shape
