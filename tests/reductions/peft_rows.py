"""PEFT's tuners, made by ``get_peft_model``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
from hypothesis import strategies as st
from peft.optimizers import create_lorafa_optimizer
from peft.tuners.lokr.layer import factorization
from torch import Tensor, nn

import superlora as sl
from tests.reductions.cases import (
    Case,
    Leaves,
    Options,
    Row,
    Take,
    TorchPeer,
    fill,
    make_net,
    options,
    transposed,
)

NAME = "default"


def adapt(drawn: Options, config: Any) -> tuple[nn.Module, Any]:
    """Return the model and what PEFT makes of a copy of it, with values of no symmetry."""
    net = make_net(drawn)
    config.target_modules = set(drawn.keys)
    model = peft.get_peft_model(copy.deepcopy(net), config).double()
    fill((p for p in model.parameters() if p.requires_grad), drawn.seed + 100)
    return net, model


def peft_row(
    name: str,
    config: Callable[[Options], Any],
    spec: Callable[[Options], sl.Spec],
    leaves: Callable[[Any, Any, int], Leaves],
    drawn: st.SearchStrategy[Options],
    example: Options,
    *,
    finish: Callable[[Any, Options], object] = lambda model, drawn: None,
    refine: Callable[[sl.Spec, Any, Options], sl.Spec] = lambda spec, model, drawn: spec,
    formed: Callable[[Any, Options], Tensor] | None = None,
    tolerance: float = 1e-11,
) -> Row:
    """Make a row of one of PEFT's configurations; `refine` adds what PEFT has drawn."""
    forms = _formed if formed is None else formed

    def build(drawn: Options) -> Case:
        net, model = adapt(drawn, config(drawn))
        finish(model, drawn)
        layers = {key: model.base_model.model.get_submodule(key) for key in drawn.widths}
        found = {
            key: leaves(layer, model, index) for index, (key, layer) in enumerate(layers.items())
        }
        updates = {key: forms(layer, drawn) for key, layer in layers.items()}
        trained = [p for p in model.parameters() if p.requires_grad]
        own = refine(spec(drawn), model, drawn)
        return Case(drawn, net, own, TorchPeer(model, trained, found, updates), tolerance)

    return Row(name, build, drawn, example)


def _formed(layer: Any, drawn: Options) -> Tensor:
    delta = layer.get_delta_weight(NAME)
    return delta.T if drawn.layer == "conv1d" else delta


def lora_leaves(layer: Any, model: Any, index: int) -> Leaves:
    return {
        "0.factor0": Take(layer.lora_B[NAME].weight),
        "0.factor1": Take(layer.lora_A[NAME].weight, transposed),
    }


def adalora_leaves(layer: Any, model: Any, index: int) -> Leaves:
    return {
        "0.core": Take(layer.lora_E[NAME], lambda values: values.squeeze(1)),
        "0.factor0": Take(layer.lora_B[NAME]),
        "0.factor1": Take(layer.lora_A[NAME], transposed),
    }


def fix_ranks(model: Any, drawn: Options) -> None:
    """Give back the ranks, which PEFT marks as trainable though they count what is not pruned."""
    for name, parameter in model.named_parameters():
        if "ranknum" in name:
            parameter.requires_grad_(False).fill_(drawn.rank)


def lokr_leaves(layer: Any, model: Any, index: int) -> Leaves:
    found: Leaves = {}
    for split, key in enumerate(("lokr_w1", "lokr_w2")):
        whole = getattr(layer, key)
        if NAME in whole:
            found[f"{split}.core"] = Take(whole[NAME])
        else:
            found[f"{split}.factor0"] = Take(getattr(layer, f"{key}_a")[NAME])
            found[f"{split}.factor1"] = Take(getattr(layer, f"{key}_b")[NAME], transposed)
    return found


def loha_leaves(layer: Any, model: Any, index: int) -> Leaves:
    return {
        "0.factor0": Take(layer.hada_w1_a[NAME]),
        "0.factor1": Take(layer.hada_w1_b[NAME], transposed),
        "1.factor0": Take(layer.hada_w2_a[NAME]),
        "1.factor1": Take(layer.hada_w2_b[NAME], transposed),
    }


def vera_leaves(layer: Any, model: Any, index: int) -> Leaves:
    return {
        "0.core": Take(layer.vera_lambda_d[NAME]),
        "0.factor0": Take(layer.vera_B[NAME]),
        "0.factor1": Take(layer.vera_A[NAME], transposed),
        "1.factor0": Take(layer.vera_lambda_b[NAME], lambda b: b.unsqueeze(1)),
    }


