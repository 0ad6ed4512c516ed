"""One map for each mode of a fold, which a group has so many streams for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy
import tensorly
from hypothesis import strategies as st

import superlora as sl
from superlora import maps
from tests.reductions import matrices
from tests.reductions.cases import Net, Options, Row, options, same
from tests.reductions.paper import Arrays, paper_row
from tests.reductions.paper_map_rows import (
    ORDERED,
    UNLIKE,
    chosen,
    count,
    group_sizes,
    planned,
    small,
    split_tensors,
)
from tests.reductions.paper_shared_rows import cut

MODES = 4096


def separable_fields(drawn: Options) -> dict[str, Any]:
    return chosen(ORDERED, drawn.extra)


def separable_update(
    spec: Callable[[Options], sl.Spec],
) -> Callable[[Options, Net, Arrays], dict[str, numpy.ndarray]]:
    """Multiply every mode of every split by a matrix of its own, then the splits."""

    plan = planned(spec)

    def update(drawn: Options, net: Net, arrays: Arrays) -> dict[str, numpy.ndarray]:
        own, runs = separable_fields(drawn), []
        shared = own.pop("shared")
        for group, size in enumerate(group_sizes(drawn, plan(drawn).spec.groups)):
            tensors = []
            for k, tensor in enumerate(split_tensors(arrays, group)):
                after = plan(drawn).layout.groups[group].splits[k].shape
                first = (0 if shared else MODES * group) + k * len(after)
                each = [
                    matrices.fastfood(old, new, drawn.seed, first + mode, **own)
                    for mode, (old, new) in enumerate(zip(tensor.shape, after, strict=True))
                ]
                tensors.append(tensorly.tenalg.multi_mode_dot(tensor, each))
            runs.append(functools.reduce(numpy.kron, tensors).ravel()[:size])
        return cut(drawn, numpy.concatenate(runs))

    return update


def separable(drawn: Options) -> maps.Map:
    return maps.Separable(inner=maps.Fastfood(seed=drawn.seed, **separable_fields(drawn)))


def separable_row(
    name: str, spec: Callable[[Options], sl.Spec], sizes: st.SearchStrategy[int], example: Options
) -> Row:
    plan = planned(spec)
    return paper_row(
        name,
        spec,
        lambda drawn: plan(drawn).factor_shapes,
        separable_update(spec),
        lambda drawn, weight: {block: (block, same) for block in plan(drawn).blocks_of(weight)},
        options(sizes=sizes, rank=st.integers(1, 2), extra=st.integers(0, count(ORDERED) - 1)),
        example,
    )


def separable_lora(drawn: Options) -> sl.Spec:
    return sl.lora(drawn.rank, map=separable(drawn), ratio=0.3, alpha=drawn.alpha)


def separable_lorta(drawn: Options) -> sl.Spec:
    fields = {"fold": "aligned", "alpha": drawn.alpha}
    return sl.lorta(drawn.rank, map=separable(drawn), ratio=0.3, **fields)


def separable_lokr(drawn: Options) -> sl.Spec:
    return sl.lokr(drawn.rank, map=separable(drawn), ratio=0.1, scale=drawn.scale)


ROWS = [
    separable_row("lora-paper-separable", separable_lora, small, Options(UNLIKE, 1, extra=8)),
    separable_row(
        "lorta-paper-separable",
        separable_lorta,
        st.sampled_from([4, 6, 8]),
        Options(((6, 8), (4, 8)), 2, extra=0),
    ),
    separable_row(
        "lokr-paper-separable",
        separable_lokr,
        st.sampled_from([6, 9, 12]),
        Options(((12, 9), (6, 12)), 1, extra=8),
    ),
]
