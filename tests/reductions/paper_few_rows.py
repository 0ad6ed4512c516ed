"""Methods of few numbers: maps of one vector to updates, or to factors."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy
from hypothesis import strategies as st

import superlora as sl
from superlora import maps
from tests.reductions import matrices
from tests.reductions.cases import Net, Options, options, same
from tests.reductions.paper import Arrays, Sizes, Views, paper_row
from tests.reductions.paper_map_rows import (
    NORMALIZE,
    UNLIKE,
    group_entries,
    group_sizes,
    kronecker_row,
    lora_mapped,
    planned,
    small,
)
from tests.reductions.paper_shared_rows import cut
from tests.reductions.paper_weight_rows import (
    column,
    number_of,
    numbered,
    per_weight,
)


def fourier_delta(drawn: Options, net: Net, arrays: Arrays) -> dict[str, numpy.ndarray]:
    found = {}
    for index, (name, shape) in enumerate(drawn.widths.items()):
        numbers = arrays[f"c:{index}"]
        normalize = NORMALIZE[0] if drawn.rank > 2 else None
        matrix = matrices.fourier(len(numbers), shape, drawn.seed, normalize=normalize)
        found[name] = drawn.scale * (matrix @ numbers).reshape(shape)
    return found


def fourierft(drawn: Options) -> sl.Spec:
    fixed = maps.Fourier(seed=drawn.seed, normalize="isometric" if drawn.rank > 2 else None)
    return sl.fourierft(drawn.extra, drawn.scale, map=fixed)


def did_update(drawn: Options, net: Net, arrays: Arrays) -> dict[str, numpy.ndarray]:
    found = {}
    for index, (name, shape) in enumerate(drawn.widths.items()):
        matrix = le_fastfood(drawn, len(arrays["theta"]), shape, index)
        number = arrays[f"lambda:{index}"] if "lambda:0" in arrays else 1.0
        found[name] = drawn.scale * number * (matrix @ arrays["theta"]).reshape(shape)
    return found


def le_fastfood(drawn: Options, before: int, shape: tuple[int, int], index: int) -> numpy.ndarray:
    """Return the projection of one weight, independent of the others'."""
    return matrices.fastfood(before, math.prod(shape), drawn.seed, index, order="le")


def nola_update(drawn: Options, net: Net, arrays: Arrays) -> dict[str, numpy.ndarray]:
    """Sum random matrices: ``B = sum_j beta_j B_j`` times ``A = sum_i alpha_i A_i``."""
    found = {}
    for index, (name, (rows, columns)) in enumerate(drawn.widths.items()):
        left, right = (
            matrices.gaussian(drawn.extra, width * drawn.rank, drawn.seed, 2 * index + side)
            for side, width in enumerate((rows, columns))
        )
        beta, alpha = arrays[f"beta:{index}"], arrays[f"alpha:{index}"]
        b = sum(x * m.reshape(rows, -1) for x, m in zip(beta, left.T, strict=True))
        a = sum(x * m.reshape(columns, -1).T for x, m in zip(alpha, right.T, strict=True))
        found[name] = drawn.scale * b @ a
    return found


def factors_of(drawn: Options, vector: numpy.ndarray) -> dict[str, numpy.ndarray]:
    """Cut LoRA's factors, B then Aᵀ of one weight after the other, and multiply them."""
    found, start = {}, 0
    for name, widths in drawn.widths.items():
        pair = []
        for width in widths:
            stop = start + width * drawn.rank
            pair.append(vector[start:stop].reshape(width, drawn.rank))
            start = stop
        found[name] = drawn.scale * pair[0] @ pair[1].T
    assert start == len(vector)
    return found


def unilora_update(drawn: Options, net: Net, arrays: Arrays) -> dict[str, numpy.ndarray]:
    total = drawn.rank * sum(map(sum, drawn.shapes))
    matrix = matrices.one_hot(drawn.extra, total, drawn.seed, 0, False, False)
    return factors_of(drawn, matrix @ arrays["theta"])


def inner_spec(drawn: Options) -> sl.Spec:
    outer = maps.Fastfood(seed=drawn.seed)
    inner = maps.Fastfood(seed=drawn.seed + 1, order="le", blocks="stacked")
    return lora_mapped(drawn, outer, factor_map=inner, factor_size=drawn.extra)


bare_plan = planned(lambda drawn: inner_spec(drawn).replace(factor_map=None, factor_size=None))


