"""Degrees of freedom: the rank of the Jacobian at a random point is the papers' formula."""

from __future__ import annotations

import numpy
import pytest

import superlora as sl
from tests.oracles import jacobian_rank
from tests.strategies import draw_factors, make_plan


def kronecker_of(*splits):
    """Each further split adds its freedom less one: a factor moves between the splits."""
    return sum(splits) - (len(splits) - 1)


def lora(rows, columns, rank):
    return rank * (rows + columns) - rank**2


def explicit(rank, fold, core):
    rows, *rest = fold
    shapes = {"q": (rows, int(numpy.prod(rest)))}
    return sl.Spec(rank=rank, order=len(fold), fold=fold, core=core), shapes


def stack(layers, rows, columns):
    return {f"{layer}.q": (rows, columns) for layer in range(layers)}


ROWS = {
    "dense": (sl.dense(), {"q": (3, 4)}, 12),
    "LoRA 5 x 6, r=2": (sl.lora(rank=2), {"q": (5, 6)}, lora(5, 6, 2)),
    "LoRA 7 x 4, r=3": (sl.lora(rank=3), {"q": (7, 4)}, lora(7, 4, 3)),
    "LoRA with a core": (sl.lora(rank=2, core="full"), {"q": (5, 6)}, lora(5, 6, 2)),
    "two LoRAs": (sl.lora(rank=1), stack(2, 4, 3), 2 * lora(4, 3, 1)),
    # r (sum d - M + 1)
    "CP 4 x 5 x 3": (*explicit(2, (4, 5, 3), "identity"), 2 * (12 - 2)),
    "CP 3 x 4 x 2 x 3": (*explicit(2, (3, 4, 2, 3), "identity"), 2 * (12 - 3)),
    # prod r + sum r (d - r)
    "Tucker": (*explicit((2, 3, 2), (4, 5, 3), "full"), 12 + 2 * 2 + 3 * 2 + 2 * 1),
    "Tucker with a whole mode": (*explicit((2, "full", 2), (4, 3, 5), "full"), 12 + 4 + 6),
    # L r² + r (d1 + d2) - 2 r²
    "LoTR": (sl.lotr(rank=2), stack(3, 5, 6), 3 * 4 + 2 * 11 - 2 * 4),
    "KronA": (sl.krona(), {"q": (6, 4)}, kronecker_of(2 * 2, 3 * 2)),
    "LoKr": (sl.lokr(rank=1), {"q": (8, 12)}, kronecker_of(2 * 3, lora(4, 4, 1))),
    "LoKr of two": (
        sl.lokr(rank=1, decompose_both=True),
        {"q": (8, 12)},
        kronecker_of(lora(2, 3, 1), lora(4, 4, 1)),
    ),
    "LoNKr": (sl.lonkr(rank=1, splits=3), {"q": (8, 8)}, kronecker_of(*[lora(2, 2, 1)] * 3)),
    "a vector of two splits": (sl.dense(splits=2), {"q": (3, 4)}, kronecker_of(3, 4)),
}


@pytest.mark.parametrize(("spec", "shapes", "freedom"), ROWS.values(), ids=ROWS)
def test_the_jacobian_has_the_rank_of_the_formula(spec, shapes, freedom):
    plan = make_plan(spec, shapes)
    factors = draw_factors(plan)

    def update(blocks):
        deltas = plan.deltas(dict(zip(factors, blocks, strict=True)))
        return numpy.concatenate([delta.ravel() for delta in deltas.values()])

    assert jacobian_rank(update, list(factors.values())) == freedom
    assert freedom <= plan.num_parameters


def test_the_rank_of_a_kronecker_product_is_the_product_of_the_ranks():
    plan = sl.Plan(sl.lonkr(rank=2, splits=2), {"q": (12, 12)})
    assert numpy.linalg.matrix_rank(plan.delta(draw_factors(plan), "q")) == 4
