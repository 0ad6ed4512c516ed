"""Presets of blocks and of shared matrices: their scales, and what they refuse."""

from __future__ import annotations

import pytest

import superlora as sl

SHAPES = {"q": (6, 4), "v": (4, 8)}


@pytest.mark.parametrize(
    ("spec", "scaling"),
    [
        (sl.gralora(8, 2, alpha=16), 2),
        (sl.gralora(16, 2, alpha=16, rslora=True), 4),
        (sl.gralora(8, 2, scale=0.5), 0.5),
        (sl.gralora(8, 2), 1),
        (sl.cdka(terms=4, alpha=16), 4),
        (sl.share_lora(8, alpha=16), 2),
        (sl.metatt(8, alpha=16), 2),
    ],
)
def test_alpha_is_divided_by_the_methods_own_rank(spec, scaling):
    assert spec.scaling == scaling


@pytest.mark.parametrize("which", ["A", "B", "AB"])
def test_what_is_shared_is_one_block(which):
    plan = sl.Plan(sl.share_lora(2, which), SHAPES)
    sides = {"B": ("factor0", [6, 4], 6), "A": ("factor1", [4, 8], 8)}
    expected = {}
    for side, (leaf, widths, largest) in sides.items():
        own = {0: largest} if side in which else dict(enumerate(widths))
        expected |= {f"{group}.0.{leaf}": (width, 2) for group, width in own.items()}
    assert plan.factor_shapes == expected


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sl.gralora(6, 4), ValueError, "rank must be a multiple of blocks=4: got 6"),
        (lambda: sl.gralora(0), ValueError, "rank must be at least 1: got 0"),
        (lambda: sl.gralora(4, 0), ValueError, "blocks must be at least 1: got 0"),
        (lambda: sl.gralora(4, alpha="8"), TypeError, "alpha must be a number: got '8'"),
        (lambda: sl.gralora(4, alpha=8, scale=1), ValueError, "alpha must not be given beside"),
        (lambda: sl.gralora(64), ValueError, "terms must be at most 16: got 32"),
        (lambda: sl.monarch(rank=4), TypeError, r"monarch\(\) must have no rank"),
        (lambda: sl.cdka(rank=4), TypeError, r"cdka\(\) must have no rank"),
        (lambda: sl.share_lora(4, "C"), ValueError, "which must be one of 'A', 'B', 'AB': got 'C'"),
        (lambda: sl.metatt((2, 2, 2)), ValueError, "rank must have 2 entries, the ranks between 3"),
    ],
)
def test_what_a_preset_cannot_be_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (sl.gralora(4, 4), "fold must divide the 6 outputs of a weight"),
        (sl.monarch(4), "fold must divide the 6 outputs of a weight"),
        (sl.miss(3), "fold must divide the 4 inputs of a weight"),
        (sl.miss(2, mini=4), "fold must divide the 6 outputs of a weight"),
        (sl.cdka(4, 2), "fold must divide the 6 outputs of a weight"),
        (sl.metatt(2), "fold='stack' of order 3 must have whole weights of one shape"),
    ],
)
def test_widths_that_a_preset_cannot_serve_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        sl.Plan(spec, SHAPES)


def test_blocks_that_are_not_trained_are_ones():
    plan = sl.Plan(sl.gralora(4, 2), SHAPES)
    assert set(plan.layout.frozen.values()) == {"ones"}
    assert all((block == 1).all() for block in plan.frozen().values())
    assert plan.num_parameters == 4 * (10 + 12)
