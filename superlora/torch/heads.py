"""Which layers are a model's output heads, by their place."""

from __future__ import annotations

from typing import Any

from torch import nn

from superlora.torch.layers import is_linear
from superlora.torch.walk import outside_adapters


def heads_of(model: nn.Module) -> dict[int, str]:
    """Return the identities of a model's heads, and what each is."""
    found: dict[int, str] = {}
    modules = [module for _, module in outside_adapters(model)]
    for module in modules:
        for method, name in (
            ("get_output_embeddings", "the output embedding"),
            ("get_classifier", "the classifier"),
        ):
            for head in _asked(module, method):
                found[id(head)] = name
    classes = _classes(model)
    linear = [module for module in modules if is_linear(module)]
    wide: list[Any] = [each for each in linear if getattr(each, "out_features", 0) in classes]
    if wide:
        found.setdefault(id(wide[-1]), "the classifier, as wide as there are labels")
    if type(model).__module__.startswith("torchvision.models.") and linear:
        found.setdefault(id(linear[-1]), "the classifier")
    return found


def _asked(module: nn.Module, method: str) -> list[nn.Module]:
    ask = getattr(type(module), method, None)
    if ask is None and method not in module.__dict__:
        return []
    try:
        answer: Any = getattr(module, method)()
    except Exception:
        return []
    several = answer if isinstance(answer, (tuple, list)) else (answer,)
    return [each for each in several if isinstance(each, nn.Module)]


def _classes(model: nn.Module) -> set[int]:
    """Return the numbers of labels that a model says it has."""
    config = getattr(model, "config", None)
    named = "ForCausalLM" not in type(model).__name__
    asked = [getattr(config, "num_labels", None)] if named else []
    asked += [getattr(model, "num_classes", None), getattr(model, "num_labels", None)]
    return {each for each in asked if isinstance(each, int) and each > 0}
