"""`Link`: an adapter of a layer; and which rows of a batch use which adapters."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from superlora.errors import AdapterError
from superlora.torch.blocks import Place
from superlora.torch.dropout import Dropout
from superlora.torch.support import Support


@dataclass(eq=False)
class Link:
    """An adapter of a layer, and what it calls the layer.

    Attributes
    ----------
    adapter : torch.nn.Module
        The adapter.
    adapter_name : str
        What errors call it.
    name : str
        The layer's dotted name in the adapter's own model.
    supports : iterable of Support
        Its support tensors here, in the order of the operations. To iterate over them raises an
        error where there are none to choose, as in a supernet without a configuration.
    first : Place
        Its first factor, whose dtype all have.
    dropout : Dropout
        What the adapter leaves out in training.
    active : bool
        Whether the layer's forward adds them: the adapter is neither merged nor disabled.
    before : tuple of (torch.Tensor or None), or None
        The bits of weight and bias before the adapter was merged into them, while it is; None
        for one that it leaves alone.
    bare : bool
        Whether the layer had no bias, and has one meanwhile.
    into : tuple of (torch.Tensor or None)
        The parameters that the adapter was merged into last.
    """

    adapter: nn.Module
    adapter_name: str
    name: str
    supports: Iterable[Support]
    first: Place
    dropout: Dropout
    active: bool = True
    before: tuple[Tensor | None, Tensor | None] | None = None
    bare: bool = False
    into: tuple[Tensor | None, Tensor | None] = (None, None)


@dataclass(eq=False)
class Part:
    """Rows of a batch that use one adapter, and its links by the layer's identity."""

    places: list[int]
    links: Mapping[int, Link]
    _index: dict[torch.device, Tensor] = field(default_factory=dict)

    def index(self, device: torch.device) -> Tensor:
        """Return the rows as a tensor of a device, made once."""
        if device not in self._index:
            with torch.inference_mode(False):  # else no backward pass could use it
                self._index[device] = torch.tensor(self.places, device=device)
        return self._index[device]


@dataclass(eq=False)
class Rows:
    """Which adapter each row of a batch uses, in the layers of one model.

    Attributes
    ----------
    count : int
        Rows of the batch.
    parts : list of Part
        The adapters in use.
    modules : set of int
        The identities of all modules of the model.
    thread : int
        Which opened the block.
    kept : dict
        What layers make once a block.
    """

    count: int
    parts: list[Part]
    modules: set[int]
    thread: int = field(default_factory=threading.get_ident)
    kept: dict[Hashable, Any] = field(default_factory=dict)


# Of the `with rows(...)` blocks that are open, the innermost last.
OPEN: list[Rows] = []


def rows_of(module: nn.Module) -> Rows | None:
    """Return the rows of the innermost open block whose model has a layer, if any."""
    found = [rows for rows in reversed(OPEN) if id(module) in rows.modules]
    if not found:
        return None
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() == -1:
        found = [rows for rows in found if rows.thread == threading.get_ident()]
    elif len({rows.thread for rows in found}) > 1:
        raise AdapterError("rows() must be open in one thread alone to be compiled or recomputed")
    return found[0] if found else None
