"""Which parameters lie in the same memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

# The memory, and the first byte and the one after the last in it.
Range = tuple[object, Any, Any]


def range_of(tensor: Tensor) -> Range:
    """Return where a tensor's entries lie."""
    local = getattr(tensor, "_local_tensor", tensor)  # a part of a distributed tensor
    try:
        storage = local.untyped_storage()
        address: object = storage.data_ptr() or ("storage", storage._cdata)
    except (RuntimeError, NotImplementedError, AttributeError, ValueError):  # packed or lazy
        return ("tensor", id(tensor)), 0, 1
    if math.prod(local.shape) == 0:
        return ("tensor", id(tensor)), 0, 1
    last = sum((n - 1) * step for n, step in zip(local.shape, local.stride(), strict=True))
    first = local.storage_offset()
    size = local.element_size()
    return address, first * size, (first + last + 1) * size


class Owners:
    """Who has the memory of each parameter.

    Parameters
    ----------
    modules : mapping of str to torch.nn.Module
        All modules of a model by name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._held: dict[object, list[tuple[int, int, int, str]]] = {}
        self._ranges: dict[tuple[int, str], Range] = {}
        for name, module in modules.items():
            for key, parameter in module._parameters.items():
                if parameter is None:
                    continue
                found = range_of(parameter)
                self._ranges[id(module), key] = found
                address, start, stop = found
                dotted = f"{name}.{key}".lstrip(".")
                self._held.setdefault(address, []).append((start, stop, id(module), dotted))

    def others(self, module: nn.Module, key: str) -> list[str]:
        """Return the parameters of other modules, or other names, in the same memory."""
        address, start, stop = self._ranges[id(module), key]
        return [
            name
            for first, last, owner, name in self._held[address]
            if first < stop
            and start < last
            and not (owner == id(module) and name.rpartition(".")[2] == key)
        ]
