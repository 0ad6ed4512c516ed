"""Fixtures of all tests: array libraries, devices, and a watch over global state."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest

# Before numpy and torch are imported: as many processes as cores, one thread each.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy
import tensorly

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def is_installed(package: str) -> bool:
    """Return whether a real package, not just a folder of that name, can be imported."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


@contextlib.contextmanager
def on_one_thread() -> Iterator[None]:
    """Compute on one thread: for tiny products, more of them wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run a test on one thread of PyTorch's, which it needs."""
    pytest.importorskip("torch")
    with on_one_thread():
        yield


def torch_devices() -> list[str]:
    """Return the names of the devices that torch can use here."""
    if not is_installed("torch"):
        return []
    import torch

    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return ["cpu", *(name for name, available in present.items() if available)]


@dataclasses.dataclass(frozen=True)
class Library:
    """One array library on one device.

    Attributes
    ----------
    name : str
        The library's package.
    array : callable
        Takes a numpy array and returns it as an array of the library, of the same dtype.
    to_numpy : callable
        The way back.
    like : array
        A float64 array of the library, on the device.
    """

    name: str
    array: Callable[[numpy.ndarray], Any]
    to_numpy: Callable[[Any], numpy.ndarray] = numpy.asarray

    @property
    def like(self) -> Any:
        return self.array(numpy.zeros(1))

    def arrays(self, factors: dict[str, numpy.ndarray]) -> dict[str, Any]:
        return {name: self.array(block) for name, block in factors.items()}

    def owns(self, array: Any) -> bool:
        return type(array) is type(self.like)


def _make_library(name: str, device: str) -> Library:
    if name == "numpy":
        return Library(name, numpy.asarray)
    package = importlib.import_module(name)
    if name == "torch":
        return Library(
            name,
            lambda values: package.tensor(values, device=device),
            lambda array: array.detach().cpu().numpy(),
        )
    if name == "jax":
        return Library(name, package.numpy.asarray)
    if name == "cupy":
        return Library(name, package.asarray, package.asnumpy)
    make = package.convert_to_tensor if name == "tensorflow" else package.to_tensor
    return Library(name, make, lambda array: array.numpy())


def _library_rows() -> list[tuple[str, str]]:
    # There are no float64 numbers on mps.
    rows = [("numpy", ""), *(("torch", device) for device in torch_devices() if device != "mps")]
    others = ("jax", "cupy", "tensorflow", "paddle")
    return rows + [(name, "") for name in others if is_installed(name)]


# Name and device of every array library that is installed.
LIBRARIES = {"-".join(filter(None, row)): row for row in _library_rows()}


@pytest.fixture(scope="session", params=LIBRARIES.values(), ids=LIBRARIES)
def xp(request: pytest.FixtureRequest) -> Library:
    """Every array library that is installed, float64 included."""
    return _make_library(*request.param)


@pytest.fixture(scope="session", params=torch_devices() or ["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    """Every torch device that is present."""
    if not is_installed("torch"):
        pytest.skip("torch is not installed")
    return str(request.param)


def jax_x64(enabled: bool = True) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which jax has 64-bit numbers or not, in this thread only."""
    import jax

    enable = getattr(jax, "enable_x64", None)
    if enable is None:
        from jax.experimental import enable_x64 as enable
    return enable(enabled)


def global_state() -> dict[str, Any]:
    """Return the settings that the library must leave alone, here and in another thread."""

    def look(thread: str) -> None:
        state[f"TensorLy backend in {thread}"] = tensorly.get_backend()
        if "jax" in sys.modules:
            state[f"jax_enable_x64 in {thread}"] = sys.modules["jax"].config.jax_enable_x64
        else:
            state[f"jax_enable_x64 in {thread}"] = os.environ.get("JAX_ENABLE_X64", "0") in (
                "1",
                "true",
                "True",
            )

    state: dict[str, Any] = {}
    look("this thread")
    other = threading.Thread(target=look, args=("another thread",))
    other.start()
    other.join()
    return state


def pytest_collection_finish() -> None:
    """Let no garbage collection walk over what was imported: some tests call it many times."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def _last_state() -> dict[str, Any]:
    return global_state()


@pytest.fixture(autouse=True)
def _global_state_is_untouched(
    request: pytest.FixtureRequest, _last_state: dict[str, Any]
) -> Iterator[None]:
    before = dict(_last_state)
    with contextlib.ExitStack() as stack:
        if "xp" in request.fixturenames and request.getfixturevalue("xp").name == "jax":
            stack.enter_context(jax_x64())
        yield
    _last_state.update(global_state())
    assert _last_state == before
