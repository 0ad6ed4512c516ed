"""Freeze a model under its adapters, and give back what was trainable."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from superlora.torch.walk import outside_adapters

# By owner and key: a parameter may be replaced, as by `Module.to_empty`.
Frozen = list[tuple[nn.Module, str]]


def freeze(model: nn.Module) -> Frozen:
    """Let no parameter of a model but its adapters' require gradients.

    Parameters
    ----------
    model : torch.nn.Module
        The model.

    Returns
    -------
    list of (torch.nn.Module, str)
        Owner and key of every parameter that was frozen.
    """
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
    """Let parameters require gradients again, or hand them on.

    Parameters
    ----------
    frozen : list of (torch.nn.Module, str)
        What an adapter that leaves had frozen.
    later : sequence of (torch.nn.Module, list)
        Model and list of the adapters attached after it. They found the
        parameters frozen, and so have to release them in turn.
    """
    models = dict.fromkeys(model for model, _ in later)
    modules = {model: {module for _, module in outside_adapters(model)} for model in models}
    for owner, key in frozen:
        heir = next((heir for model, heir in later if owner in modules[model]), None)
        parameter = owner._parameters.get(key)
        if heir is not None:
            heir.append((owner, key))
        elif parameter is not None:
            parameter.requires_grad_(True)
