"""Adapters of other libraries: a layer's tensors as blocks, put together as one adapter."""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from superlora.errors import some
from superlora.plan import Plan
from superlora.spec import Spec
from superlora.torch.adapter import Adapter
from superlora.torch.attach import check_free, frozen_of, host_of, placed, register
from superlora.torch.replaced import refuse_unfit
from superlora.torch.state import find_layers
from superlora.torch.targets import is_named

# A matrix, or the two whose product it is: (output, r) and (r, input).
Matrix = tuple[Tensor, ...]
# The names of the tensors of a layer's matrices, and for each method the forms that it has.
Form = tuple[tuple[str, ...], ...]
Forms = Mapping[str, Sequence[Form]]
# Those that PEFT and LyCORIS share.
COMMON_FORMS: Forms = {
    "loha": [(("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"))],
    "lokr": [
        (first, second)
        for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    ],
}


@dataclass
class LayerUpdate:
    """What a file says of one layer.

    Attributes
    ----------
    fields : dict of str to Any
        The fields of its spec.
    blocks : dict of str to torch.Tensor
        ``"split.block"`` and values.
    shape : tuple of (int, int)
        Output and input width.
    """

    fields: dict[str, Any]
    blocks: dict[str, Tensor]
    shape: tuple[int, int]


@dataclass
class Foreign:
    """An adapter as another library's files describe it.

    Attributes
    ----------
    source : pathlib.Path
        Where it was read.
    updates : dict of str to LayerUpdate
        By the layer's dotted name.
    replaced : dict of str to torch.Tensor
        New values of the model's own parameters.
    """

    source: Path
    updates: dict[str, LayerUpdate]
    replaced: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Layer:
    """One layer's update in a form that another library has.

    Attributes
    ----------
    method : str
        ``"lora"``, ``"lokr"``, ``"loha"`` or ``"full"``.
    parts : tuple of Matrix
        One pair (output, r) and (r, input) for LoRA; the two factors of LoKr; two pairs
        for LoHa; the update itself for full.
    scale : float
        The number in front.
    """

    method: str
    parts: tuple[Matrix, ...]
    scale: float

    @property
    def rank(self) -> int:
        """The inner dimension of the last product; 0 where there is none."""
        return self.parts[-1][0].shape[1] if len(self.parts[-1]) == 2 else 0

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Output and input width of every matrix."""
        return tuple((part[0].shape[0], part[-1].shape[1]) for part in self.parts)

    @property
    def shape(self) -> tuple[int, int]:
        """Output and input width of the update."""
        if self.method != "lokr":
            return self.sizes[0]
        rows, columns = zip(*self.sizes, strict=True)
        return math.prod(rows), math.prod(columns)


def names_of(forms: Sequence[Form]) -> list[set[str]]:
    """Return all tensors of each form."""
    return [set(itertools.chain(*form)) for form in forms]


def parts_of(found: Mapping[str, Tensor], forms: Sequence[Form]) -> tuple[Matrix, ...]:
    """Return a layer's matrices, or refuse others such as those of a convolution."""
    form = forms[names_of(forms).index(set(found))]
    wrong = [f"{leaf} of shape {tuple(t.shape)}" for leaf, t in found.items() if t.dim() != 2]
    if wrong:
        raise ValueError(f"must have matrices: got {some(wrong)}")
    return tuple(tuple(found[name] for name in matrix) for matrix in form)


def named(forms: Forms, layer: Layer) -> dict[str, Tensor]:
    """Return a layer's tensors by their names in a file."""
    lengths = list(map(len, layer.parts))
    form = next(form for form in forms[layer.method] if list(map(len, form)) == lengths)
    names, tensors = itertools.chain(*form), itertools.chain(*layer.parts)
    return dict(zip(names, tensors, strict=True))


def rank_of(parts: Iterable[Matrix]) -> int | None:
    """Return the inner width that products have in common, None if there is no product."""
    pairs = [part for part in parts if len(part) == 2]
    ranks = {size for left, right in pairs for size in (left.shape[1], right.shape[0])}
    if len(ranks) > 1:
        raise ValueError(f"must have one rank: got {sorted(ranks)}")
    return next(iter(ranks), None)


