"""No row is a test that cannot fail: a broken version of our side fails every check."""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import pytest
import torch
from torch import Tensor

import superlora as sl
from superlora import reconstruct
from superlora.kronecker import kronecker
from tests.reductions.cases import (
    Case,
    Ours,
    check_count,
    check_forward,
    check_gradients,
    check_updates,
)
from tests.reductions.rows import ROWS

pytestmark = pytest.mark.filterwarnings("ignore:no Kronecker structure")
every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def backwards(values: Tensor) -> Tensor:
    return values.reshape(-1).flip(0).reshape(values.shape)


def misread(values: Tensor) -> Tensor:
    """Read a block's memory in the other order of its modes."""
    return values.permute(*reversed(range(values.dim()))).reshape(values.shape)


def negated(values: Tensor) -> Tensor:
    return -values


def changed_scale(spec: sl.Spec, factor: float) -> sl.Spec:
    if spec.alpha is not None:
        return spec.replace(alpha=spec.alpha * factor)
    return spec.replace(scale=spec.scaling * factor)


def reversed_kronecker(tensors: Sequence[Tensor]) -> Tensor:
    return kronecker(list(tensors)[::-1])


def added(tensors: Sequence[Tensor]) -> Tensor:
    return functools.reduce(operator.add, tensors)


def checks_of(ours: Ours, block: str) -> list[Callable[[Case, Ours], None]]:
    """Return the checks that a wrong block must fail.

    The update is linear in every block, whose own gradient thus does not depend on it.
    """
    name = next(name for name in ours.plan.shapes if block in ours.plan.blocks_of(name))
    others = set(ours.plan.blocks_of(name)) & set(ours.plan.factor_shapes) - {block}
    return [check_updates, check_forward, *([check_gradients] if others else [])]


@contextlib.contextmanager
def failing(what: str) -> Iterator[None]:
    try:
        yield
    except AssertionError:
        return
    pytest.fail(f"{what} was not noticed")


@every_row
@pytest.mark.parametrize("factor", [0.5, -1.0])
def test_a_wrong_scale_is_noticed(row, factor):
    case = row.build(row.example)
    ours = case.ours(changed_scale(case.spec, factor))
    for check in (check_updates, check_forward, check_gradients):
        with failing(f"{check.__name__}: a scale times {factor}"):
            check(case, ours)


@every_row
@pytest.mark.parametrize("wrong", [backwards, misread, negated])
def test_a_wrong_block_is_noticed(row, wrong):
    case = row.build(row.example)
    ours = case.ours()
    tried = 0
    for block, take in ours.takes.items():
        values = take.values()
        if torch.equal(wrong(values), values):  # a vector has one reading
            continue
        tried += 1
        ours.put(block, wrong(values))
        for check in checks_of(ours, block):
            with failing(f"{check.__name__}: {block} {wrong.__name__}"):
                check(case, ours)
        ours.put(block, values)
    assert tried or (wrong is misread and row.preset == "dense")


@every_row
def test_two_blocks_changed_for_each_other_are_noticed(row):
    case = row.build(row.example)
    ours = case.ours()
    blocks = [block for block in ours.plan.blocks_of("layers.a") if block in ours.takes]
    if len(blocks) == 1:
        assert row.preset in ("dense", "lora_xs")
    for one, other in itertools.pairwise(blocks):
        first, second = (ours.takes[block].values() for block in (one, other))
        entries = torch.cat([second.reshape(-1), first.reshape(-1)])
        ours.put(one, entries[: first.numel()].reshape(first.shape))
        ours.put(other, entries[first.numel() :].reshape(second.shape))
        for check in (check_updates, check_forward):
            with failing(f"{check.__name__}: {one} and {other} changed for each other"):
                check(case, ours)
        ours.put(one, first)
        ours.put(other, second)


@every_row
def test_another_product_is_noticed(row):
    case = row.build(row.example)
    if case.spec.splits == 1:
        assert row.preset not in ("loha", "lokr", "krona", "lonkr", "vera")
        return
    target, wrong = "kronecker", reversed_kronecker
    if case.spec.combine == "hadamard":
        target, wrong = "hadamard", added
    with mock.patch.object(reconstruct, target, wrong), failing(f"{wrong.__name__}"):
        check_updates(case, case.ours())


@every_row
def test_a_wrong_number_of_parameters_is_noticed(row):
    case = row.build(row.example)
    ours = case.ours()
    plan = sl.Plan(case.spec.replace(terms=case.spec.terms + 1), ours.plan.shapes)
    with mock.patch.object(ours, "plan", plan), failing("one more term"):
        check_count(case, ours)
