"""Adapters of other libraries: each layer's tensors as blocks, put together as one adapter."""

from __future__ import annotations

import functools
import json
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
from superlora.torch.layers import is_adaptable, shape_of
from superlora.torch.replaced import refuse_unfit
from superlora.torch.state import find_layers
from superlora.torch.targets import is_named
from superlora.torch.walk import module_of

# The names of a layer's tensors that PEFT and LyCORIS share.
LOHA_FORMS = ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},)
LOKR_FORMS = tuple(
    {*first, *second}
    for first in (["lokr_w1"], ["lokr_w1_a", "lokr_w1_b"])
    for second in (["lokr_w2"], ["lokr_w2_a", "lokr_w2_b"])
)
# A matrix, or the two whose product it is.
Matrix = tuple[Tensor, ...]


@dataclass
class LayerUpdate:
    """What a file says of one layer.

    Attributes
    ----------
    fields : dict of str to Any
        The fields of its spec.
    blocks : dict of str to torch.Tensor
        ``"split.block"`` and values.
    shape : tuple of (int, int or None)
        Output and input width that the tensors have; None where they do not say it.
    """

    fields: dict[str, Any]
    blocks: dict[str, Tensor]
    shape: tuple[int, int | None]


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


def factors_of(found: Mapping[str, Tensor], stem: str) -> tuple[Matrix, Matrix]:
    """Return both matrices of a LoKr or a LoHa, by the names that PEFT and LyCORIS share.

    Parameters
    ----------
    found : mapping of str to torch.Tensor
        The layer's tensors.
    stem : str
        ``"lokr_w"`` or ``"hada_w"``.

    Returns
    -------
    pair of Matrix
        Each one matrix, or the two whose product it is.
    """
    first, second = (
        (found[name],) if name in found else (found[f"{name}_a"], found[f"{name}_b"])
        for name in (f"{stem}1", f"{stem}2")
    )
    return first, second


def rank_of(*matrices: Matrix) -> int | None:
    """Return the inner dimension that products have in common, None if there is no product.

    Parameters
    ----------
    *matrices : Matrix
        (output, r) and (r, input) each, or one matrix.

    Returns
    -------
    int or None
        r.

    Raises
    ------
    ValueError
        If they have several.
    """
    pairs = [matrix for matrix in matrices if len(matrix) == 2]
    ranks = {size for left, right in pairs for size in (left.shape[1], right.shape[0])}
    if len(ranks) > 1:
        raise ValueError(f"must have one rank: got {sorted(ranks)}")
    return next(iter(ranks), None)


def check_matrices(found: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not matrices, such as those of a convolution.

    Parameters
    ----------
    found : mapping of str to torch.Tensor
        The layer's tensors.

    Raises
    ------
    ValueError
        If one has not two dimensions; all are listed.
    """
    wrong = [f"{leaf} of shape {tuple(t.shape)}" for leaf, t in found.items() if t.dim() != 2]
    if wrong:
        raise ValueError(f"must have matrices: got {some(wrong)}")


def lora_update(up: Tensor, down: Tensor, **fields: Any) -> LayerUpdate:
    """Return the update ``up @ down``, (output, r) times (r, input)."""
    return LayerUpdate(
        {"rank": rank_of((up, down)), "dense_from": "never", **fields},
        {"0.factor0": up, "0.factor1": down.t()},
        (up.shape[0], down.shape[1]),
    )


def loha_update(first: Matrix, second: Matrix, **fields: Any) -> LayerUpdate:
    """Return the Hadamard product of two products.

    Parameters
    ----------
    first, second : Matrix
        (output, r) and (r, input) each.
    **fields : Any
        Other fields of the layer's spec.

    Returns
    -------
    LayerUpdate
        Of two splits.

    Raises
    ------
    ValueError
        If their shapes differ.
    """
    rank = rank_of(first, second)
    shape, other = ((left.shape[0], right.shape[1]) for left, right in (first, second))
    if shape != other:
        raise ValueError(f"must have two products of one shape: got {shape} and {other}")
    common = {"rank": rank, "splits": 2, "combine": "hadamard", "dense_from": "never"}
    blocks = {}
    for split, (left, right) in enumerate((first, second)):
        blocks[f"{split}.factor0"], blocks[f"{split}.factor1"] = left, right.t()
    return LayerUpdate({**common, **fields}, blocks, shape)


def lokr_update(first: Matrix, second: Matrix, **fields: Any) -> LayerUpdate:
    """Return the Kronecker product of two matrices, each dense or a product."""
    blocks: dict[str, Tensor] = {}
    ranks: list[int | str] = []
    fold = []
    for split, parts in enumerate((first, second)):
        fold.append((parts[0].shape[0], parts[-1].shape[1]))
        if len(parts) == 1:
            ranks.append("full")
            blocks[f"{split}.core"] = parts[0]
        else:
            ranks.append(parts[0].shape[1])
            blocks[f"{split}.factor0"], blocks[f"{split}.factor1"] = parts[0], parts[1].t()
    common = {"rank": tuple(ranks), "splits": 2, "fold": tuple(fold), "dense_from": "never"}
    shape = (fold[0][0] * fold[1][0], fold[0][1] * fold[1][1])
    return LayerUpdate({**common, **fields}, blocks, shape)


def dense_update(difference: Tensor) -> LayerUpdate:
    """Return the update that is a matrix itself."""
    shape = (difference.shape[0], difference.shape[1])
    return LayerUpdate({"rank": "full", "order": 1}, {"0.core": difference.reshape(-1)}, shape)


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
    plan = Plan(_spec_of(foreign.updates), _shapes_of(model, foreign))
    modules = find_layers(model, plan, foreign.source)
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


def _shapes_of(model: nn.Module, foreign: Foreign) -> dict[str, tuple[int, int]]:
    """Return the shapes that the tensors say, the input width by the model where they do not."""
    shapes = {}
    for layer, update in foreign.updates.items():
        rows, columns = update.shape
        if columns is None:
            module = module_of(model, layer)
            columns = 1
            if module is not None and is_adaptable(module):
                columns = shape_of(module)[1]
        shapes[layer] = (rows, columns)
    return shapes


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
    """Raise with all that is wrong with a file, if anything is.

    Parameters
    ----------
    source : object
        The file.
    problems : list of str
        What is wrong.

    Raises
    ------
    ValueError
        If there is any problem.
    """
    if problems:
        raise ValueError(f"{source} cannot be read: {some(problems, 20)}")
