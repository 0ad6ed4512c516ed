"""A paper's formula in numpy as a peer, for methods that no library has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import torch
from hypothesis import strategies as st

import superlora as sl
from tests.reductions.cases import Case, Leaves, Net, Options, PaperPeer, Row, Take, View, make_net

Arrays = Mapping[str, numpy.ndarray]
Sizes = dict[str, tuple[int, ...]]
Views = dict[str, tuple[str, View]]  # our block, "split.block": an array's name, and how it lies


def paper_row(
    name: str,
    spec: Callable[[Options], sl.Spec],
    sizes: Callable[[Options], Sizes],
    update: Callable[[Options, Net, Arrays], dict[str, numpy.ndarray]],
    views: Callable[[Options, str], Views],
    drawn: st.SearchStrategy[Options],
    example: Options,
    *,
    fixed: tuple[str, ...] = (),
) -> Row:
    """Make a row of a formula; `fixed` are the arrays that the method does not train."""

    def build(drawn: Options) -> Case:
        net = make_net(drawn)
        generator = torch.Generator().manual_seed(drawn.seed + 100)
        arrays = {}
        for key, shape in sizes(drawn).items():
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            arrays[key] = values.requires_grad_(not key.endswith(fixed or ("\0",)))
        leaves: dict[str, Leaves] = {
            name: {
                leaf: Take(arrays[key], view) for leaf, (key, view) in views(drawn, name).items()
            }
            for name in drawn.widths
        }
        peer = PaperPeer(net, arrays, functools.partial(update, drawn, net), leaves)
        return Case(drawn, net, spec(drawn), peer)

    return Row(name, build, drawn, example)


def scaled(make: Callable[..., sl.Spec], *fields: str, **changes: Any) -> Callable[..., sl.Spec]:
    """Return a preset's spec of some drawn fields, with the drawn scale."""
    return lambda drawn: make(*(getattr(drawn, f) for f in fields), scale=drawn.scale, **changes)
