"""Walk a model without its adapters' own parts, of which there may be thousands."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from superlora.torch.blocks import Blocks


def outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model by name, but those of its adapters.

    Parameters
    ----------
    model : torch.nn.Module
        The model.

    Yields
    ------
    (str, torch.nn.Module)
        In the order of ``model.named_modules()``, each once.
    """
    seen: set[int] = set()
    rest = [] if isinstance(model, Blocks) else [("", model)]
    while rest:
        name, module = rest.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        before = f"{name}." if name else ""
        children = [
            (before + key, child)
            for key, child in module._modules.items()
            if child is not None and not isinstance(child, Blocks)
        ]
        rest += children[::-1]


def module_of(model: nn.Module, name: str) -> nn.Module | None:
    """Return the part of a model that has a dotted name, if any.

    Parameters
    ----------
    model : torch.nn.Module
        The model.
    name : str
        The name, empty for the model itself.

    Returns
    -------
    torch.nn.Module or None
        The part, also where it has other names too.
    """
    found: nn.Module | None = model
    for key in name.split(".") if name else ():
        found = None if found is None else found._modules.get(key)
    return found
