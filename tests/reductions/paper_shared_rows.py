"""Papers whose weights share one tensor: a stack of equal weights, or a fold of all of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy
import tensorly
from hypothesis import strategies as st

import superlora as sl
from tests.reductions.cases import Net, Options, options, same, transposed
from tests.reductions.paper import Arrays, Sizes, Views, paper_row, scaled


def stack(drawn: Options) -> tuple[int, int, int, int]:
    return len(drawn.shapes), *drawn.shapes[0], drawn.rank


def lotr_update(drawn: Options, net: Net, arrays: Arrays) -> dict[str, numpy.ndarray]:
    left, cores, right = (arrays[key] for key in ("A", "G", "B"))
    return {
        name: drawn.scale * left @ cores[index] @ right.T for index, name in enumerate(drawn.widths)
    }


def fact_tt_update(drawn: Options, net: Net, arrays: Arrays) -> dict[str, numpy.ndarray]:
    """Multiply the unit vectors by right-hand, middle and left-hand factor, as FacT does x."""
    x = numpy.eye(drawn.shapes[0][1])
    return {
        name: (x @ arrays["rhs"] @ arrays["mid"][index] @ arrays["lhs"] * drawn.scale).T
        for index, name in enumerate(drawn.widths)
    }


def fact_tk_update(drawn: Options, net: Net, arrays: Arrays) -> dict[str, numpy.ndarray]:
    core, layers, inputs, outputs = (arrays[key] for key in ("C", "P", "U", "V"))
    found = {}
    for index, name in enumerate(drawn.widths):
        middle = sum(layers[p, index] * core[:, :, p] for p in range(drawn.rank))
        found[name] = drawn.scale * outputs @ middle.T @ inputs
    return found


def cut(drawn: Options, vector: numpy.ndarray) -> dict[str, numpy.ndarray]:
    found, start = {}, 0
    for name, shape in drawn.widths.items():
        found[name] = drawn.scale * vector[start : start + math.prod(shape)].reshape(shape)
        start += math.prod(shape)
    return found


def blocks_of(spec: sl.Spec, drawn: Options) -> Sizes:
    """Read the blocks' shapes where the choice of the fold is superlora's own."""
    shapes = sl.Plan(spec, drawn.widths).factor_shapes
    return {block.partition(".")[2]: shape for block, shape in shapes.items()}


def own_names(spec: Callable[[Options], sl.Spec]) -> Callable[[Options, str], Views]:
    return lambda drawn, _: {block: (block, same) for block in blocks_of(spec(drawn), drawn)}


def lorta(drawn: Options) -> sl.Spec:
    return sl.lorta(drawn.rank, order=drawn.extra, alpha=drawn.alpha)


def lorta_update(drawn: Options, net: Net, arrays: Arrays) -> dict[str, numpy.ndarray]:
    factors = [
        arrays.get(f"0.factor{mode}", numpy.eye(size))
        for mode, size in enumerate(arrays["0.core"].shape)
    ]
    return cut(drawn, tensorly.tucker_to_tensor((arrays["0.core"], factors)).ravel())


def lonkr_grouped(drawn: Options) -> sl.Spec:
    return sl.lonkr(drawn.rank, alpha=drawn.alpha, groups=1, fold="balanced")


def lonkr_grouped_update(drawn: Options, net: Net, arrays: Arrays) -> dict[str, numpy.ndarray]:
    # By the mixed product: of the left factors and of the right factors, then one product.
    lefts = functools.reduce(numpy.kron, [arrays[f"{k}.factor0"] for k in range(3)])
    rights = functools.reduce(numpy.kron, [arrays[f"{k}.factor1"] for k in range(3)])
    return cut(drawn, (lefts @ rights.T).ravel())


def lorta_cp_update(drawn: Options, net: Net, arrays: Arrays) -> dict[str, numpy.ndarray]:
    heads, columns = arrays["heads"].shape[0], drawn.shapes[0][1]
    found = {}
    for index, name in enumerate(drawn.widths):
        layer, matrix = divmod(index, 2)
        delta = numpy.zeros((heads, len(arrays["head"]), columns))
        for r in range(drawn.rank):
            number = arrays["layers"][layer, r] * arrays["matrices"][matrix, r]
            outputs = numpy.outer(arrays["heads"][:, r], arrays["head"][:, r])
            delta += number * numpy.multiply.outer(outputs, arrays["inputs"][:, r])
        found[name] = drawn.scale * delta.reshape(drawn.shapes[0])
    return found


def lorta_cp_fold(drawn: Options) -> tuple[int, int, int, int, int]:
    rows, columns = drawn.shapes[0]
    return len(drawn.shapes) // 2, 2, 2, rows // 2, columns


def tenslora_fold(drawn: Options) -> tuple[int, int, int, int]:
    return len(drawn.shapes) // 2, 2, *drawn.shapes[0]


def tenslora_update(drawn: Options, net: Net, arrays: Arrays) -> dict[str, numpy.ndarray]:
    found = {}
    for index, name in enumerate(drawn.widths):
        layer, matrix = divmod(index, 2)
        middle = numpy.einsum(
            "lmoi,l,m->oi", arrays["G"], arrays["depth"][layer], arrays["kind"][matrix]
        )
        found[name] = drawn.scale * arrays["outputs"] @ middle @ arrays["inputs"].T
    return found


stacked = options(one_shape=True, count=st.integers(1, 4))
STACK = Options(((6, 4),) * 4, 2)


ROWS = [
    paper_row(
        "lotr-paper",
        scaled(sl.lotr, "rank"),
        lambda o: (
            {"A": (stack(o)[1], o.rank), "G": (stack(o)[0], o.rank, o.rank)}
            | {"B": (stack(o)[2], o.rank)}
        ),
        lotr_update,
        lambda *_: {"0.factor1": ("A", same), "0.core": ("G", same), "0.factor2": ("B", same)},
        stacked,
        STACK,
    ),
    paper_row(
        "fact_tt-paper",
        scaled(sl.fact_tt, "rank"),
        lambda o: (
            {"lhs": (o.rank, stack(o)[1]), "mid": (stack(o)[0], o.rank, o.rank)}
            | {"rhs": (stack(o)[2], o.rank)}
        ),
        fact_tt_update,
        lambda *_: {
            "0.factor1": ("lhs", transposed),
            "0.core": ("mid", transposed),
            "0.factor2": ("rhs", same),
        },
        stacked,
        STACK,
    ),
    paper_row(
        "fact_tk-paper",
        scaled(sl.fact_tk, "rank"),
        lambda o: (
            {"C": (o.rank,) * 3, "P": (o.rank, stack(o)[0])}
            | {"U": (o.rank, stack(o)[2]), "V": (stack(o)[1], o.rank)}
        ),
        fact_tk_update,
        lambda *_: {
            "0.core": ("C", lambda core: core.permute(2, 1, 0)),
            "0.factor0": ("P", transposed),
            "0.factor1": ("V", same),
            "0.factor2": ("U", transposed),
        },
        options(one_shape=True, count=st.just(4)),
        STACK,
    ),
    paper_row(
        "tenslora-paper",
        lambda o: sl.tenslora((1, 2, o.rank, o.extra), fold=tenslora_fold(o), scale=o.scale),
        lambda o: {
            "G": (1, 2, o.rank, o.extra),
            **{
                key: (size, rank)
                for key, size, rank in zip(
                    ("depth", "kind", "outputs", "inputs"),
                    tenslora_fold(o),
                    (1, 2, o.rank, o.extra),
                    strict=True,
                )
            },
        },
        tenslora_update,
        lambda *_: (
            {"0.core": ("G", same)}
            | {
                f"0.factor{mode}": (key, same)
                for mode, key in enumerate(("depth", "kind", "outputs", "inputs"))
            }
        ),
        options(
            sizes=st.integers(3, 6),
            one_shape=True,
            count=st.sampled_from([2, 4, 6]),
            extra=st.integers(1, 3),
        ),
        Options(((6, 4),) * 6, 3, extra=2),
    ),
    paper_row(
        "lonkr-paper-grouped",
        lonkr_grouped,
        lambda o: blocks_of(lonkr_grouped(o), o),
        lonkr_grouped_update,
        own_names(lonkr_grouped),
        options(sizes=st.sampled_from([6, 8, 12]), rank=st.just(1)),
        Options(((12, 18), (8, 12)), 2),
    ),
    paper_row(
        "lorta-paper",
        lorta,
        lambda o: blocks_of(lorta(o), o),
        lorta_update,
        own_names(lorta),
        options(rank=st.integers(1, 3), extra=st.integers(3, 4)),
        Options(((5, 7), (8, 4)), 2, extra=3),
    ),
    paper_row(
        "lorta_cp-paper",
        lambda o: sl.lorta_cp(o.rank, fold=lorta_cp_fold(o), alpha=o.alpha),
        lambda o: {
            key: (size, o.rank)
            for key, size in zip(
                ("layers", "matrices", "heads", "head", "inputs"), lorta_cp_fold(o), strict=True
            )
        },
        lorta_cp_update,
        lambda *_: {
            f"0.factor{mode}": (key, same)
            for mode, key in enumerate(("layers", "matrices", "heads", "head", "inputs"))
        },
        options(sizes=st.sampled_from([4, 6, 8]), one_shape=True, count=st.sampled_from([2, 4, 6])),
        Options(((6, 4),) * 6, 3),
    ),
]
