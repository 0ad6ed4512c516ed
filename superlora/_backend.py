"""Find the TensorLy backend of an array from its type; nothing is switched.

TensorLy dispatches on a process-wide default. We call the methods of the backend
object that belongs to the arrays at hand instead, so that no default is read or
set, on any thread, and numpy, torch and jax can be mixed in one process.
"""

from __future__ import annotations

import functools
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy
import tensorly

Array = Any

_NAMES = {
    "numpy": "numpy",
    "torch": "pytorch",
    "jax": "jax",
    "jaxlib": "jax",
    "cupy": "cupy",
    "tensorflow": "tensorflow",
    "paddle": "paddle",
}
# Plain dicts: torch.compile traces through them, but not through lru_cache.
_name_of_type: dict[type, str] = {}
_loaded: dict[str, Any] = {}


def _load(name: str) -> Any:
    load = functools.partial(tensorly.backend.BackendManager.load_backend, name)
    jax = sys.modules.get("jax") if name == "jax" else None
    if jax is None:
        return load()

    # Importing TensorLy's jax backend turns on 64-bit mode for the process. What was
    # set before is only seen on a thread that no `enable_x64` context holds.
    def load_and_restore() -> Any:
        enabled = jax.config.jax_enable_x64
        try:
            return load()
        finally:
            jax.config.update("jax_enable_x64", enabled)

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(load_and_restore).result()


def _library(name: str | None) -> Any:
    if name is None:
        raise TypeError("like must be an array or a dtype of numpy, jax or torch")
    if name not in _loaded:
        _loaded[name] = _load(name)
    return _loaded[name]


def backend_of(*arrays: Array) -> Any:
    """Return the TensorLy backend object that all `arrays` belong to."""
    found = None
    for array in arrays:
        kind = type(array)
        name = _name_of_type.get(kind)
        if name is None:
            roots = (base.__module__.partition(".")[0] for base in kind.__mro__)
            name = next((_NAMES[root] for root in roots if root in _NAMES), None)
            if name is None:
                raise TypeError(
                    "arrays must be of numpy, torch, jax, cupy, tensorflow or paddle: got "
                    f"{kind.__module__}.{kind.__qualname__}"
                )
            _name_of_type[kind] = name
        if found is None:
            found = name
        elif found != name:
            raise TypeError(f"arrays must be of one library: got {found} and {name}")
    if found is None:
        raise TypeError("arrays must not be empty: got none")
    return _loaded[found] if found in _loaded else _library(found)


def _context(like: Array) -> tuple[Any, dict[str, Any]]:
    """Return the backend and the dtype and device of an array or of a dtype alone."""
    if hasattr(like, "shape") and not isinstance(like, (type, numpy.dtype)):
        library = backend_of(like)
        context = library.context(like).items()
        return library, {key: value for key, value in context if key != "requires_grad"}
    owner = like if isinstance(like, type) else type(like)
    root = owner.__module__.partition(".")[0]
    if root == "builtins":
        try:
            return _library("numpy"), {"dtype": numpy.dtype(like)}
        except TypeError:
            raise TypeError(f"like must be an array or a dtype: got {like!r}") from None
    return _library(_NAMES.get(root)), {"dtype": like}


def from_numpy(values: numpy.ndarray, like: Array) -> Array:
    """Return numpy values as an array of the library, dtype and device of `like`."""
    library, context = _context(like)
    dtype = context["dtype"]
    name = numpy.dtype(dtype).name if library.backend_name in ("numpy", "jax") else str(dtype)
    if "float" not in name:
        raise TypeError(f"like must have a floating-point dtype: got {name}")
    return library.tensor(values, **context)


def zeros(shape: tuple[int, ...], like: Array) -> Array:
    """Return zeros of the library, dtype and device of `like`."""
    library, context = _context(like)
    return library.zeros(shape, **context)


def ones(shape: tuple[int, ...], like: Array) -> Array:
    """Return ones of the library, dtype and device of `like`."""
    library, context = _context(like)
    return library.ones(shape, **context)


