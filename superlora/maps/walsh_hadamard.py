"""The fast Walsh–Hadamard transform, and its products with padding and cropping."""

from __future__ import annotations

import math
import warnings
from functools import cache, partial
from typing import Any

import numpy
from scipy.linalg import hadamard

from superlora._backend import Array, backend_of, cast, check_floating, move_axis, widened, zeros

_kept = cache(hadamard)
# Why the compiled kernels are not used, once they could not be.
_failures: list[Exception] = []


def next_power_of_two(n: int) -> int:
    """Return the least power of two that is not less than `n`, of at least 1."""
    return 1 << (n - 1).bit_length()


def fwht(x: Array, axis: int = -1, *, orthonormal: bool = False) -> Array:
    """Multiply by the Hadamard matrix along an axis, in ``n log n`` operations.

    Parameters
    ----------
    x : array, (..., n, ...)
        Of a floating-point dtype; n a power of two.
    axis : int, default: -1
        The axis of length n.
    orthonormal : bool, default: False
        Divide by ``sqrt(n)``, so that the transform is its own inverse.

    Returns
    -------
    array, (..., n, ...)
        ``H_n x``, a new array of the library, dtype and device of `x`, with
        ``H_1 = [1]`` and ``H_2n = [[H_n, H_n], [H_n, -H_n]]``: the natural order of
        Sylvester. Types of less than single precision are computed in single.

    Raises
    ------
    TypeError
        If `x` is of no known library or not of a floating-point dtype, or `axis` is
        not an integer.
    ValueError
        If `x` has no axis, or `axis` is out of range, or n is no power of two.

    Warns
    -----
    RuntimeWarning
        Once, if numba is installed but does not work here.

    Notes
    -----
    With numba installed, rows of 256 entries or more of numpy arrays and of torch tensors on
    the CPU are transformed by kernels that are compiled at the first call and kept in numba's
    cache. From 16 MiB on several threads share the work: as many as torch is set to, or for
    numpy arrays as there are processors, at most ``NUMBA_NUM_THREADS``. All other arrays, and
    all that a compiler or `torch.func` traces, are multiplied by blocks of the matrix.

    In torch and jax the transform can be differentiated any number of times, in either mode.
    Plain backward passes of torch need nothing of the forward pass, which keeps nothing.

    Examples
    --------
    >>> import numpy as np
    >>> fwht(np.array([1.0, 2.0, 3.0, 4.0]))
    array([10., -2., -4.,  0.])
    >>> fwht(np.eye(2), axis=0)
    array([[ 1.,  1.],
           [ 1., -1.]])
    """
    _check_array("x", x)
    rank = len(x.shape)
    if not hasattr(axis, "__index__"):
        raise TypeError(f"axis must be an integer: got {axis!r}")
    if not -rank <= axis < rank:
        raise ValueError(f"axis must lie in {-rank} … {rank - 1}: got {axis}")
    n, at = int(x.shape[axis]), axis % rank
    if n < 1 or n & (n - 1):
        raise ValueError(
            f"x must have a power of two of entries along axis {axis}: got {n}; the next is "
            f"{next_power_of_two(max(1, n))}"
        )
    y = _transform(move_axis(x, at, rank - 1), n**-0.5 if orthonormal else 1.0)
    return move_axis(y, rank - 1, at)


def transform_padded(x: Array, n: int, scale: float = 1.0) -> Array:
    """Transform vectors as if zeros followed them, without writing the zeros."""
    _check_array("x", x)
    library, p = backend_of(x), int(x.shape[-1])
    d = next_power_of_two(p)
    if d > p:
        x = library.concatenate([x, zeros((*x.shape[:-1], d - p), x)], axis=-1)
    y = _transform(x, scale)
    # A product, for want of a `tile` that all libraries have.
    copies = y[..., None, :] * (zeros((n // d, 1), y) + 1.0) if d < n else y
    return library.reshape(copies, (*y.shape[:-1], n))


def transform_cropped(y: Array, p: int, scale: float = 1.0) -> Array:
    """Return the first entries of a transform: the adjoint of `transform_padded`."""
    _check_array("y", y)
    library, n = backend_of(y), int(y.shape[-1])
    d, wide = next_power_of_two(p), widened(y)
    if d < n:
        wide = library.sum(library.reshape(wide, (*y.shape[:-1], n // d, d)), axis=-2)
    return cast(_transform(wide, scale)[..., :p], like=y)


def _check_array(name: str, x: Array) -> None:
    if type(x).__module__.partition(".")[0] == "torch":
        # A compiler that meets this line first runs it, where it could not trace TensorLy's
        # own import.
        from superlora.maps import _torch_transform  # noqa: F401
    check_floating(name, x)
    if len(x.shape) == 0:
        raise ValueError(f"{name} must have at least one axis: got shape ()")


def _transform(x: Array, scale: float) -> Array:
    """Return ``scale H x`` along the last axis."""
    wide, name = widened(x), backend_of(x).backend_name
    products, compiled = partial(_multiply, scale), partial(_run_compiled, scale)
    if name == "pytorch":
        from superlora.maps import _torch_transform

        return cast(_torch_transform.transform(wide, products, compiled), like=x)
    wide = numpy.asarray(wide) if name == "numpy" else wide
    y = compiled(wide) if name == "numpy" else None
    if y is None:
        # The kernels do not warn of what an infinity becomes, nor do the other libraries.
        with numpy.errstate(invalid="ignore", over="ignore"):
            y = products(wide, lambda size: _kept(size, wide.dtype))
    return cast(y, like=x)


def _multiply(scale: float, x: Array, block: Any) -> Array:
    """Transform by products with blocks of the matrix, of nearly equal sizes."""
    library, shape = backend_of(x), x.shape
    # Their ones are exact in any precision, but what they multiply is not.
    exact = {"precision": "highest"} if library.backend_name == "jax" else {}
    bits, done = int(shape[-1]).bit_length() - 1, 1
    count = -(-bits // 6)
    x = x if scale == 1.0 and bits else x * scale  # a new array, where nothing is multiplied below
    for part in range(count):
        size = 1 << (bits * (part + 1) // count - bits * part // count)
        lines = math.prod(shape) // (size * done)
        if done == 1:
            x = library.matmul(library.reshape(x, (lines, size)), block(size), **exact)
        else:
            x = library.matmul(block(size), library.reshape(x, (lines, size, done)), **exact)
        done *= size
    return library.reshape(x, shape)


def _run_compiled(scale: float, x: numpy.ndarray, threads: int | None = None) -> Any:
    """Return the transform by the compiled kernels, or None where they cannot do it."""
    # Shorter rows are products with at most two small blocks.
    if _failures or not x.size or x.shape[-1] < 256 or x.dtype not in ("float32", "float64"):
        return None
    y = numpy.empty(x.shape, x.dtype)
    try:
        from superlora.maps import _native_transform

        _native_transform.transform(numpy.require(x, None, ["C", "A", "E"]), y, scale, threads)
        return y
    except Exception as error:
        _failures.append(error)
        if not isinstance(error, ModuleNotFoundError):
            message = f"fwht must do without its compiled kernels: got {error!r}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        return None
