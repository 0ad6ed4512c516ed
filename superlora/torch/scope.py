"""`Scope`: what the layers of an adapter share during one forward pass of the model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from superlora.torch.autograd import is_traced


class Scope:
    """Values that layers make once and read in turn, while a forward pass of the model is open.

    A layer that differentiates hands on the value that it read: gradients of all of them are added
    up on their way back, in one tensor. Outside of a pass, and where each operation is traced,
    nothing is shared. Every thread has passes of its own.
    """

    def __init__(self) -> None:
        self._depths: dict[int, int] = {}
        self._values: dict[int, dict[Hashable, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_depths": {}, "_values": {}}

    def open(self, *_: Any) -> None:
        """Open a pass of this thread, or one more within it."""
        if torch.compiler.is_compiling():
            return
        thread = threading.get_ident()
        self._depths[thread] = self._depths.get(thread, 0) + 1
        self._values.setdefault(thread, {})

    def close(self, *_: Any) -> None:
        """Close the pass of this thread that was opened last."""
        if torch.compiler.is_compiling():
            return
        thread = threading.get_ident()
        depth = self._depths.get(thread, 0) - 1
        if depth > 0:
            self._depths[thread] = depth
            # What belongs to a graph ends with the pass.
            kept = {key: value for key, value in self._values[thread].items() if not _graded(key)}
            self._values[thread] = kept
        else:
            self._depths.pop(thread, None)
            self._values.pop(thread, None)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep what is made without gradients over several passes."""
        self.open()
        try:
            yield
        finally:
            self.close()

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Return a value of the open pass, made where it is not there yet."""
        values = self._values[threading.get_ident()]
        key = _with_mode(key)
        if key not in values:
            values[key] = make()
        return values[key]

    def put(self, key: Hashable, value: Tensor) -> None:
        """Hand on a value that a layer has read."""
        self._values[threading.get_ident()][_with_mode(key)] = value

    def is_open(self) -> bool:
        """Return whether values are shared now."""
        return not is_traced() and threading.get_ident() in self._values

    def clear(self) -> None:
        """Forget all that was made."""
        for values in self._values.values():
            values.clear()


def _with_mode(key: Hashable) -> Hashable:
    return key, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def _graded(key: Any) -> bool:
    return bool(key[1])
