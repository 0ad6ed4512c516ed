"""Papers of tensor trains: of all weights, or of the digits of one."""

from __future__ import annotations

import itertools
import math

import numpy
import tensorly
from hypothesis import strategies as st

import superlora as sl
from tests.reductions.cases import Net, Options, options, same
from tests.reductions.paper import Arrays, Sizes, Views, paper_row, scaled
from tests.reductions.paper_weight_rows import divided, number_of, numbered, per_weight


def train_sizes(sizes: tuple[int, ...], ranks: tuple[int, ...]) -> Sizes:
    ends = (1, *ranks, 1)
    return {f"G{m}": (ends[m], size, ends[m + 1]) for m, size in enumerate(sizes)}


def largest(sizes: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Return ranks of one number, or fewer where the modes on one side have no more entries."""
    left = itertools.accumulate(sizes[:-1], int.__mul__)
    right = [*itertools.accumulate(sizes[:0:-1], int.__mul__)][::-1]
    return tuple(map(min, left, right, [rank] * (len(sizes) - 1)))


def stack_of(drawn: Options) -> tuple[int, ...]:
    return len(drawn.shapes), *drawn.shapes[0]


def by_layer_of(drawn: Options) -> tuple[int, ...]:
    return len(drawn.shapes) // 2, 2, *drawn.shapes[0]


def metatt_update(drawn: Options, net: Net, arrays: Arrays) -> dict[str, numpy.ndarray]:
    """Sum the matrices ``G_1[a] G_2`` with the weights ``G_0[l, a]`` of a layer."""
    mixed, middle, right = arrays["G0"][0], arrays["G1"], arrays["G2"][..., 0]
    return {
        name: drawn.scale * sum(number * middle[a] @ right for a, number in enumerate(mixed[index]))
        for index, name in enumerate(drawn.widths)
    }


def metatt_by_layer(drawn: Options, net: Net, arrays: Arrays) -> dict[str, numpy.ndarray]:
    found = {}
    for index, name in enumerate(drawn.widths):
        layer, matrix = divmod(index, 2)
        mixed = arrays["G0"][0, layer] @ arrays["G1"][:, matrix]
        delta = numpy.tensordot(mixed, arrays["G2"], axes=1) @ arrays["G3"][..., 0]
        found[name] = drawn.scale * delta
    return found


def digits_of(drawn: Options, shape: tuple[int, int]) -> tuple[int, ...]:
    outputs = math.ceil(drawn.extra / 2)
    return (*divided(shape[0], outputs), *divided(shape[1], drawn.extra - outputs))


def tt_sizes(drawn: Options) -> Sizes:
    def each(do: int, di: int) -> Sizes:
        sizes = digits_of(drawn, (do, di))
        return train_sizes(sizes, largest(sizes, drawn.rank))

    return numbered(drawn, each)


def tt_delta(shape: tuple[int, int], weight: object, own: Arrays) -> numpy.ndarray:
    return tensorly.tt_to_tensor([own[f"G{m}"] for m in range(len(own))]).reshape(shape)


def tt_views(drawn: Options, name: str) -> Views:
    number = number_of(drawn, name)
    return {f"0.core{m}": (f"G{m}:{number}", same) for m in range(drawn.extra)}


ROWS = [
    paper_row(
        "metatt-paper",
        scaled(sl.metatt, "rank"),
        lambda o: train_sizes(stack_of(o), largest(stack_of(o), o.rank)),
        metatt_update,
        lambda *_: {f"0.core{m}": (f"G{m}", same) for m in range(3)},
        options(one_shape=True, count=st.integers(1, 4), rank=st.integers(1, 5)),
        Options(((6, 4),) * 4, 3),
    ),
    paper_row(
        "metatt-paper-by_layer",
        lambda o: sl.metatt((1, 2, o.rank), fold=by_layer_of(o), scale=o.scale),
        lambda o: train_sizes(by_layer_of(o), (1, 2, o.rank)),
        metatt_by_layer,
        lambda *_: {f"0.core{m}": (f"G{m}", same) for m in range(4)},
        options(sizes=st.integers(4, 6), one_shape=True, count=st.sampled_from([2, 4])),
        Options(((6, 4),) * 4, 3),
    ),
    paper_row(
        "tt_lora-paper",
        scaled(sl.tt_lora, "rank", "extra"),
        tt_sizes,
        per_weight(tt_delta),
        tt_views,
        options(sizes=st.sampled_from([4, 6, 8]), rank=st.integers(1, 4), extra=st.integers(2, 5)),
        Options(((6, 8), (4, 12)), 3, extra=4),
    ),
]
