"""The fast Walsh–Hadamard transform, and its products with padding and cropping."""

from __future__ import annotations

import importlib
import importlib.util
import math
import operator
import warnings
from collections.abc import Callable
from typing import Any

import numpy

from superlora._backend import Array, backend_of, convert, from_numpy, move_axis, zeros

# Blocks of so many bits are multiplied by as matrices where no compiled kernel is at hand.
_BITS = 6
# Bytes of a row that no kernel takes, whatever the processor.
_LEAST_BLOCK = 256
_SINGLE_OR_MORE = ("32", "64", "96", "128")

_blocks: dict[tuple[int, Any], numpy.ndarray] = {}
# What was found of the compiled kernels; absent until they are asked for.
_found: dict[str, Any] = {}


def next_power_of_two(n: int) -> int:
    """Return the least power of two that is not less than `n`.

    Parameters
    ----------
    n : int
        At least 1.

    Returns
    -------
    int
        ``n`` itself if it is one.

    Raises
    ------
    ValueError
        If `n` is less than 1.

    Examples
    --------
    >>> [next_power_of_two(n) for n in (1, 2, 3, 1025)]
    [1, 2, 4, 2048]
    """
    if n < 1:
        raise ValueError(f"n must be at least 1: got {n}")
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
    With numba installed, numpy arrays and torch tensors on the CPU are transformed by
    kernels that are compiled at the first call and kept in numba's cache. From 16 MiB on
    several threads share the work: as many as torch is set to, or for numpy arrays as there
    are processors, at most ``NUMBA_NUM_THREADS``. All other arrays, and all that a compiler
    traces, are multiplied by blocks of the matrix.

    In torch and jax the transform can be differentiated any number of times, in
    either mode; outside of compilers torch keeps nothing for the backward pass.

    Examples
    --------
    >>> import numpy as np
    >>> fwht(np.array([1.0, 2.0, 3.0, 4.0]))
    array([10., -2., -4.,  0.])
    >>> fwht(np.eye(2), axis=0)
    array([[ 1.,  1.],
           [ 1., -1.]])
    """
    library = _library_of(x)
    name = _float_name("x", x)
    rank = len(x.shape)
    if rank == 0:
        raise ValueError("x must have at least one axis: got shape ()")
    at = _index("axis", axis)
    if not -rank <= at < rank:
        raise ValueError(f"axis must lie in {-rank} … {rank - 1}: got {at}")
    n = operator.index(x.shape[at])
    _check_power(f"x must have a power of two of entries along axis {at}", n)
    scale = 1 / math.sqrt(n) if orthonormal else 1.0
    at %= rank
    if at == rank - 1:
        return _transform(library, x, scale, name)
    moved = _transform(library, move_axis(x, at, rank - 1), scale, name)
    return move_axis(moved, rank - 1, at)


def transform_padded(x: Array, n: int, scale: float = 1.0) -> Array:
    """Transform vectors as if zeros followed them, without writing the zeros.

    Parameters
    ----------
    x : array, (..., p)
        Of a floating-point dtype, 1 <= p <= n.
    n : int
        A power of two.
    scale : float, default: 1.0
        Multiplies the result.

    Returns
    -------
    array, (..., n)
        ``scale H_n [x, 0]``.

    Raises
    ------
    TypeError
        If `x` is not of a floating-point dtype.
    ValueError
        If n is no power of two, or p is not in 1 … n.

    Notes
    -----
    With d the power of two that follows p, the result is the transform of length d,
    n/d times over: ``d log d`` operations.

    Examples
    --------
    >>> import numpy as np
    >>> transform_padded(np.array([1.0, 2.0]), 4)
    array([ 3., -1.,  3., -1.])
    """
    library = _library_of(x)
    name = _float_name("x", x)
    p = _last_length("x", x)
    d = _check_lengths("x", p, n)
    if d > p:
        x = library.concatenate([x, zeros((*x.shape[:-1], d - p), x)], axis=-1)
    y = _transform(library, x, scale, name)
    if d == n:
        return y
    # A product, for want of a `tile` that all libraries have.
    copies = y[..., None, :] * (zeros((n // d, 1), y) + 1.0)
    return library.reshape(copies, (*y.shape[:-1], n))


def transform_cropped(y: Array, p: int, scale: float = 1.0) -> Array:
    """Return the first entries of a transform: the adjoint of `transform_padded`.

    Parameters
    ----------
    y : array, (..., n)
        Of a floating-point dtype; n a power of two.
    p : int
        Entries to keep, 1 <= p <= n.
    scale : float, default: 1.0
        Multiplies the result.

    Returns
    -------
    array, (..., p)
        ``scale (H_n y)[..., :p]``.

    Raises
    ------
    TypeError
        If `y` is not of a floating-point dtype.
    ValueError
        If n is no power of two, or p is not in 1 … n.

    Examples
    --------
    >>> import numpy as np
    >>> transform_cropped(np.array([1.0, 2.0, 3.0, 4.0]), 2)
    array([10., -2.])
    """
    library = _library_of(y)
    name = _float_name("y", y)
    n = _last_length("y", y)
    d = _check_lengths("p", p, n)
    dtype, short = y.dtype, not name.endswith(_SINGLE_OR_MORE)
    if short:
        y, name = convert(y, library.float32), "float32"
    if d < n:
        y = library.sum(library.reshape(y, (*y.shape[:-1], n // d, d)), axis=-2)
    x = _transform(library, y, scale, name)
    if p < d:
        x = x[..., :p]
    return convert(x, dtype) if short else x


def _library_of(x: Array) -> Any:
    if type(x).__module__.partition(".")[0] == "torch":
        # A compiler that meets this line first runs it, where it could not trace TensorLy's
        # own import.
        from superlora import _torch_transform  # noqa: F401
    return backend_of(x)


def _index(argument: str, value: object) -> int:
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{argument} must be an integer: got {value!r}") from None


def _float_name(argument: str, x: Array) -> str:
    name = str(getattr(x.dtype, "name", x.dtype)).rpartition(".")[2]
    if "float" not in name:
        raise TypeError(f"{argument} must have a floating-point dtype: got {name}")
    return name


def _last_length(argument: str, x: Array) -> int:
    if len(x.shape) == 0:
        raise ValueError(f"{argument} must have at least one axis: got shape ()")
    return operator.index(x.shape[-1])


def _check_power(rule: str, n: int) -> None:
    if n < 1 or n & (n - 1):
        raise ValueError(f"{rule}: got {n}; the next is {next_power_of_two(max(1, n))}")


def _check_lengths(argument: str, p: int, n: int) -> int:
    """Return the length to transform for p of n entries."""
    _check_power("n must be a power of two", n)
    if not 1 <= p <= n:
        rule = "have" if argument == "x" else "be"
        raise ValueError(f"{argument} must {rule} 1 … {n} entries: got {p}")
    return next_power_of_two(p)


def _transform(library: Any, x: Array, scale: float, name: str) -> Array:
    """Return ``scale H x`` along the last axis; `name` is that of the dtype of `x`."""
    dtype, short = x.dtype, not name.endswith(_SINGLE_OR_MORE)
    if short:
        x = convert(x, library.float32)
    if library.backend_name == "pytorch":
        from superlora import _torch_transform

        y: Array = _torch_transform.transform(x, scale, _multiply, _run_native)
    elif library.backend_name == "numpy":
        y = _transform_numpy(x, scale)
    else:
        y = _multiply(x, scale, lambda size: _block(size, x))
    return convert(y, dtype) if short else y


def _multiply(x: Array, scale: float, block: Callable[[int], Array]) -> Array:
    """Transform by products with blocks of the matrix, of nearly equal sizes."""
    library = backend_of(x)
    # Their ones are exact in any precision, but what they multiply is not.
    exact = {"precision": "highest"} if library.backend_name == "jax" else {}
    shape = tuple(operator.index(size) for size in x.shape)
    n = shape[-1]
    rows = math.prod(shape[:-1])
    bits = n.bit_length() - 1
    count = 1 if bits == _BITS + 1 else -(-bits // _BITS)
    done = 1
    for part in range(count):
        size = 1 << (bits * (part + 1) // count - bits * part // count)
        if done == 1:
            x = library.reshape(x, (rows * (n // size), size))
            x = library.matmul(x, block(size), **exact)
        else:
            x = library.reshape(x, (rows * (n // (size * done)), size, done))
            x = library.matmul(block(size), x, **exact)
        done *= size
    x = library.reshape(x, shape)
    # One entry is not multiplied above, and the result must be new.
    return x if scale == 1.0 and count else x * scale


def _block(size: int, like: Array) -> Array:
    name = backend_of(like).backend_name
    dtype = like.dtype if name in ("numpy", "jax") else numpy.float64
    key = size, dtype
    values = _blocks.get(key)
    if values is None:
        values = numpy.ones((1, 1), dtype)
        while len(values) < size:
            values = numpy.block([[values, values], [values, -values]])
        _blocks[key] = values
    # jax takes numpy's, and knows where to put them.
    return values if name in ("numpy", "jax") else from_numpy(values, like)


def _transform_numpy(x: numpy.ndarray, scale: float) -> numpy.ndarray:
    x = numpy.asarray(x)
    if x.dtype in (numpy.float32, numpy.float64):
        whole = x.flags.c_contiguous and x.flags.aligned
        values = x if whole else numpy.require(x, requirements=("C", "A"))
        target = numpy.empty(values.shape, values.dtype)
        source, place = _address(values), _address(target)
        if _run_native(source, place, x.size, x.shape[-1], x.dtype.name, None, scale):
            return target
    # The kernels do not warn of what an infinity becomes, nor do the other libraries.
    with numpy.errstate(invalid="ignore", over="ignore"):
        result: numpy.ndarray = _multiply(x, scale, lambda size: _block(size, x))
    return result


def _address(x: numpy.ndarray) -> int:
    # Half the time of x.ctypes.data.
    return int(x.__array_interface__["data"][0])


def _run_native(
    source: int, target: int, count: int, n: int, name: str, threads: int | None, scale: float
) -> bool:
    """Write the transform of `count` entries, in rows of `n`, if the kernels can do it."""
    number, size = (numpy.float32, 4) if name == "float32" else (numpy.float64, 8)
    if n * size < _LEAST_BLOCK or not count:
        return False
    native = _found["kernels"] if "kernels" in _found else _find_native()
    if native is None or n * size < native.BLOCK:
        return False
    try:
        native.transform(source, target, count // n, n, number, scale, threads)
    except Exception as error:
        _give_up(error)
        return False
    return True


def _find_native() -> Any:
    """Return the module of compiled kernels, or None."""
    try:
        _found["kernels"] = importlib.import_module("superlora._native_transform")
    except Exception as error:
        _found["kernels"] = None
        installed = importlib.util.find_spec("numba") is not None
        if installed and "DISABLE_JIT" not in str(error):
            _give_up(error)
    return _found["kernels"]


def _give_up(error: Exception) -> None:
    _found["kernels"] = None
    warnings.warn(
        f"fwht must do without its compiled kernels: got {type(error).__name__}: {error}",
        RuntimeWarning,
        stacklevel=2,
    )
