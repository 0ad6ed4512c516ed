"""Supernets with values, and loops over numbers that say what they must compute."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import nn

from superlora.search import Option, Supernet
from tests.torch.helpers import make_layer, make_net, seeded

TARGETS = ["q", "v", "o"]
RANKS = (3, 2)
WIDTHS = (4, 3)  # of a lone layer: input, output


def fill(supernet: Supernet, seed: int = 3) -> Supernet:
    """Give everything that is stored random values, as if it had been trained."""
    with seeded(seed), torch.no_grad():
        for parameter in supernet.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape))
    return supernet


def make_supernet(
    layer: str = "bias", *, to: Mapping[str, Any] | None = None, **options: Any
) -> tuple[nn.Module, Supernet]:
    """Return a small model of many layers and its filled supernet."""
    model = make_net(layer, **(to or {}))
    return model, fill(Supernet(model, TARGETS, ranks=RANKS, **options))


def make_lone(layer: str, **options: Any) -> tuple[nn.Module, Supernet]:
    """Return a float64 model of one layer, named 0, and its filled supernet."""
    with seeded(0):
        model = nn.Sequential(make_layer(layer, *WIDTHS)).double()
    return model, fill(Supernet(model, ["0"], ranks=RANKS, **options))


def every_choice(supernet: Supernet) -> list[dict[str, Option]]:
    """Return all combinations of one layer's options."""
    operations = supernet.space.operations
    return [
        dict(zip(operations, own, strict=True)) for own in itertools.product(*operations.values())
    ]


def fixed(supernet: Supernet, options: Mapping[str, Option]) -> Any:
    """Return a configuration without what scales a bias, where there is none to scale."""
    own = {key: option for key, option in options.items() if key in supernet.space.operations}
    return supernet.space.fixed(own)


def support(left: numpy.ndarray, right: numpy.ndarray | None, option: Option, shape: Any) -> Any:
    """Compute one support tensor entry by entry."""
    found = numpy.zeros(shape)
    for row, column in numpy.ndindex(*shape):
        if option == "constant":
            found[row, column] = left[0, 0]
        elif option == "vector":
            found[row, column] = left[row, 0]
        elif option != "none":
            for k in range(int(option)):
                found[row, column] += left[row, k] * right[k, column]
    return found


def expected_of(
    module: nn.Module, supernet: Supernet, name: str, options: Mapping[str, Option]
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Compute a layer's updated weight and bias entry by entry."""
    own = module.weight.detach().double().numpy()
    weight = own if isinstance(module, nn.Linear) else own.T
    rows, columns = weight.shape
    bias = numpy.zeros(rows) if module.bias is None else module.bias.detach().double().numpy()
    shapes = {
        "scale_weight": (rows, columns),
        "add_weight": (rows, columns),
        "weight_to_bias": (columns, 1),
        "scale_bias": (rows, 1),
        "add_bias": (rows, 1),
    }
    stored = supernet.stored(name)
    a, b, c, d, e = (
        support(*_numpy(stored[key]), options[key], shape) if key in stored else numpy.zeros(shape)
        for key, shape in shapes.items()
    )
    new_weight, new_bias = numpy.empty((rows, columns)), numpy.empty(rows)
    for row in range(rows):
        shift = 0.0
        for column in range(columns):
            new_weight[row, column] = (
                weight[row, column] + weight[row, column] * a[row, column] + b[row, column]
            )
            shift += weight[row, column] * c[column, 0]
        new_bias[row] = bias[row] + bias[row] * d[row, 0] + e[row, 0] + shift
    return new_weight, new_bias


def _numpy(stored: Any) -> tuple[Any, Any]:
    """Return what is stored as matrices: left (height, r) and right (r, width), or a column."""
    left, *right = (each.detach().double().numpy() for each in stored)
    return left.reshape(len(left), -1), right[0].T if right else None
