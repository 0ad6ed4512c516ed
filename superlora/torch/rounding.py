"""Add an update to a weight with as few passes over memory as its dtype allows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_CHUNK = 1 << 18  # entries, which stay in the cache from one pass to the next


def add_rounded_once(weight: Tensor, delta: Tensor) -> None:
    """Add in place, in the wider of the two dtypes, and round to the weight's once."""
    if weight.dtype is delta.dtype or weight.device.type != "cpu":
        weight.add_(delta)
        return
    # On a CPU torch converts whole operands beforehand; the parts are converted in the cache.
    wide = torch.promote_types(weight.dtype, delta.dtype)
    rows = max(1, _CHUNK // max(1, weight[0].numel())) if weight.shape[0] else 1
    buffer = torch.empty(min(rows, weight.shape[0]), *weight.shape[1:], dtype=wide)
    for start in range(0, weight.shape[0], rows):
        part = weight[start : start + rows]
        total = buffer[: part.shape[0]]
        total.copy_(part)
        total.add_(delta[start : start + rows])
        part.copy_(total)


def is_finite(weight: Tensor) -> bool:
    """Return whether all numbers of a weight are finite, reading it once."""
    least, largest = torch.aminmax(weight.detach())  # which hands NaN on
    return math.isfinite(least) and math.isfinite(largest)
