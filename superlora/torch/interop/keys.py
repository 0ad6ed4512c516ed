"""How programs name an adapter's tensors in one flat file: a table, and a model's names by it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn


class Keys(NamedTuple):
    """A row of the table.

    Attributes
    ----------
    prefixes : tuple of str
        What keys begin with, by the part of a pipeline; the first is written by default.
    joint : str
        What stands between a prefix and the parts of a layer's name.
    names : tuple of str
        Of LoRA's output and input factor.
    structured : bool
        Whether the program reads LoKr, LoHa, dense updates and a number alpha.
    """

    prefixes: tuple[str, ...]
    joint: str
    names: tuple[str, str]
    structured: bool


_UP, _DOWN = "lora_up.weight", "lora_down.weight"
KEYS = {
    "lycoris": Keys(("lycoris",), "_", (_UP, _DOWN), True),
    "kohya": Keys(
        ("lora_unet", "lora_te", "lora_te1", "lora_te2", "lora_te3"), "_", (_UP, _DOWN), True
    ),
    "comfy": Keys(("diffusion_model", "text_encoders"), ".", (_UP, _DOWN), True),
    "diffusers": Keys(
        ("unet", "transformer", "transformer_2", *(f"text_encoder{n}" for n in ("", "_2", "_3"))),
        ".",
        ("lora_B.weight", "lora_A.weight"),
        False,
    ),
}
# Other names of LoRA's factors in files.
OTHER_NAMES = {
    "lora_B.weight": _UP,
    "lora_A.weight": _DOWN,
    "lora_B.default.weight": _UP,
    "lora_A.default.weight": _DOWN,
    "lora.up.weight": _UP,
    "lora.down.weight": _DOWN,
}


def stem(layer: str, prefix: str, joint: str) -> str:
    """Return what the keys of a layer begin with, before the name of the tensor."""
    return (f"{prefix}{joint}{layer}" if prefix else layer).replace(".", joint)


def default_prefix(keys: str, model: nn.Module) -> str:
    """Return the prefix to write: of diffusers' models by the name of their class."""
    if keys == "diffusers" and "UNet" not in type(model).__name__:
        return "transformer"
    return KEYS[keys].prefixes[0]


def places(prefix: str | None) -> list[tuple[str, str]]:
    """Return all (prefix, joint) with which a file may name layers."""
    if prefix is not None:
        return [(prefix, "_"), (prefix, ".")]
    return [(each, row.joint) for row in KEYS.values() for each in row.prefixes]


def keys_of(names: Iterable[str]) -> tuple[str, str]:
    """Return the row of the table that a file's keys are of, and their prefix."""
    names = list(names)
    for keys, row in KEYS.items():
        for prefix in row.prefixes:
            if all(name.startswith(f"{prefix}{row.joint}") for name in names):
                return keys, prefix
    return "comfy", ""


def is_of_other_part(key: str, joint: str, prefix: str) -> bool:
    """Return whether a key is of another part of a pipeline than that of `prefix`."""
    known = [each for each, own in places(None) if own == joint and each != prefix]
    return key.startswith(tuple(f"{each}{joint}" for each in known))


def split_key(key: str, leaves: Iterable[str]) -> tuple[str, str]:
    """Return a key's stem and the name of its tensor, by LyCORIS's names for LoRA."""
    for leaf in sorted((*leaves, *OTHER_NAMES), key=len, reverse=True):
        if key.endswith(f".{leaf}"):
            return key.removesuffix(f".{leaf}"), OTHER_NAMES.get(leaf, leaf)
    before, _, leaf = key.partition(".")
    return before, leaf
