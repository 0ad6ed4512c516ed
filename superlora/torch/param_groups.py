"""Groups of an adapter's parameters for an optimizer, each with a rate of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from superlora.algebra.init import zero_block
from superlora.design.layout import Layout
from superlora.torch.files.state import MODEL


def param_groups(
    layout: Layout,
    parameters: Mapping[str, nn.Parameter],
    lr: float,
    ratio: float,
    rates: Mapping[str, float],
    weight_decay: float | None,
) -> list[dict[str, Any]]:
    """Return parameters by rate and weight decay, as optimizers of torch take them."""
    numbers = {"lr": lr, "ratio": ratio, **{f"rates[{k!r}]": v for k, v in rates.items()}}
    if weight_decay is not None:
        numbers["weight_decay"] = weight_decay
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number: got {value!r}")
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and at least 0: got {value!r}")
    kinds = {name: _kind(name) for name in parameters}
    unknown = [kind for kind in rates if kind not in kinds.values()]
    if unknown:
        raise ValueError(
            f"rates must be of the adapter's kinds of blocks, {sorted(set(kinds.values()))}: got "
            f"{unknown}"
        )
    zero = {
        zero_block(layout, group, term)
        for group in range(len(layout.groups))
        for term in range(layout.specs[group].trained_terms)
    }
    found: dict[tuple[float, bool], list[str]] = {}
    for name, parameter in parameters.items():
        own = rates.get(kinds[name], lr * ratio if name in zero else lr)
        found.setdefault((own, parameter.dim() > 1), []).append(name)
    groups = []
    for (own, decays), names in found.items():
        group = {"params": [parameters[name] for name in names], "names": names, "lr": own}
        if not decays:
            group["weight_decay"] = 0.0
        elif weight_decay is not None:
            group["weight_decay"] = weight_decay
        groups.append(group)
    return groups


def _kind(name: str) -> str:
    """Return the kind of a block, or of a parameter of the model."""
    return "model" if name.startswith(MODEL) else name.rpartition(".")[2]
