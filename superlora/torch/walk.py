"""Walk a model, and freeze it, without its adapters' own parts: there may be thousands."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from superlora.errors import AdapterError
from superlora.torch.blocks import Blocks

Named = tuple[str, nn.Module]
# By owner and key: a parameter may be replaced, as by `Module.to_empty`.
Frozen = list[tuple[nn.Module, str]]
# Under which torch.compile and the wrappers of activation checkpointing and FSDP have a module.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def plain_name(name: str) -> str:
    """Return a dotted name without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return what wrappers stand around, the module itself where there is none."""
    while True:
        key = next((key for key in _WRAPPED if key in module._modules), None)
        if key is None:
            return module
        module = module.get_submodule(key)


def submodule(model: nn.Module, name: str) -> nn.Module | None:
    """Return the module of a dotted name, whatever is wrapped around it or the modules above."""
    found = unwrapped(model)
    for key in name.split(".") if name else ():
        inner = getattr(found, key, None)  # scripted modules have no dict of them
        if not isinstance(inner, nn.Module):
            return None
        found = unwrapped(inner)
    return found


def outside_adapters(model: nn.Module, *, wrappers: bool = False) -> Iterator[Named]:
    """Yield the modules of a model by name, but those of its adapters."""
    # A wrapper has the name of the module in it, which comes after it; with `wrappers` names are
    # those of a state dict.
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
            (name if key in _WRAPPED and not wrappers else before + key, child)
            for key, child in module._modules.items()
            if child is not None and type(child.__dict__.get("blocks")) is not Blocks
        ]
        rest += children[::-1]


def tensors_of(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return where a model's parameters and stored buffers are, by name, but its adapters'."""
    return {
        f"{path}.{leaf}".lstrip("."): (module, leaf)
        for path, module in outside_adapters(model)
        for held in (module._parameters, module._buffers)
        for leaf, tensor in held.items()
        if tensor is not None and leaf not in module._non_persistent_buffers_set
    }


def held_in(owner: nn.Module, leaf: str) -> dict[str, Any]:
    """Return the parameters of a module, or its buffers, whichever has a name."""
    return owner._parameters if leaf in owner._parameters else owner._buffers


def read(owner: nn.Module, leaf: str) -> Tensor:
    """Return a module's parameter or buffer."""
    found: Tensor | None = held_in(owner, leaf).get(leaf)
    if found is None:
        raise AdapterError(f"{leaf!r} of a {type(owner).__name__} is gone since it was adapted")
    return found


def freeze(model: nn.Module, kept: Container[int] = ()) -> Frozen:
    """Let no parameter of a model but its adapters', and those of some ids, require gradients."""
    frozen = [
        (owner, key)
        for _, owner in outside_adapters(model)
        for key, parameter in owner._parameters.items()
        if parameter is not None and parameter.requires_grad and id(parameter) not in kept
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
