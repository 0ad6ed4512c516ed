"""A module for each tensor of a checkpoint, by its name and shape, in the place of the model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from superlora.errors import some
from superlora.torch.layers import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS

# Embeddings and output heads by their layers' names, of transformers, timm and diffusers.
EMBEDDING = re.compile(
    r"embed(ding)?s?(_|$)|embeddings?$|^wte$|^wpe$|^shared$|relative_attention_bias", re.IGNORECASE
)
HEAD = re.compile(
    r"^(lm_head|embed_out|output_projection|score|classifier|qa_outputs|head|cls|predictions|"
    r"decoder_head|seq_relationship|pre_classifier)$"
)


class Conv1D(nn.Module):
    """A layer whose weight is stored (input, output), as transformers has it for GPT-2."""

    __module__ = "transformers.pytorch_utils"  # by which it is known


class Skeleton(nn.Module):
    """The root of a tree of modules that stands for a model."""

    def get_output_embeddings(self) -> list[nn.Module]:
        """Return the heads, by their names."""
        return [
            module
            for name, module in self.named_modules()
            if HEAD.search(name.rpartition(".")[2]) and "weight" in module._parameters
        ]


def skeleton(
    tensors: Mapping[str, Tensor],
    transposed: Collection[str] = (),
    shared: Mapping[str, Iterable[str]] | None = None,
) -> nn.Module:
    """Return modules with these tensors as their parameters, of the kinds that names say."""
    # "x.weight" of two axes is the weight of a linear layer, or of an embedding if x is named like
    # one; of one axis that of a norm, of more that of a convolution. Any other name is a bare
    # parameter's. Of `transposed` layers the weight has the inputs first.
    held: dict[str, dict[str, Tensor]] = {"": {}}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        held.setdefault(path, {})[leaf] = tensor
    turned = {
        name if f"{name}.weight" in tensors else name.rpartition(".")[0] for name in transposed
    }
    root = _module("", held[""], "" in turned) if "weight" in held[""] else Skeleton()
    for path in sorted(held, key=_in_depth):
        parent = root
        *above, last = path.split(".") if path else [""]
        for part in above:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        module = root
        if path:
            module = _module(last, held[path], path in turned)
            parent.add_module(last, module)
        for leaf, tensor in held[path].items():
            if tensor.is_floating_point():
                module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            else:
                module._buffers[leaf] = tensor
    for name, others in (shared or {}).items():
        path, _, leaf = name.rpartition(".")
        for other in others:
            place, _, own = other.rpartition(".")
            found = root
            for part in place.split(".") if place else ():
                if part not in found._modules:
                    found.add_module(part, nn.Module())
                found = found.get_submodule(part)
            found._parameters[own] = root.get_submodule(path)._parameters[leaf]
    return root


def _in_depth(path: str) -> list[tuple[int, str]]:
    """Return by what names are sorted: layer 2 before layer 10, which files have it after."""
    return [(int(own) if own.isdecimal() else 0, own) for own in path.split(".")]


def _module(name: str, held: Mapping[str, Tensor], turned: bool) -> nn.Module:
    """Return the module that has such tensors."""
    weight = held.get("weight")
    if weight is None or weight.dim() in (0, 1) or weight.dim() > 5:
        module = nn.Module()
        module.is_transposed = turned  # type: ignore[assignment]
        return module
    with torch.device("meta"):
        if weight.dim() == 2 and turned:
            return Conv1D()
        if weight.dim() == 2 and EMBEDDING.search(name):
            return nn.Embedding(weight.shape[0], weight.shape[1], _weight=weight)
        if weight.dim() == 2:
            return nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in held)
        out, in_, *window = weight.shape
        kinds = TRANSPOSED_CONVOLUTIONS if turned else CONVOLUTIONS
        kind: Any = kinds[len(window) - 1]
        sizes = (out, in_) if turned else (in_, out)
        found: nn.Module = kind(*sizes, tuple(window), bias="bias" in held)
        return found


def prefix_between(wanted: Iterable[str], names: Collection[str], where: object) -> tuple[str, str]:
    """Return what names of a file begin with that a model's do not, and the other way round."""
    wanted = list(wanted)  # layers or parameters of the model
    first = wanted[0]
    places: dict[tuple[str, str], None] = {("", ""): None}
    for leaf in (first, f"{first}.weight".lstrip(".")):
        for name in names:
            if name.endswith(f".{leaf}"):
                places[name.removesuffix(leaf), ""] = None
    parts = first.split(".")
    for count in range(1, len(parts)):
        places["", ".".join(parts[:count]) + "."] = None

    def missing(place: tuple[str, str]) -> list[str]:
        more, less = place
        own = [(name, more + name.removeprefix(less)) for name in wanted]
        return [
            name
            for name, found in own
            if not name.startswith(less) or (found not in names and f"{found}.weight" not in names)
        ]

    lacks = {place: missing(place) for place in places}
    fits = [place for place, lack in lacks.items() if not lack]
    if fits[:1] == [("", "")] or len(fits) == 1:
        return fits[0]
    if fits:
        raise ValueError(
            f"layers of the adapter must be those of {where} in one way: {first!r} can be "
            f"{some(repr(more + first.removeprefix(less)) for more, less in fits)}"
        )
    least = min(lacks.values(), key=len)
    raise ValueError(
        f"{where} must have the layers and parameters of the adapter: it lacks "
        f"{some(map(repr, least), 20)}"
    )
