"""Designs of merge operations, and what they do to a layer in plain matrix algebra."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import superlora as sl
import superlora.torch as slt
from superlora import maps
from tests.torch.helpers import fill, make_net

TARGETS = ["q", "v", "o"]


def vector(along: str, **fields: Any) -> sl.Spec:
    return sl.dense(map=maps.Broadcast(along=along), **fields)


_LOW = sl.lora(2, alpha=3)
# Every operation alone, in the forms that take a path of their own, and the presets.
DESIGNS: dict[str, dict[Any, Any]] = {
    "add_weight": {"add_weight": _LOW},
    "add_weight dense": {"add_weight": sl.dense(scale=0.7)},
    "add_weight along inputs": {"add_weight": vector("inputs", scale=0.7)},
    "add_weight along outputs": {"add_weight": vector("outputs")},
    "add_weight along all": {"add_weight": vector("all")},
    "scale_weight": {"scale_weight": _LOW},
    "scale_weight dense": {"scale_weight": sl.dense(scale=0.7)},
    "scale_weight along inputs": {"scale_weight": vector("inputs", scale=0.7)},
    "scale_weight along outputs": {"scale_weight": vector("outputs", scale=0.7)},
    "scale_weight along all": {"scale_weight": vector("all")},
    "right_weight": {"right_weight": _LOW},
    "right_weight dense": {"right_weight": sl.dense(scale=0.7)},
    "left_weight": {"left_weight": _LOW},
    "left_weight dense": {"left_weight": sl.dense()},
    "weight_to_bias": {"weight_to_bias": sl.dense(scale=0.7)},
    "weight_to_bias of a rank": {"weight_to_bias": sl.lora(2, alpha=3, dense_from="never")},
    "scale_bias": {"scale_bias": sl.dense(scale=0.7)},
    "scale_bias along all": {"scale_bias": vector("all")},
    "add_bias": {"add_bias": sl.dense(scale=0.7)},
    "add_bias along all": {"add_bias": vector("all")},
    "glora": sl.glora(2),
    "glora, two": sl.glora(2, scale_weight="vector", add_weight="constant", scale_bias="none"),
    "glora, matrix": sl.glora(2, product="matrix", scale_bias="constant"),
    "bitfit": sl.bitfit(),
    "ssf": sl.ssf(),
    "ia3": sl.ia3(inputs=["o"]),
    "repadapter": sl.repadapter(2, scale=0.7),
    "prompt_add": sl.prompt_add(),
    "all": {
        "left_weight": sl.lora(1, scale=-0.5),
        "add_weight": sl.lokr(1, scale=0.7),
        "right_weight": _LOW,
        "scale_weight": vector("outputs", scale=0.7),
        "add_bias": sl.dense(),
        "scale_bias": sl.dense(scale=0.7),
        "weight_to_bias": sl.dense(),
    },
    "bias in one group": {
        "scale_weight": _LOW,
        ("weight_to_bias", "scale_bias", "add_bias"): sl.dense(
            groups=1, map=maps.Fastfood(), size=7
        ),
    },
}
# Nothing is left of these where no layer has a bias.
OF_A_BIAS = ("scale_bias", "scale_bias along all")
PAIRS = [
    pytest.param(key, layer, id=f"{key}-{layer}")
    for key in DESIGNS
    for layer in ("bias", "no-bias", "conv1d")
    if layer != "no-bias" or key not in OF_A_BIAS
]
every_pair = pytest.mark.parametrize(("key", "layer"), PAIRS)
every_design = pytest.mark.parametrize("key", DESIGNS)
# One of every way in which the forward pass goes.
SOME = (
    "glora",
    "glora, matrix",
    "scale_weight along inputs",
    "scale_weight along outputs",
    "left_weight",
    "add_weight along inputs",
    "ssf",
    "all",
    "bias in one group",
)
some_designs = pytest.mark.parametrize("key", SOME)


def make_model(layer: str = "bias", **options: Any) -> nn.Module:
    """Return a net in which no change of a layer's outputs is without effect.

    Normalisation would take away what adds one number to all of them.
    """
    model = make_net(layer, **options)
    for block in model.blocks:
        block.norm = nn.Tanh()  # type: ignore[assignment]
    return model


def attach_small(
    model: nn.Module,
    design: Any,
    name: str = "superlora",
    seed: int = 2,
    targets: Sequence[str] = TARGETS,
    **options: Any,
) -> slt.Adapter:
    """Attach, and give every factor values of no symmetry that leave the weight's size alone."""
    if isinstance(design, str):
        design = DESIGNS[design]
    adapter = fill(slt.attach(model, design, targets, name=name, **options), seed)
    with torch.no_grad():
        for factor in adapter.parameters():
            factor.mul_(0.4)
    return adapter


def by_hand(
    weight: Tensor, bias: Tensor | None, supports: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Return the changes of weight and bias by their formulas, term by term."""
    change, shift = torch.zeros_like(weight), None
    for operation, s in supports.items():
        moved: Tensor | None = None
        if operation == "add_weight":
            change = change + s
        elif operation == "scale_weight":
            change = change + torch.einsum("oi,oi->oi", weight, s)
        elif operation == "right_weight":
            change = change + torch.einsum("oj,ji->oi", weight, s)
        elif operation == "left_weight":
            change = change + torch.einsum("op,pi->oi", s, weight)
        elif operation == "weight_to_bias":
            moved = torch.einsum("oi,i->o", weight, s[:, 0])
        elif operation == "add_bias":
            moved = s[:, 0]
        elif bias is not None:
            assert operation == "scale_bias"
            moved = torch.einsum("o,o->o", bias, s[:, 0])
        if moved is not None:
            shift = moved if shift is None else shift + moved
    return change, shift


def supports_of(adapter: slt.Adapter, layer: str) -> dict[str, Tensor]:
    return {op: adapter.delta(name) for op, name in adapter.plan.layout.supports[layer].items()}


def merged_by_hand(
    layer: Any, adapters: Sequence[slt.Adapter], name: str
) -> tuple[Tensor, Tensor | None]:
    """Return what weight, (output, input), and bias are with some unmerged adapters' supports."""
    weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.t()
    bias = own = layer.bias
    total = weight
    for adapter in adapters:
        if name not in adapter.plan.layout.supports:
            continue
        change, shift = by_hand(weight, own, supports_of(adapter, name))
        total = total + change
        if shift is not None:
            bias = shift if bias is None else bias + shift
    return total, bias


def plain_call(model: nn.Module, adapters: Sequence[slt.Adapter], call: Callable[[], Any]) -> Any:
    """Call with every adapted layer computed by plain autograd from its merged matrices."""
    layers = {name: layer for adapter in adapters for name, layer in adapter.layers().items()}
    kept = {name: vars(layer).pop("forward") for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            vars(layer)["forward"] = _plain(layer, adapters, name)
        return call()
    finally:
        for name, layer in layers.items():
            vars(layer)["forward"] = kept[name]


def _plain(
    layer: nn.Module, adapters: Sequence[slt.Adapter], name: str
) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        weight, bias = merged_by_hand(layer, adapters, name)
        y = x @ weight.transpose(0, 1)
        return y if bias is None else y + bias

    return forward
