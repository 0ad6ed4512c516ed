"""Our supports with a peer's numbers, and what a layer computes with a peer's matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import superlora.torch as slt
from tests.reductions.cases import Options
from tests.torch.helpers import seeded

SHAPES = ((6, 8), (9, 4), (5, 5))


def drawn(rank: int = 2, seed: int = 0, layer: str = "bias") -> Options:
    return Options(SHAPES, rank, seed=seed, layer=layer)


def linear(rows: int, columns: int, seed: int = 0, bias: bool = True) -> nn.Linear:
    with seeded(seed):
        return nn.Linear(columns, rows, bias=bias).double()


def draw(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@torch.no_grad()
def put(adapter: slt.Adapter, operation: str, layer: str, *blocks: Tensor) -> None:
    """Give a support's blocks, in order, these values: a vector, or the two thin factors."""
    names = adapter.plan.blocks_of(adapter.plan.layout.supports[layer][operation])
    for name, values in zip(names, blocks, strict=True):
        own = adapter.factors()[name]
        assert own.shape == values.shape, (name, own.shape, values.shape)
        own.copy_(values)


def attach_with(
    model: nn.Module, design: Any, blocks: Mapping[str, tuple[Tensor, ...] | Tensor], **options: Any
) -> slt.Adapter:
    """Attach to a single layer, with these values of its supports."""
    adapter = slt.attach(model, design, **options)
    (layer,) = adapter.plan.layout.supports
    shared = dict(getattr(adapter.plan.spec, "shared", ()))
    assert blocks.keys() == adapter.plan.layout.supports[layer].keys() - shared.keys()
    for operation, values in blocks.items():
        put(adapter, operation, layer, *(values if isinstance(values, tuple) else (values,)))
    return adapter


def same(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert actual.shape == expected.shape
    actual, expected = actual.detach(), expected.detach()
    error = float((actual - expected).abs().max())
    assert error <= tolerance * max(1.0, float(expected.abs().max())), error
