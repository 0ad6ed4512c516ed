"""How a width is cut in two is LyCORIS' rule, and PEFT's wherever PEFT puts the smaller first."""

from __future__ import annotations

import peft
import pytest
import torch
from lycoris.functional.general import factorization
from peft.tuners.lokr.layer import factorization as peft_factorization

import superlora as sl
from superlora.design.fold_shape import bounded_splits
from tests.strategies import make_plan


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


@pytest.mark.parametrize("widths", [(13, 17), (13, 1), (1, 1)])
@pytest.mark.parametrize("options", [{}, {"decompose_both": True}, {"factor": 4}])
def test_two_prime_widths_are_a_number_times_a_matrix_as_in_peft(widths, options):
    plan = make_plan(sl.lokr(4, **options), {"q": widths})
    changes = {"decompose_factor" if k == "factor" else k: v for k, v in options.items()}
    config = peft.LoKrConfig(r=4, target_modules=["0"], **changes)
    layer = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(*widths[::-1])), config)
    theirs = [tuple(p.shape) for p in layer.parameters() if p.requires_grad]
    first, *second = plan.factor_shapes.values()
    assert theirs[0] == first == (1, 1)
    if len(second) == 2:
        second = [second[0], second[1][::-1]]
    assert theirs[1:] == second
    assert "no Kronecker structure" in plan.describe() or widths != (13, 17)


@pytest.mark.parametrize("rank", [2, 7])
def test_a_number_times_a_matrix_learns(rank):
    plan = make_plan(sl.lokr(rank), {"q": (7, 13)})
    factors = plan.init(seed=0, like=torch.float64)
    leaves = {name: value.requires_grad_() for name, value in factors.items()}
    target = torch.ones((7, 13), dtype=torch.float64)
    optimizer = torch.optim.Adam(leaves.values(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        loss = ((plan.delta(leaves, "q") - target) ** 2).mean()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 1e-3