def inner_update(drawn: Options, net: Net, arrays: Arrays) -> dict[str, numpy.ndarray]:
    """Map one vector to all blocks, and the product of each group's to its entries."""
    bare = bare_plan(drawn)
    shapes = bare.factor_shapes
    total = sum(map(math.prod, shapes.values()))
    theta = arrays["theta"]
    fields = {"order": "le", "blocks": "stacked"}
    entries = matrices.fastfood(len(theta), total, drawn.seed + 1, **fields) @ theta
    blocks, start = {}, 0
    for block, shape in shapes.items():
        blocks[block] = entries[start : start + math.prod(shape)].reshape(shape)
        start += math.prod(shape)
    runs = []
    for group, size in enumerate(group_sizes(drawn, bare.spec.groups)):
        x = group_entries(blocks, group)
        runs.append(matrices.fastfood(len(x), size, drawn.seed) @ x)
    return cut(drawn, numpy.concatenate(runs))


def selection(drawn: Options) -> sl.Spec:
    """Pick rows i (do + 1) and columns j (di + 1) of the Kronecker product of two matrices."""
    do, di = drawn.shapes[0]
    positions = tuple(i * (do + 1) * di**2 + j * (di + 1) for i in range(do) for j in range(di))
    fields = {"rank": (drawn.rank, drawn.rank), "splits": 2, "fold": ((do, di), (do, di))}
    return sl.Spec(map=maps.Selection(positions=positions), scale=drawn.scale, **fields)


def loha_sizes(drawn: Options) -> Sizes:
    rank = drawn.rank
    return numbered(
        drawn,
        lambda do, di: {
            key: ((do, di)[place % 2], rank) for place, key in enumerate(("B0", "A0", "B1", "A1"))
        },
    )


def named_views(views: Views) -> Callable[[Options, str], Views]:
    return lambda drawn, name: {
        leaf: (f"{key}:{number_of(drawn, name)}" if key != "theta" else key, view)
        for leaf, (key, view) in views.items()
    }


few = st.integers(1, 4)
ROWS = [
    paper_row(
        "fourierft-paper",
        fourierft,
        lambda o: numbered(o, lambda do, di: {"c": (o.extra,)}),
        fourier_delta,
        named_views({"0.core": ("c", same)}),
        options(sizes=small, extra=few, rank=few),
        Options(UNLIKE, 3, extra=4),
    ),
    paper_row(
        "did-paper",
        lambda o: sl.did(o.extra, o.seed, scale=o.scale),
        lambda o: {"theta": (o.extra,)},
        did_update,
        named_views({"0.core": ("theta", same)}),
        options(sizes=small, extra=st.integers(1, 9)),
        Options(UNLIKE, extra=5),
    ),
    paper_row(
        "said-paper",
        lambda o: sl.said(o.extra, o.seed, scale=o.scale),
        lambda o: {"theta": (o.extra,)} | numbered(o, lambda do, di: {"lambda": (1,)}),
        did_update,
        named_views({"0.factor0": ("lambda", column), "0.factor1": ("theta", column)}),
        options(sizes=small, extra=st.integers(1, 9)),
        Options(UNLIKE, extra=5),
    ),
    paper_row(
        "nola-paper",
        lambda o: sl.nola(o.extra, o.rank, o.seed, alpha=o.alpha),
        lambda o: numbered(o, lambda do, di: {"beta": (o.extra,), "alpha": (o.extra,)}),
        nola_update,
        named_views({"0.factor0_theta": ("beta", same), "0.factor1_theta": ("alpha", same)}),
        options(sizes=small, extra=few, rank=st.integers(1, 8)),
        Options(UNLIKE, 2, extra=3),
    ),
    paper_row(
        "unilora-paper",
        lambda o: sl.unilora(o.extra, o.rank, o.seed, alpha=o.alpha),
        lambda o: {"theta": (o.extra,)},
        unilora_update,
        named_views({"0.theta": ("theta", same)}),
        options(sizes=small, extra=few, rank=st.integers(1, 8)),
        Options(UNLIKE, 2, extra=7),
    ),
    paper_row(
        "lora-paper-both_maps",
        inner_spec,
        lambda o: {"theta": (o.extra,)},
        inner_update,
        named_views({"0.theta": ("theta", same)}),
        options(sizes=small, extra=few, rank=st.integers(1, 2)),
        Options(UNLIKE, 2, extra=7),
    ),
    paper_row(
        "loha-paper-selection",
        selection,
        loha_sizes,
        per_weight(
            lambda shape, weight, own: (own["B0"] @ own["A0"].T) * (own["B1"] @ own["A1"].T)
        ),
        named_views(
            {f"{k}.factor{mode}": (f"{'BA'[mode]}{k}", same) for k in (0, 1) for mode in (0, 1)}
        ),
        options(sizes=st.integers(2, 4), one_shape=True),
        Options(((4, 3),) * 2, 2),
    ),
    kronecker_row("lokr-paper-fastfood", 0),
]
