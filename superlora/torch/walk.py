"""Walk a model, and freeze it, without its adapters' own parts: there may be thousands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from superlora.torch.blocks import Blocks

# By owner and key: a parameter may be replaced, as by `Module.to_empty`.
Frozen = list[tuple[nn.Module, str]]


def outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model by name, but those of its adapters."""
    seen: set[int] = set()
    # An adapter is a module that has blocks; there may be hundreds beside a layer.
    rest = [] if type(model.__dict__.get("blocks")) is Blocks else [("", model)]
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
            if child is not None and type(child.__dict__.get("blocks")) is not Blocks
        ]
        rest += children[::-1]


def freeze(model: nn.Module) -> Frozen:
    """Let no parameter of a model but its adapters' require gradients."""
    frozen = [
        (owner, key)
        for _, owner in outside_adapters(model)
        for key, parameter in owner._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]
    for owner, key in frozen:
        owner._parameters[key].requires_grad_(False)  # type: ignore[union-attr]
    return frozen


def release(frozen: Frozen, later: Sequence[tuple[nn.Module, Frozen]]) -> None:
    """Let parameters require gradients again, or hand them on."""
    models = dict.fromkeys(model for model, _ in later)
    modules = {model: {module for _, module in outside_adapters(model)} for model in models}
    for owner, key in frozen:
        heir = next((heir for model, heir in later if owner in modules[model]), None)
        parameter = owner._parameters.get(key)
        if heir is not None:
            heir.append((owner, key))
        elif parameter is not None:
            parameter.requires_grad_(True)