def tinylora_leaves(layer: Any, model: Any, index: int) -> Leaves:
    vectors = list(model.base_model.tinylora_v[NAME].values())
    return {
        "0.core": Take(layer.tinylora_P[NAME]),
        "0.factor0": Take(vectors[min(index, len(vectors) - 1)], lambda v: v.unsqueeze(0)),
        "0.factor1": Take(layer.tinylora_B[NAME]),
        "0.factor2": Take(layer.tinylora_A[NAME], transposed),
    }


def lora_config(drawn: Options, **fields: Any) -> peft.LoraConfig:
    stored_transposed = drawn.layer == "conv1d"
    return peft.LoraConfig(
        r=drawn.rank, lora_alpha=drawn.alpha, fan_in_fan_out=stored_transposed, **fields
    )


def lokr_config(drawn: Options, **fields: Any) -> peft.LoKrConfig:
    return peft.LoKrConfig(r=drawn.rank, alpha=drawn.alpha, **fields)


def patterned(drawn: Options) -> peft.LoraConfig:
    return lora_config(drawn, rank_pattern={"b": drawn.extra}, alpha_pattern={"b": 7.0})


def overridden(drawn: Options) -> sl.Spec:
    changes = {"b": {"rank": drawn.extra, "alpha": 7.0}}
    return sl.lora(drawn.rank, alpha=drawn.alpha, overrides=changes)


def is_ascending(drawn: Options) -> bool:
    """Whether PEFT puts the smaller divisor first, as LyCORIS and superlora always do."""
    pairs = [factorization(size, drawn.extra) for shape in drawn.shapes for size in shape]
    return all(small <= large for small, large in pairs)


def folded(drawn: Options) -> sl.Spec:
    """Say PEFT's own factorisation, which puts the factor first even where it is the larger.

    Of 128 by factor 16 PEFT makes 16 x 8 where LyCORIS and ``superlora.lokr`` make 8 x 16.
    """
    folds = {}
    for key, (rows, columns) in zip(drawn.keys, drawn.shapes, strict=True):
        outputs, inputs = factorization(rows, drawn.extra), factorization(columns, drawn.extra)
        folds[key] = {"fold": tuple(zip(outputs, inputs, strict=True))}
    return sl.lokr(drawn.rank, alpha=drawn.alpha, overrides=folds)


def has_product(drawn: Options, factor: int = -1) -> bool:
    """Whether no weight has a 1 x 1 first split, which peers allow and superlora refuses."""
    firsts = [[min(factorization(size, factor)) for size in shape] for shape in drawn.shapes]
    return [1, 1] not in firsts


def has_factor(drawn: Options) -> bool:
    return has_product(drawn, drawn.extra)


LINEAR, CONV1D = ("bias", "no-bias"), ("conv1d",)
UNEQUAL = ((6, 8), (9, 4), (10, 12))
kronecker_sizes = st.sampled_from([4, 6, 7, 8, 9, 12, 16, 18])
# Up to ranks from which the second split, then also the first, is dense.
kronecker = options(sizes=kronecker_sizes, rank=st.integers(1, 7), fits=has_product)
factors = st.sampled_from([2, 3, 4, 8])

