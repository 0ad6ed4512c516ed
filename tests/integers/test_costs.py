"""Which way of applying an update is cheapest, by counts of operations."""

import pytest

import superlora as sl
from superlora import maps
from superlora.costs import APPLY, FORMED, Machine, check_apply, choose, kronecker_order
from tests.strategies import make_plan

SQUARE = {"q": (768, 768)}
TOKENS = 256


def chosen(spec, shapes=SQUARE, tokens=TOKENS, **options):
    layout = make_plan(spec, shapes).layout
    return choose(layout, next(iter(shapes)), Machine(), tokens, trained=True, **options)


@pytest.mark.parametrize(
    ("spec", "way"),
    [
        (sl.lora(rank=8), "low_rank"),
        (sl.loha(rank=8), "low_rank"),
        (sl.loha(rank=32), FORMED),
        (sl.lokr(rank=8), "kronecker"),
        (sl.lonkr(rank=8, splits=3), "kronecker"),
        (sl.krona(), "kronecker"),
        (sl.fourierft(), "fourier"),
        (sl.dense(), FORMED),
        (sl.Spec(rank="full"), FORMED),
        (sl.Spec(rank=8, order=3, fold=(94, 97, 65)), FORMED),
        (sl.Spec(rank=8, fold="aligned", order=3), "low_rank"),
        (sl.Spec(rank=8, fold="aligned", map=maps.Separable(), ratio=0.1), "low_rank"),
        (sl.Spec(rank=8, fold="balanced", map=maps.Fastfood(), ratio=0.1), FORMED),
    ],
)
def test_the_cheapest_way_is_taken(spec, way):
    assert chosen(spec, fused=True) == way


def test_the_number_of_tokens_decides():
    """Forming costs once what each token saves."""
    spec = sl.lora(rank=256)
    ways = [chosen(spec, tokens=tokens, fused=True) for tokens in (1, 16, 1 << 20)]
    assert ways == ["low_rank", "low_rank", FORMED]


def test_forming_pays_later_where_it_cannot_replace_the_layers_own_product():
    spec = sl.lora(rank=300)
    assert chosen(spec, tokens=1 << 16, fused=True) == FORMED
    assert chosen(spec, tokens=1 << 16, fused=False) == "low_rank"


@pytest.mark.parametrize("spec", [sl.lora(), sl.lokr(), sl.fourierft(), sl.loha(32)])
def test_a_way_can_be_forced(spec):
    for tokens in (1, TOKENS, 1 << 20):
        assert chosen(spec, tokens=tokens, apply=FORMED) == FORMED
        assert chosen(spec, tokens=tokens, apply="factored") != FORMED


def test_weights_without_a_factored_way_are_named():
    spec = sl.Spec(rank=2, groups=1, fold="balanced")
    layout = make_plan(spec, {"a.q": (6, 5), "a.v": (7, 5)}).layout
    with pytest.raises(ValueError, match=r"apply must be 'auto' or 'formed' for 'a.q', 'a.v'"):
        check_apply("factored", layout)
    with pytest.raises(ValueError, match=r"apply must be 'auto' or 'formed' for 'a.q', whose"):
        choose(layout, "a.q", Machine(), 1, "factored")
    for apply in ("auto", "formed"):
        check_apply(apply, layout)


@pytest.mark.parametrize("apply", ["fast", "", None, 3, ["auto"]])
def test_other_words_are_refused(apply):
    with pytest.raises(ValueError, match=rf"apply must be one of '{APPLY[0]}'"):
        check_apply(apply)


@pytest.mark.parametrize("spec", [sl.lokr(rank=8), sl.lonkr(rank=8, splits=3), sl.krona()])
def test_the_order_of_digits_costs_least(spec):
    """Each digit costs its matrix times all other digits; every order is tried by hand."""
    import itertools
    import math

    splits = make_plan(spec, {"q": (24, 96)}).layout.terms(0)[0]

    def cost(order):
        sizes = [split.shape[1] for split in splits]
        total = 0
        for index in order:
            rows, columns = splits[index].shape
            low = 2 * splits[index].ranks[1] * (rows + columns) < rows * columns
            low = low and splits[index].factored[1]
            each = splits[index].ranks[1] * (rows + columns) if low else rows * columns
            total += math.prod(sizes) // columns * each
            sizes[index] = rows
        return total

    best = min(map(cost, itertools.permutations(range(len(splits)))))
    assert cost(kronecker_order(splits)) == best


def test_counts_of_lora():
    """A token of LoRA: r (do + di) multiplications, and nothing else grows with the weight."""
    work = make_plan(sl.lora(rank=8), {"q": (640, 512)}).layout.ways("q")["low_rank"]
    assert work.multiplied == 8 * (640 + 512)
    assert work.moved < 3 * (640 + 512)
