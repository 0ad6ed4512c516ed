"""`Scope`: what the layers of an adapter have in common, and share during a forward pass."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from superlora.torch.autograd import is_traced

Values = dict[Hashable, dict[str | None, Tensor]]


class Scope:
    """Values that layers make once and read in turn, while a forward pass of the model is open.

    Each value is a dict of parts by layer. Outside of a pass, and where each operation is traced,
    nothing is shared. Every thread has a pass of its own. A pass that no `Exception` but a keyboard
    interrupt ended is open until the next call of the model.

    Attributes
    ----------
    applied : str
        How the layers apply their updates: ``"auto"``, ``"factored"`` or ``"formed"``.
    """

    def __init__(self) -> None:
        self.applied = "auto"
        self._passes: dict[int, dict[object, Values]] = {}
        self._blocks: set[int] = set()  # the threads that are inside `opened`
        self._kept: dict[int, dict[object, Values]] = {}  # over several passes, without gradients

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_passes": {}, "_blocks": set(), "_kept": {}}

    def open(self, *_: Any) -> None:
        """Begin a pass of this thread."""
        if not torch.compiler.is_compiling():
            self._passes[threading.get_ident()] = {}

    def close(self, *_: Any) -> None:
        """End the pass of this thread."""
        if not torch.compiler.is_compiling():
            self._passes.pop(threading.get_ident(), None)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Share values inside a ``with`` block as during a pass."""
        thread = threading.get_ident()
        before, outer = self._passes.get(thread), self.in_block
        self.open()
        self._blocks.add(thread)
        try:
            yield
        finally:
            self.close()
            if before is not None:
                self._passes[thread] = before
            if not outer:
                self._blocks.discard(thread)

    @property
    def in_block(self) -> bool:
        """Whether this thread is inside `opened`."""
        return threading.get_ident() in self._blocks

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

    def values(self) -> Values | None:
        """Return what is shared now by key, to be added to; None where nothing is shared."""
        # What a pass made with gradients is no part of what it makes without.
        if is_traced():
            return None
        thread, graded = threading.get_ident(), torch.is_grad_enabled()
        held = None if graded else self._kept.get(thread)
        held = self._passes.get(thread) if held is None else held
        if held is None:
            return None
        found: Values = held.setdefault((graded, torch.is_inference_mode_enabled()), {})
        return found

    def clear(self) -> None:
        """Forget all that was made."""
        for values in (*self._passes.values(), *self._kept.values()):
            values.clear()
