"""GLoRA's supernet and the search in it: which support tensors each layer is given.

This import leaves PyTorch and Optuna alone; they are imported with the names that need them.
The package can be called, and is then the preset of the same name.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from typing import TYPE_CHECKING, Any

from superlora.glora.space import Configuration, Option, Space
from superlora.presets import operations

if TYPE_CHECKING:
    from superlora.glora.evolution import Evolution
    from superlora.glora.outcome import Candidate, Outcome
    from superlora.glora.samplers import EvolutionSampler
    from superlora.glora.searching import search
    from superlora.glora.supernet import Supernet

_LAZY = {
    "Candidate": "outcome",
    "Evolution": "evolution",
    "EvolutionSampler": "samplers",
    "Outcome": "outcome",
    "Supernet": "supernet",
    "search": "searching",
}

__all__ = [
    "Candidate",
    "Configuration",
    "Evolution",
    "EvolutionSampler",
    "Option",
    "Outcome",
    "Space",
    "Supernet",
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


class _Package(types.ModuleType):
    def __call__(self, rank: int = 8, **options: Any) -> operations.Designs:
        return operations.glora(rank, **options)

    __call__.__doc__ = operations.glora.__doc__


__signature__ = inspect.signature(operations.glora)

# Its import would else take the preset's place, which `superlora.glora` is too.
sys.modules[__name__].__class__ = _Package