ROWS = [
    peft_row(
        f"lora-peft{'-conv1d' * (layers == CONV1D)}",
        lora_config,
        lambda drawn: sl.lora(drawn.rank, alpha=drawn.alpha),
        lora_leaves,
        options(layers=layers),
        Options(UNEQUAL, 3, layer=layers[0]),
    )
    for layers in (LINEAR, CONV1D)
]
ROWS += [
    peft_row(
        "lora-peft-rslora",
        lambda drawn: lora_config(drawn, use_rslora=True),
        lambda drawn: sl.lora(drawn.rank, alpha=drawn.alpha, rslora=True),
        lora_leaves,
        options(layers=LINEAR + CONV1D),
        Options(UNEQUAL, 3),
    ),
    peft_row(
        "lora-peft-patterns",
        patterned,
        overridden,
        lora_leaves,
        options(
            count=st.just(3),
            extra=st.integers(1, 2),
            layers=LINEAR + CONV1D,
            fits=lambda drawn: drawn.extra <= min(drawn.shapes[1]),
        ),
        Options(UNEQUAL, 3, extra=2),
    ),
    peft_row(
        "lora_fa-peft",
        lora_config,
        lambda drawn: sl.lora_fa(drawn.rank, alpha=drawn.alpha),
        lora_leaves,
        options(rank=st.integers(1, 12)),  # A is not trained, nor B A dense, at any rank
        Options(UNEQUAL, 3),
        finish=lambda model, drawn: create_lorafa_optimizer(model, drawn.rank, drawn.alpha, 0.1),
    ),
    peft_row(
        "lokr-peft",
        lokr_config,
        lambda drawn: sl.lokr(drawn.rank, alpha=drawn.alpha),
        lokr_leaves,
        kronecker,
        Options(((16, 18), (9, 12)), 2),
    ),
    peft_row(
        "lokr-peft-decompose_both",
        lambda drawn: lokr_config(drawn, decompose_both=True),
        lambda drawn: sl.lokr(drawn.rank, True, alpha=drawn.alpha),
        lokr_leaves,
        kronecker,
        Options(((30, 42), (12, 9)), 2),
    ),
    peft_row(
        "lokr-peft-decompose_factor",
        lambda drawn: lokr_config(drawn, decompose_factor=drawn.extra),
        lambda drawn: sl.lokr(drawn.rank, factor=drawn.extra, alpha=drawn.alpha),
        lokr_leaves,
        options(
            sizes=kronecker_sizes,
            rank=st.integers(1, 7),
            extra=factors,
            fits=lambda drawn: has_factor(drawn) and is_ascending(drawn),
        ),
        Options(((16, 18), (12, 9)), 2, extra=3),
    ),
    peft_row(
        "lokr-peft-decompose_factor-descending",
        lambda drawn: lokr_config(drawn, decompose_factor=drawn.extra),
        folded,
        lokr_leaves,
        options(
            sizes=st.sampled_from([8, 12, 16, 24]),
            rank=st.integers(1, 7),
            extra=st.sampled_from([4, 6]),
            fits=lambda drawn: not is_ascending(drawn),
        ),
        Options(((128, 48), (12, 128)), 2, extra=16),
    ),
    peft_row(
        "loha-peft",
        lambda drawn: peft.LoHaConfig(r=drawn.rank, alpha=drawn.alpha),
        lambda drawn: sl.loha(drawn.rank, alpha=drawn.alpha),
        loha_leaves,
        options(),
        Options(UNEQUAL, 2),
        tolerance=3e-7,  # PEFT keeps this scale as a float32 number
    ),
]
ROWS += [
    peft_row(
        f"vera-peft{'-conv1d' * (layers == CONV1D)}",
        lambda drawn: peft.VeraConfig(
            r=drawn.rank, fan_in_fan_out=drawn.layer == "conv1d", d_initial=0.3
        ),
        lambda drawn: sl.vera(drawn.rank),
        vera_leaves,
        options(layers=layers, count=st.integers(2, 3), rank=st.integers(1, 20)),
        Options(UNEQUAL, 3, layer=layers[0]),
    )
    for layers in (LINEAR, CONV1D)
]


def tinylora_row(name: str, tying: float, layers: tuple[str, ...], **fields: Any) -> Row:
    return peft_row(
        name,
        lambda drawn: peft.TinyLoraConfig(
            r=drawn.rank,
            u=drawn.extra,
            weight_tying=tying,
            fan_in_fan_out=drawn.layer == "conv1d",
        ),
        lambda drawn: sl.tinylora(drawn.rank, drawn.extra, **fields),
        tinylora_leaves,
        options(layers=layers, extra=st.integers(1, 6), count=st.just(3)),
        Options(UNEQUAL, 2, extra=5, layer=layers[0]),
    )


# No preset: AdaLoRA's form before it prunes ranks, whose sum it divides by with 1e-5 added.
ROWS.append(
    peft_row(
        "adalora-peft",
        lambda drawn: peft.AdaLoraConfig(
            init_r=drawn.rank, lora_alpha=drawn.alpha, total_step=10, tfinal=2
        ),
        lambda drawn: sl.Spec(
            rank=drawn.rank, core="diagonal", scale=drawn.alpha / (drawn.rank + 1e-5)
        ),
        adalora_leaves,
        options(),
        Options(UNEQUAL, 3),
        finish=fix_ranks,
        tolerance=3e-7,  # PEFT keeps that sum as a float32 number
    )
)
if hasattr(peft, "TinyLoraConfig"):
    tied = {"tied": ("0.factor0",)}
    ROWS += [
        tinylora_row("tinylora-peft", 0.0, LINEAR),
        tinylora_row("tinylora-peft-conv1d", 0.0, CONV1D),
        tinylora_row("tinylora-peft-tied", 1.0, LINEAR, **tied),
        tinylora_row("tinylora-peft-tied-conv1d", 1.0, CONV1D, **tied),
        # One vector for the first layer and one for the others, which any override tells apart.
        tinylora_row(
            "tinylora-peft-partly_tied", 0.34, LINEAR, **tied, overrides={"a": {"seed": 1}}
        ),
    ]
