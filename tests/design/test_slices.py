"""Boxes: a range of a folded group as slices of its digits."""

from __future__ import annotations

import math

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from superlora.design.slices import boxes, slice_of


@st.composite
def ranges(draw):
    radices = draw(st.lists(st.integers(1, 6), max_size=6))
    total = math.prod(radices)
    start = draw(st.integers(0, total - 1))
    return radices, start, draw(st.integers(start + 1, total))


def positions(radices, found):
    """List the flat positions that boxes hold, each box in row-major order."""
    flat = numpy.arange(math.prod(radices)).reshape(radices)
    return [
        int(position) for box in found for position in flat[tuple(slice(*d) for d in box)].ravel()
    ]


@given(ranges())
def test_boxes_list_the_range_once_and_in_order(problem):
    radices, start, stop = problem
    found = list(boxes(radices, start, stop))
    assert positions(radices, found) == list(range(start, stop))
    assert all(len(box) == len(radices) for box in found)
    assert len(found) <= max(1, 2 * len(radices) - 1)


@given(ranges())
def test_a_slice_holds_the_range_after_its_skip_and_little_more(problem):
    radices, start, stop = problem
    part = slice_of(radices, start, stop)
    held = positions(radices, part.boxes)
    assert part.size == stop - start
    assert held[part.skip : part.skip + part.size] == list(range(start, stop))
    assert held == list(range(held[0], held[-1] + 1))
    assert len(held) < 1.25 * part.size or len(held) == part.size


@pytest.mark.parametrize(
    ("radices", "start", "stop", "count"),
    [
        ((24, 768, 768), 768 * 768, 2 * 768 * 768, 1),  # a layer of a stack
        ((3456, 4096), 144 * 5 * 4096, 144 * 6 * 4096, 1),  # a weight that is whole rows
        ((54, 64, 64, 64), 768 * 768 * 3, 768 * 768 * 4, 3),  # 2.25 slices of mode 0
        ((1190, 1190), 768 * 768, 2 * 768 * 768, 1),  # unaligned: a few rows wider
    ],
)
def test_a_weight_of_a_known_model_is_few_boxes(radices, start, stop, count):
    assert len(slice_of(radices, start, stop).boxes) <= count


def test_no_range_has_no_boxes():
    assert list(boxes((3, 4), 5, 5)) == []
