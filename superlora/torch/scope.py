"""`Scope`: what the layers of an adapter share during one forward pass of the model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from superlora.torch.autograd import is_traced

Values = dict[Hashable, Tensor]


class Scope:
    """Values that layers make once and read in turn, while a forward pass of the model is open.

    A layer that differentiates hands on the value that it read: gradients of all of them are added
    up on their way back, in one tensor. Outside of a pass, and where each operation is traced,
    nothing is shared. Every thread has a pass of its own.
    """

    def __init__(self) -> None:
        self._passes: dict[int, Values] = {}
        self._kept: dict[int, Values] = {}  # over several passes, without gradients

    def __getstate__(self) -> dict[str, Any]:
        return {"_passes": {}, "_kept": {}}

    def open(self, *_: Any) -> None:
        """Begin a pass of this thread.

        One that is open already was interrupted, so that nothing closed it, or calls the model
        again, and goes on without what its layers shared.
        """
        if not torch.compiler.is_compiling():
            self._passes[threading.get_ident()] = {}

    def close(self, *_: Any) -> None:
        """End the pass of this thread."""
        if not torch.compiler.is_compiling():
            self._passes.pop(threading.get_ident(), None)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Share values inside a ``with`` block as during a pass."""
        self.open()
        try:
            yield
        finally:
            self.close()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Share what is made without gradients inside a ``with`` block, over several passes."""
        thread = threading.get_ident()
        before = self._kept.get(thread)
        self._kept[thread] = {} if before is None else before
        try:
            yield
        finally:
            if before is None:
                self._kept.pop(thread, None)

    def is_open(self) -> bool:
        """Return whether values are shared now."""
        return not is_traced() and self._values() is not None

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Return a shared value, made where it is not there yet."""
        values = self._values()
        assert values is not None
        key = _with_mode(key)
        if key not in values:
            values[key] = make()
        return values[key]

    def put(self, key: Hashable, value: Tensor) -> None:
        """Hand on a value that a layer has read."""
        values = self._values()
        assert values is not None
        values[_with_mode(key)] = value

    def clear(self) -> None:
        """Forget all that was made."""
        for values in (*self._passes.values(), *self._kept.values()):
            values.clear()

    def _values(self) -> Values | None:
        thread = threading.get_ident()
        if thread in self._kept and not torch.is_grad_enabled():
            return self._kept[thread]
        return self._passes.get(thread)


def _with_mode(key: Hashable) -> Hashable:
    return key, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
