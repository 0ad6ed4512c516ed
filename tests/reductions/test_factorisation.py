"""How a width is cut in two is LyCORIS' rule, and PEFT's wherever PEFT puts the smaller first."""

from __future__ import annotations

import pytest
from lycoris.functional.general import factorization
from peft.tuners.lokr.layer import factorization as peft_factorization

import superlora as sl
from superlora.shapes import bounded_splits


@pytest.mark.parametrize("factor", [-1, *range(1, 41)])
def test_bounded_splits_are_lycoris_factorisation(factor):
    bound = None if factor == -1 else factor
    for size in range(1, 401):
        first, second = bounded_splits((size,), 2, bound)
        assert (*first, *second) == factorization(size, factor), size
        assert sorted((*first, *second)) == sorted(peft_factorization(size, factor)), size


def test_peft_puts_a_factor_first_even_where_it_is_the_larger():
    assert peft_factorization(128, 16) == (16, 8)
    assert factorization(128, 16) == (8, 16)
    plan = sl.Plan(sl.lokr(2, factor=16), {"q": (128, 128)})
    assert plan.factor_shapes["0.0.core"] == (8, 8)
    spec = sl.lokr(2, fold=((16, 16), (8, 8)))  # PEFT's, said in so many words
    assert sl.Plan(spec, {"q": (128, 128)}).factor_shapes["0.0.core"] == (16, 16)


@pytest.mark.parametrize("widths", [(7, 5), (13, 1), (1, 1)])
def test_a_product_with_a_single_number_is_refused(widths):
    # Peers make a 1 x 1 split of two prime widths, a dense matrix times one more number.
    assert [factorization(width)[0] for width in widths] == [1, 1]
    with pytest.raises(ValueError, match="splits must leave every split more than one entry"):
        sl.Plan(sl.lokr(2), {"q": widths})
