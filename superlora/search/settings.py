"""The settings that a study was made with, and how they differ from those of another search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def differences(found: Any, expected: Mapping[str, Any]) -> list[str]:
    """Say what differs between the settings of two searches."""
    if not isinstance(found, Mapping):
        return [f"settings {found!r}"]
    texts = []
    for name, value in expected.items():
        other = found.get(name)
        if name == "space" and isinstance(other, Mapping):
            texts += [f"in its space {text}" for text in _space_differences(other, value)]
        elif isinstance(value, Mapping) and isinstance(other, Mapping):
            texts += differences(other, value)
        elif other != value and name != "fingerprint":
            texts.append(f"{name} {other!r} instead of {value!r}")
    # The order of a mapping is not that of its text, but is a part of the fingerprint.
    if not texts and found.get("fingerprint") != expected.get("fingerprint"):
        return ["another order of layers in its space"]
    return texts


def _space_differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    layers, wanted = found.get("layers") or {}, expected["layers"]
    texts = [f"layer {name!r} more" for name in layers if name not in wanted]
    texts += [f"no layer {name!r}" for name in wanted if name not in layers]
    texts += [
        f"layer {name!r} of widths {layers[name]} instead of {wanted[name]}"
        for name in wanted
        if name in layers and layers[name] != wanted[name]
    ]
    texts += [
        f"{name} {found.get(name)} instead of {expected[name]}"
        for name in ("ranks", "operations", "without_bias")
        if found.get(name) != expected[name]
    ]
    return texts
