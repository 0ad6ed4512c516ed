"""Serve a batch whose rows use different adapters."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from superlora.errors import AdapterError, some
from superlora.torch.walk import outside_adapters

if TYPE_CHECKING:
    from superlora.torch.adapter import Adapter
    from superlora.torch.site import Link, Site


@dataclass(eq=False)
class _Part:
    """An adapter, its rows, and its links by the layer's identity."""

    adapter: Adapter
    places: list[int]
    links: Mapping[int, Link]
    _index: dict[torch.device, Tensor] = field(default_factory=dict)

    def index(self, device: torch.device) -> Tensor:
        """Return the rows as a tensor of a device, made once."""
        if device not in self._index:
            self._index[device] = torch.tensor(self.places, device=device)
        return self._index[device]


@dataclass(eq=False)
class Rows:
    """Which adapter each row of a batch uses, in some layers.

    Attributes
    ----------
    count : int
        Rows of the batch.
    parts : list of _Part
        The adapters in use.
    modules : set of int
        The identities of all modules of the model.
    thread : int
        Which opened the block.
    """

    count: int
    parts: list[_Part]
    modules: set[int]
    thread: int = field(default_factory=threading.get_ident)

    def output(self, site: Site, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return a layer's output: that of the base, and every row's own update."""
        if site.merged:
            names = dict.fromkeys(link.adapter.name for link in site.merged)
            raise AdapterError(
                f"no adapter must be merged inside rows(): {some(map(repr, names))} are in the "
                "weights of a layer"
            )
        if x.dim() < 2 or x.shape[0] != self.count:
            raise ValueError(
                f"names must have one entry for each row of the batch, the first axis of a layer's "
                f"input: got {self.count} names and an input of shape {tuple(x.shape)} at "
                f"{site.links[0].name!r}"
            )
        y = site._base(*args, **kwargs)
        indices, updates = [], []
        for part in self.parts:
            link = part.links.get(id(site.module))
            if link is None or not part.adapter.active or not part.adapter.attached:
                continue
            index = part.index(x.device)
            own = x if len(part.places) == self.count else x.index_select(0, index)
            indices.append(index)
            updates.append(site.update(link, own).to(y.dtype))
        if not updates:
            return y
        # At once: out of place every call copies the output.
        return y.index_add(0, torch.cat(indices), torch.cat(updates))


# Of the `with` blocks that are open, the innermost last.
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


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Let every row of a batch go through an adapter of its own, inside a ``with`` block.

    Parameters
    ----------
    model : torch.nn.Module
        A model with adapters, none of them merged.
    names : sequence of (str or None)
        For each row of the batch the name of its adapter, as given to `attach` or `load`;
        None for the base alone. A row is an entry of the first axis of a layer's input,
        which must have as many: inputs whose rows were flattened together, as to
        ``(rows * tokens, width)``, are refused, and so are inputs of one axis.

    Yields
    ------
    None
        Nothing.

    Raises
    ------
    AdapterError
        If an adapter of the model is merged, or one that is named is disabled, or
        one has replaced parameters of the model, which all rows would go through.
    TypeError
        If `model` is no module, or `names` no sequence of strings and None.
    ValueError
        If there are no names, or the model has no adapter of one or several; and inside the
        block, from the first adapted layer, if they are not as many as the rows.

    Notes
    -----
    The base is computed once for the whole batch, and every adapter in use once for its rows
    together; those attached but not in use cost nothing. Blocks may be nested: the innermost
    one of a model decides. Gradients flow; where layers are recomputed for them, as by
    ``torch.utils.checkpoint``, take them inside the block.

    Examples
    --------
    >>> import torch, superlora as sl, superlora.torch as slt
    >>> model = torch.nn.Linear(4, 2)
    >>> for name in ("french", "german"):
    ...     adapter = slt.attach(model, sl.lora(rank=1), name=name)
    ...     _ = torch.nn.init.ones_(adapter.factors()["0.0.factor0"])
    >>> x = torch.ones(3, 4)
    >>> with slt.rows(model, ["french", None, "german"]):
    ...     y = model(x)
    >>> with slt.rows(model, ["french"] * 3):
    ...     torch.allclose(y[0], model(x)[0])
    True
    """
    found = _rows_of_names(model, names)
    OPEN.append(found)
    try:
        yield
    finally:
        OPEN.remove(found)


def _rows_of_names(model: nn.Module, names: Sequence[str | None]) -> Rows:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module: got {type(model).__name__}")
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"names must be a list of names and None: got {names!r}")
    if not names:
        raise ValueError("names must have one entry for each row of the batch: got none")
    places: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        if name is None:
            continue
        if not isinstance(name, str):
            raise TypeError(f"names[{index}] must be a string or None: got {name!r}")
        places.setdefault(name, []).append(index)
    from superlora.torch.adapter import registered
    from superlora.torch.site import Link

    adapters: dict[str, list[Adapter]] = {}
    for adapter in registered(model):
        adapters.setdefault(adapter.name, []).append(adapter)
        # Else the base would not be that of all rows.
        if adapter.merged:
            raise AdapterError(
                f"adapter {adapter.name!r} must be unmerged to serve rows of a batch, its own or "
                "others: call unmerge() first"
            )
        if adapter.replaced is not None and adapter.replaced.in_use:
            raise AdapterError(
                f"adapter {adapter.name!r} must be detached for rows of a batch: it has replaced "
                f"{some(adapter.replaced.names)}, which all rows would go through"
            )
    unknown = [f"names[{own[0]}]={name!r}" for name, own in places.items() if name not in adapters]
    if unknown:
        raise ValueError(
            f"names must be those of the model's adapters, {some(map(repr, adapters)) or 'none'}: "
            f"got {some(unknown)}"
        )
    parts = []
    for name, own in places.items():
        adapter, *others = adapters[name]
        if others:
            raise ValueError(
                f"names must be those of one adapter each: {1 + len(others)} parts of the model "
                f"have one named {name!r}"
            )
        if adapter._disabled:
            raise AdapterError(f"adapter {name!r} must not be disabled to serve rows")
        links = {id(site.module): Link(adapter, key) for key, site in adapter._sites.items()}
        parts.append(_Part(adapter, own, links))
    return Rows(len(names), parts, {id(module) for _, module in outside_adapters(model)})
