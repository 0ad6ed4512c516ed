"""Papers of designed blocks: Monarch matrices and sums of Kronecker products."""

from __future__ import annotations

import functools

import numpy
from hypothesis import strategies as st
from torch import Tensor

import superlora as sl
from tests.reductions.cases import Options, options, same
from tests.reductions.paper import Arrays, Sizes, Views, paper_row, scaled
from tests.reductions.paper_weight_rows import number_of, numbered, per_weight


def monarch_delta(shape: tuple[int, int], weight: object, own: Arrays) -> numpy.ndarray:
    """Multiply the unit vectors by R's blocks, a permutation, L's blocks and a permutation."""
    left, right = own["L"], own["R"]  # (blocks, outputs, inputs of the block)
    blocks = len(left)
    x = numpy.eye(shape[1]).reshape(shape[1], blocks, -1)
    inner = numpy.einsum("bki,kqi->bkq", x, right).reshape(shape[1], -1)
    inner = inner.reshape(shape[1], -1, blocks).transpose(0, 2, 1)
    outputs = numpy.einsum("blr,lsr->bls", inner, left)
    return outputs.transpose(0, 2, 1).reshape(shape[1], -1).T


def monarch_l(blocks: int, term: int, values: Tensor) -> Tensor:
    own = values.unflatten(2, (blocks, -1))[..., term]
    return own.transpose(0, 1).unsqueeze(-1)


def monarch_r(blocks: int, term: int, values: Tensor) -> Tensor:
    own = values.unflatten(1, (-1, blocks))[:, term]
    return own.transpose(0, 1).unsqueeze(0)


def monarch_sizes(drawn: Options) -> Sizes:
    blocks, inner = drawn.extra, drawn.extra * drawn.rank
    return numbered(
        drawn,
        lambda do, di: {"L": (blocks, do // blocks, inner), "R": (blocks, inner, di // blocks)},
    )


def monarch_views(drawn: Options, name: str) -> Views:
    found: Views = {}
    for term in range(drawn.rank):
        for split, (key, view) in enumerate({"L": monarch_l, "R": monarch_r}.items()):
            own = functools.partial(view, drawn.extra, term)
            found[f"{2 * term + split}.core"] = (f"{key}:{number_of(drawn, name)}", own)
    return found


def cdka(drawn: Options) -> sl.Spec:
    return sl.cdka(*divisors_of(drawn), terms=drawn.rank, alpha=drawn.alpha)


def divisors_of(drawn: Options) -> tuple[int, int]:
    """Return r1, of the outputs, and r2, of the inputs."""
    return drawn.extra, 1 + drawn.extra % 3


def cdka_delta(shape: tuple[int, int], weight: object, own: Arrays) -> numpy.ndarray:
    return sum(numpy.kron(own[f"B{t}"], own[f"A{t}"]) for t in range(len(own) // 2))


def cdka_sizes(drawn: Options) -> Sizes:
    rows, columns = divisors_of(drawn)
    return numbered(
        drawn,
        lambda do, di: {
            key: shape
            for term in range(drawn.rank)
            for key, shape in (
                (f"B{term}", (do // rows, columns)),
                (f"A{term}", (rows, di // columns)),
            )
        },
    )


def cdka_views(drawn: Options, name: str) -> Views:
    return {
        f"{2 * term + split}.core": (f"{key}{term}:{number_of(drawn, name)}", same)
        for term in range(drawn.rank)
        for split, key in enumerate("BA")
    }


sizes = st.sampled_from([6, 12])
ROWS = [
    paper_row(
        "monarch-paper",
        scaled(
            lambda terms, blocks, **fields: sl.monarch(blocks, terms, **fields), "rank", "extra"
        ),
        monarch_sizes,
        per_weight(monarch_delta),
        monarch_views,
        options(sizes=sizes, rank=st.integers(1, 3), extra=st.sampled_from([1, 2, 3])),
        Options(((6, 8), (4, 10)), 3, extra=2),
    ),
    paper_row(
        "cdka-paper",
        cdka,
        cdka_sizes,
        per_weight(cdka_delta),
        cdka_views,
        options(sizes=sizes, rank=st.integers(1, 3), extra=st.sampled_from([1, 2, 3])),
        Options(((6, 9), (4, 12)), 3, extra=2),
    ),
]