def eye(size: int, like: Array) -> Array:
    """Return the identity matrix in the library, dtype and device of `like`."""
    library, context = _context(like)
    return library.eye(size, **context)


def check_floating(name: str, array: Array) -> None:
    """Refuse what is no array, and an array of integers, booleans or complex numbers."""
    try:
        backend_of(array)
    except TypeError as error:
        raise TypeError(f"{name} must be an array; {error}") from None
    dtype = str(getattr(array.dtype, "name", array.dtype)).rpartition(".")[2]
    if "float" not in dtype:
        raise TypeError(f"{name} must have a floating-point dtype: got {dtype}")


def widened(array: Array) -> Array:
    """Return `array` in single precision if it is of less, and itself otherwise."""
    return convert(array, backend_of(array).float32) if array.dtype.itemsize < 4 else array


def convert(array: Array, dtype: Any) -> Array:
    """Return `array` in a dtype of its library."""
    return array.astype(dtype) if hasattr(array, "astype") else array.to(dtype)


def cast(array: Array, like: Array) -> Array:
    """Return `array` in the dtype of another array of its library."""
    return array if array.dtype == like.dtype else convert(array, like.dtype)


def constant(values: numpy.ndarray, like: Array) -> Array:
    """Return fixed numbers of any dtype for arithmetic with `like`, on its device."""
    library = backend_of(like)
    # jax takes numpy's arrays as they are, also while it traces.
    if library.backend_name in ("numpy", "jax"):
        return values
    if library.backend_name != "pytorch":
        return library.tensor(values)
    torch = sys.modules["torch"]
    # Made under `torch.inference_mode` they could take part in no later gradient.
    with torch.inference_mode(False):
        return torch.from_numpy(values).to(like.device)


def take(array: Array, positions: Array) -> Array:
    """Return the entries at some positions along the first axis.

    Parameters
    ----------
    array : array, (n, ...)
        Of any library.
    positions : array of int, (m,)
        Below n, on the device of `array`; `Map.kept` gives it, and for numpy and jax any array of
        numpy serves.

    Returns
    -------
    array, (m, ...)
        Same library, dtype and device as `array`.
    """
    # torch's own indexing scatters one by one on the way back.
    return array.index_select(0, positions) if hasattr(array, "index_select") else array[positions]


def move_axis(array: Array, source: int, target: int) -> Array:
    """Return `array` with one axis in another place; neither is counted from the end."""
    axes = list(range(len(array.shape)))
    axes.insert(target, axes.pop(source))
    # torch.vmap has no rule for `moveaxis`.
    return backend_of(array).transpose(array, axes) if source != target else array


def scatter_add(values: Array, positions: Array, size: int) -> Array:
    """Add up values at some positions along the first axis: the adjoint of `take`.

    Parameters
    ----------
    values : array, (m, ...)
        Of numpy, torch or jax.
    positions : array of int, (m,)
        Below `size`, as for `take`.
    size : int
        Entries of the result.

    Returns
    -------
    array, (size, ...)
        Same library, dtype and device as `values`.

    Raises
    ------
    TypeError
        If `values` is of another library.
    """
    library = backend_of(values)
    if library.backend_name == "numpy" and len(values.shape) == 1:
        return numpy.bincount(positions, values, minlength=size).astype(values.dtype)
    empty = zeros((size, *values.shape[1:]), like=values)
    if library.backend_name == "numpy":
        numpy.add.at(empty, positions, values)
        return empty
    if hasattr(empty, "index_add"):
        return empty.index_add(0, positions, values)
    if hasattr(empty, "at"):
        return empty.at[positions].add(values)
    raise TypeError(f"scattering must be on numpy, torch or jax: got {library.backend_name}")


def fourier_transforms(array: Array) -> Any:
    """Return the ``fft`` module of an array's library, of numpy's interface."""
    name = backend_of(array).backend_name
    if name == "jax":
        return sys.modules["jax"].numpy.fft
    return sys.modules["torch" if name == "pytorch" else name].fft
