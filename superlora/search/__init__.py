"""GLoRA's supernet and the search in it: which support tensors each layer is given.

This import leaves PyTorch and Optuna alone; they are imported with the names that need them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from superlora.search.candidates import candidates
from superlora.search.evolution import Evolution
from superlora.search.outcome import Candidate, Outcome
from superlora.search.space import Configuration, Option, Space

if TYPE_CHECKING:
    from superlora.search.sampler import EvolutionSampler
    from superlora.search.searching import search
    from superlora.search.supernet import Supernet

_LAZY = {"EvolutionSampler": "sampler", "Supernet": "supernet", "search": "searching"}

__all__ = [
    "Candidate",
    "Configuration",
    "Evolution",
    "EvolutionSampler",
    "Option",
    "Outcome",
    "Space",
    "Supernet",
    "candidates",
    "search",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_LAZY[name]}")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = {"optuna": "search", "torch": "torch", "safetensors": "torch"}.get(package)
        if extra is None:
            raise
        raise ModuleNotFoundError(
            f"{__name__}.{name} needs the extra {extra!r}: pip install 'superlora[{extra}]'",
            name=error.name,
        ) from error
    return globals().setdefault(name, getattr(module, name))


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
