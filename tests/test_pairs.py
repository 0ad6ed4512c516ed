"""The cases of `pairwise`: every two values meet, in few cases, and always in the same ones."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pairs import cover, in_turn, pairwise


@given(st.lists(st.integers(1, 6), min_size=2, max_size=6))
def test_any_two_places_meet(sizes):
    cases = cover(sizes)
    for one, other in itertools.combinations(range(len(sizes)), 2):
        met = {(case[one], case[other]) for case in cases}
        assert met == set(itertools.product(range(sizes[one]), range(sizes[other])))
    assert len(set(cases)) == len(cases)
    assert cases == cover(sizes)


@pytest.mark.parametrize(
    ("sizes", "most"), [((7, 6, 2, 3, 3), 42), ((51, 4, 3), 204), ((3,) * 4, 12), ((2,) * 10, 10)]
)
def test_there_are_few(sizes, most):
    assert len(cover(sizes)) <= most


def test_names_and_values_of_the_cases():
    mark = pairwise({"key": {"a": 1, "b": 2}, "shape": [(), (3,)]}, indirect=["key"]).mark
    names, cases = mark.args
    assert names == ["key", "shape"]
    assert {(case.id, case.values) for case in cases} == {
        ("a-()", (1, ())),
        ("a-(3,)", (1, (3,))),
        ("b-()", (2, ())),
        ("b-(3,)", (2, (3,))),
    }
    assert mark.kwargs["indirect"] == ["key"]


def test_every_pair_is_a_case_and_every_value_a_quick_one():
    cases = in_turn("key", "abcde", "size", (1, 2)).mark.args[1]
    assert {case.values for case in cases} == set(itertools.product("abcde", (1, 2)))
    quick = [case.id for case in cases if not case.marks]
    assert quick == ["a-1", "b-2", "c-1", "d-2", "e-1"]
