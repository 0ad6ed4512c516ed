"""Serve a batch whose rows use different adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from superlora.errors import AdapterError, some
from superlora.torch.adapter import Adapter, registered
from superlora.torch.link import OPEN, Part, Rows
from superlora.torch.walk import outside_adapters


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
    The base is computed once for the whole batch. Updates of linear layers that are products of
    two matrices are computed for all adapters at once, others once for each adapter; those
    attached but not in use cost nothing. Without gradients, the factors in use are copied at the
    first call and kept until the block ends, or are copied again once an operation changes them in
    place or a scale is set; what ``.data`` changes is not seen. Blocks may be nested: the
    innermost one of a model decides. Gradients flow; where layers are recomputed for them, as by
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
        if not adapter.active:
            raise AdapterError(f"adapter {name!r} must not be disabled to serve rows")
        links = {id(site.module): site.links[adapter] for site in adapter._every}
        parts.append(Part(own, links))
    return Rows(len(names), parts, {id(module) for _, module in outside_adapters(model)})