def update_of(method: str, parts: tuple[Matrix, ...], **fields: Any) -> LayerUpdate:
    """Return the update that the matrices of a `Layer` make; fields say its scale."""
    layer = Layer(method, parts, 1.0)
    if method == "full":
        values = parts[0][0].flatten()
        return LayerUpdate({"rank": "full", "order": 1}, {"0.core": values}, layer.shape)
    blocks = {}
    for split, part in enumerate(parts):
        if len(part) == 1:
            blocks[f"{split}.core"] = part[0]
        else:
            blocks[f"{split}.factor0"], blocks[f"{split}.factor1"] = part[0], part[1].t()
    fields |= {"splits": len(parts), "dense_from": "never", "rank": rank_of(parts)}
    if method == "lokr":
        fields["rank"] = tuple(part[0].shape[1] if len(part) == 2 else "full" for part in parts)
        fields["fold"] = layer.sizes
    elif method == "loha":
        fields["combine"] = "hadamard"
        if layer.sizes[0] != layer.sizes[1]:
            raise ValueError(
                f"must have two products of one shape: got {layer.sizes[0]} and {layer.sizes[1]}"
            )
    return LayerUpdate(fields, blocks, layer.shape)


def attach_foreign(model: nn.Module, foreign: Foreign, name: str) -> Adapter:
    """Attach an adapter that another library wrote.

    Parameters
    ----------
    model : torch.nn.Module
        The model it was made for.
    foreign : Foreign
        What the files say.
    name : str
        The attribute of `model` under which the adapter is registered.

    Returns
    -------
    Adapter
        Whose file and merge are those of any other adapter.

    Raises
    ------
    AdapterError
        If `model` has an attribute of that name, or a weight lies on the meta device.
    ValueError
        If layers are missing or of other shapes: they are listed, and nothing is attached.
    """
    shapes = {layer: update.shape for layer, update in foreign.updates.items()}
    plan = Plan(_spec_of(foreign.updates), shapes)
    modules = find_layers(model, plan.layout.layers, foreign.source)
    check_free(model, host_of(model, modules), name)
    refuse_unfit(model, foreign.replaced, foreign.source)
    factors = frozen_of(plan, modules)
    for layer, update in foreign.updates.items():
        group = plan.layout.grouping.pieces[layer][0].group
        for block, values in update.blocks.items():
            split, _, leaf = block.partition(".")
            own = plan.layout.block(group, int(split), leaf)
            whole = tuple(slice(size) for size in plan.layout.block_shapes[own])
            factors[own] = values[whole].contiguous()
    kinds = {
        values.dtype for update in foreign.updates.values() for values in update.blocks.values()
    }
    dtype = functools.reduce(torch.promote_types, kinds, torch.float32)
    blocks = placed(plan, modules, factors, dtype)
    return register(model, plan, modules, blocks, name, replaced=foreign.replaced)


def _spec_of(updates: Mapping[str, LayerUpdate]) -> Spec:
    """Return a spec of the fields most layers have, with overrides for the others."""
    kinds: dict[str, list[str]] = {}
    for layer, update in updates.items():
        kinds.setdefault(json.dumps(update.fields, sort_keys=True, default=repr), []).append(layer)
    by_kind = {key: updates[layers[0]].fields for key, layers in kinds.items()}
    # Scales are in proportion to that of the spec, which must not be 0 where another is not.
    common = max(kinds, key=lambda key: (Spec(**by_kind[key]).scaling != 0, len(kinds[key])))
    spec = Spec(**by_kind[common])
    overrides = {}
    for key, layers in kinds.items():
        if key != common:
            plain = Spec(**by_kind[key])
            changes = {
                item: getattr(plain, item)
                for item in plain.__dataclass_fields__
                if getattr(plain, item) != getattr(spec, item)
            }
            overrides[_pattern(layers, updates)] = changes
    return spec.replace(overrides=overrides)


def _pattern(layers: Sequence[str], everything: Iterable[str]) -> str:
    """Return a pattern that matches these layers and no others, short where that can be."""
    wanted = set(layers)
    for count in (1, 2):
        ends = dict.fromkeys(".".join(layer.split(".")[-count:]) for layer in layers)
        if {layer for layer in everything if is_named(layer, ends)} == wanted:
            return "|".join(map(re.escape, ends))
    return "^(?:" + "|".join(map(re.escape, layers)) + ")"


def refuse(source: object, problems: list[str]) -> None:
    """Raise with all that is wrong with a file, if anything is."""
    if problems:
        raise ValueError(f"{source} cannot be read: {some(problems, 20)}")
