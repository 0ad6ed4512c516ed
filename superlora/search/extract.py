"""Designs of an ordinary adapter whose support tensors are those of a supernet's configuration."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from superlora.design.spec import Spec
from superlora.design.supports import Supports
from superlora.presets.operations import support

_FIELDS = [field.name for field in dataclasses.fields(Spec) if field.name != "overrides"]


def supports_of(configuration: Mapping[str, Mapping[str, int | str]]) -> Supports:
    """Return the designs of the support tensors that a configuration chooses."""
    chosen: dict[str, dict[str, int | str]] = {}
    for layer, options in configuration.items():
        for operation, option in options.items():
            chosen.setdefault(operation, {})[layer] = option
    found = {
        operation: _design(operation, options)
        for operation, options in chosen.items()
        if any(option != "none" for option in options.values())
    }
    if not found:
        raise ValueError(
            "configuration must choose a support for at least one layer: got 'none' everywhere"
        )
    return Supports(found)


def _design(operation: str, options: Mapping[str, int | str]) -> Spec:
    """Return one spec for all layers: that of the first, and what differs in the others."""
    layers: dict[int | str, list[str]] = {}
    for layer, option in options.items():
        layers.setdefault(option, []).append(layer)
    first = next(option for option in layers if option != "none")
    spec = support(operation, first)
    assert spec is not None
    overrides = {
        _pattern(operation, layers[option]): _difference(spec, operation, option)
        for option in layers
        if option != first
    }
    return spec.replace(overrides=overrides)


def _difference(spec: Spec, operation: str, option: int | str) -> dict[str, Any] | None:
    other = support(operation, option)
    if other is None:
        return None
    return {
        name: getattr(other, name)
        for name in _FIELDS
        if getattr(other, name) != getattr(spec, name)
    }


def _pattern(operation: str, layers: list[str]) -> str:
    """Return what matches these layers' supports and no other, whatever its name ends with."""
    return rf"\A{operation}\.(?:{'|'.join(map(re.escape, layers))})"
