"""Every named method is what its peer, or its paper, says: update, forward, gradients, count."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import superlora as sl
from tests.reductions.cases import (
    check_count,
    check_forward,
    check_gradients,
    check_merged,
    check_updates,
)
from tests.reductions.rows import ROWS

pytestmark = pytest.mark.filterwarnings("ignore:no Kronecker structure")
every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def test_every_preset_has_a_row():
    """But those of several merge operations, whose reductions are tests of their own."""
    several = {"glora", "bitfit", "ssf", "ia3", "repadapter", "prompt_add"}
    assert set(sl.presets.__all__) - several <= {row.preset for row in ROWS.values()}
    own = "".join(path.read_text("utf-8") for path in Path(__file__).parent.glob("test_glora_*.py"))
    assert all(f"sl.{name}(" in own for name in several)


@every_row
@settings(max_examples=16, suppress_health_check=[HealthCheck.filter_too_much])
@given(data=st.data())
def test_equals_the_peer(row, data):
    case = row.build(data.draw(row.drawn))
    ours = case.ours()
    check_count(case, ours)
    check_updates(case, ours)
    check_forward(case, ours)


@every_row
@settings(max_examples=6, suppress_health_check=[HealthCheck.filter_too_much])
@given(data=st.data())
def test_gradients_equal_the_peers(row, data):
    case = row.build(data.draw(row.drawn))
    check_gradients(case, case.ours())


@every_row
def test_example(row):
    case = row.build(row.example)
    for check in (check_count, check_updates, check_forward, check_gradients, check_merged):
        check(case, case.ours())


@pytest.mark.parametrize("name", ["vera-peft", "vera-paper"])
def test_vera_may_have_a_rank_beyond_the_widths(name):
    # Its factors are not trained: a larger rank is more numbers d, as with PEFT's default of 256.
    row = ROWS[name]
    case = row.build(dataclasses.replace(row.example, rank=20))
    for check in (check_count, check_updates, check_forward, check_gradients):
        check(case, case.ours())
