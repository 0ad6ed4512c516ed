"""PEFT's tuners of designed blocks: GraLoRA, and MiSS with shards of whole columns or of pieces."""

from __future__ import annotations

import functools
from typing import Any

import peft
from hypothesis import strategies as st
from torch import Tensor

import superlora as sl
from tests.reductions.cases import Leaves, Options, Take, options, transposed
from tests.reductions.peft_rows import NAME, peft_row

LINEAR = ("bias", "no-bias")


def gralora_b(blocks: int, term: int, values: Tensor) -> Tensor:
    """PEFT's B is (block of outputs, rank in the order (block of inputs, term), outputs)."""
    own = values.unflatten(1, (blocks, -1))[:, :, term]
    return own.transpose(1, 2).unsqueeze(-1)


def gralora_a(blocks: int, term: int, values: Tensor) -> Tensor:
    """PEFT's A is (block of inputs, inputs, rank in the order (block of outputs, term))."""
    own = values.unflatten(2, (blocks, -1))[..., term]
    return own.permute(2, 0, 1).unsqueeze(1)


def gralora_leaves(layer: Any, model: Any, index: int) -> Leaves:
    blocks, found = layer.gralora_k[NAME], {}
    for term in range(layer.r[NAME] // blocks):
        left, right = (functools.partial(view, blocks, term) for view in (gralora_b, gralora_a))
        found[f"{2 * term}.core"] = Take(layer.gralora_B[NAME], left)
        found[f"{2 * term + 1}.core"] = Take(layer.gralora_A[NAME], right)
    return found


def gralora_config(drawn: Options) -> peft.GraloraConfig:
    return peft.GraloraConfig(
        r=drawn.rank,
        gralora_k=drawn.extra,
        alpha=drawn.alpha,
        fan_in_fan_out=drawn.layer == "conv1d",
    )


def has_blocks(drawn: Options) -> bool:
    sizes = [size for shape in drawn.shapes for size in shape]
    return not any(size % drawn.extra for size in (*sizes, drawn.rank))


def miss_leaves(layer: Any, model: Any, index: int) -> Leaves:
    return {"1.core": Take(layer.miss_block[NAME], transposed)}


def miss_config(drawn: Options, **fields: Any) -> peft.MissConfig:
    return peft.MissConfig(r=drawn.rank, **fields)


def miss_formed(layer: Any, drawn: Options) -> Tensor:
    """PEFT adds the shards to the weight itself, in place where they do not divide it."""
    weight = layer.get_base_layer().weight.detach()
    return layer.get_delta_weight_miss(NAME, weight.clone()) - weight


def has_shards(drawn: Options) -> bool:
    return not any(columns % drawn.rank or rows % drawn.extra for rows, columns in drawn.shapes)


ROWS = [
    peft_row(
        f"gralora-peft{'-conv1d' * (layers != LINEAR)}",
        gralora_config,
        lambda drawn: sl.gralora(drawn.rank, drawn.extra, alpha=drawn.alpha),
        gralora_leaves,
        options(
            sizes=st.sampled_from([4, 6, 8, 12]),
            rank=st.sampled_from([2, 3, 4, 6, 8]),
            extra=st.sampled_from([1, 2, 3, 4]),
            layers=layers,
            fits=has_blocks,
        ),
        Options(((6, 8), (4, 10), (8, 6)), 4, extra=2, layer=layers[0]),
    )
    for layers in (LINEAR, ("conv1d",))
]
shards = options(
    sizes=st.sampled_from([4, 6, 8, 12]),
    rank=st.sampled_from([1, 2, 3, 4]),
    extra=st.sampled_from([1, 2, 3]),
    layers=LINEAR,
    fits=has_shards,
)
ROWS += [
    peft_row(
        "miss-peft",
        miss_config,
        lambda drawn: sl.miss(drawn.rank),
        miss_leaves,
        shards,
        Options(((6, 8), (9, 4), (10, 12)), 4),
        formed=miss_formed,
    ),
    peft_row(
        "miss-peft-mini",
        lambda drawn: miss_config(drawn, init_weights="mini", mini_r=drawn.extra),
        lambda drawn: sl.miss(drawn.rank, mini=drawn.extra),
        miss_leaves,
        shards,
        Options(((6, 8), (9, 4), (12, 12)), 4, extra=3),
        formed=miss_formed,
    ),
]
