"""Which way of applying an update is cheapest, by counts of operations."""

import functools
import itertools
import math

import numpy
import pytest

import superlora as sl
from superlora import maps
from superlora.design import cost_rule
from superlora.design.contraction import BALANCE, TOKENS, Cost, contract
from superlora.design.cost_rule import APPLY, check_apply
from superlora.design.network import FEW, MANY, network_of
from tests.strategies import make_plan

SQUARE = {"q": (768, 768)}
COUNT = 256


def application(spec, shapes=SQUARE):
    return cost_rule.application(make_plan(spec, shapes).layout, next(iter(shapes)))


def is_formed(spec, tokens=COUNT, **options):
    return application(spec).formed(tokens, trained=True, **options)


@pytest.mark.parametrize(
    ("spec", "formed"),
    [
        (sl.lora(rank=8), False),
        (sl.loha(rank=8), False),
        (sl.loha(rank=32), True),
        (sl.lokr(rank=8), False),
        (sl.lonkr(rank=8, splits=3), False),
        (sl.krona(), False),
        (sl.fourierft(), False),
        (sl.dense(), True),
        (sl.Spec(rank="full"), True),
        (sl.Spec(rank=8, order=3, fold=(94, 97, 65)), True),
        (sl.Spec(rank=8, fold="aligned", order=3), False),
        (sl.Spec(rank=8, fold="aligned", map=maps.Separable(), ratio=0.1), False),
        (sl.Spec(rank=8, fold="balanced", map=maps.Fastfood(), ratio=0.1), True),
    ],
)
def test_the_cheapest_way_is_taken(spec, formed):
    assert is_formed(spec, fused=True) == formed


NEVER = {
    "misfit": sl.Spec(rank=8, order=3, fold=(94, 97, 65)),
    "mixed": sl.Spec(rank=8, fold="balanced", map=maps.Fastfood(), ratio=0.1),
    "one-hot": sl.dense(map=maps.OneHot(), ratio=0.1),
}


@pytest.mark.parametrize("spec", NEVER.values(), ids=NEVER)
def test_what_can_only_be_formed_has_no_network_with_inputs(spec):
    found = application(spec)
    assert found.factored is None
    assert found.formed(1)
    assert str(found) == "formed"


def test_the_number_of_tokens_decides():
    """Forming costs once what each token saves."""
    spec = sl.lora(rank=256)
    assert [is_formed(spec, tokens, fused=True) for tokens in (1, 16, 1 << 20)] == [
        False,
        False,
        True,
    ]


def test_forming_pays_later_where_it_cannot_replace_the_layers_own_product():
    spec = sl.lora(rank=300)
    assert is_formed(spec, 1 << 16, fused=True)
    assert not is_formed(spec, 1 << 16, fused=False)


@pytest.mark.parametrize("spec", [sl.lora(), sl.lokr(), sl.fourierft(), sl.loha(32)])
def test_a_way_can_be_forced(spec):
    for tokens in (1, COUNT, 1 << 20):
        assert is_formed(spec, tokens, apply="formed", fused=True)
        assert not is_formed(spec, tokens, apply="factored", fused=True)


def test_weights_without_a_factored_way_are_named():
    spec = sl.Spec(rank=2, groups=1, fold="balanced")
    plan = make_plan(spec, {"a.q": (6, 5), "a.v": (7, 5)})
    with pytest.raises(ValueError, match=r"apply must be 'auto' or 'formed' for 'a.q', 'a.v'"):
        check_apply("factored", plan.layout)
    with pytest.raises(ValueError, match=r"apply must be 'auto' or 'formed' for 'a.q', whose"):
        plan.apply(plan.init(like=float), "a.q", numpy.zeros(5), apply="factored")
    for apply in ("auto", "formed"):
        check_apply(apply, plan.layout)


@pytest.mark.parametrize("apply", ["fast", "", None, 3, ["auto"]])
def test_other_words_are_refused(apply):
    with pytest.raises(ValueError, match=rf"apply must be one of '{APPLY[0]}'"):
        check_apply(apply)


# Each of them a single network with its inputs.
NETWORKS = {
    "lora": (sl.lora(rank=8), (24, 96)),
    "loha": (sl.loha(rank=3), (24, 96)),
    "lokr": (sl.lokr(rank=8), (24, 96)),
    "lokr of two": (sl.lokr(rank=2, decompose_both=True), (24, 96)),
    "lonkr": (sl.lonkr(rank=2, splits=3), (24, 96)),
    "krona": (sl.krona(), (24, 96)),
    "vera": (sl.vera(rank=4), (24, 96)),
    "aligned": (sl.Spec(rank=4, fold="aligned", order=3), (24, 96)),
    "balanced, a digit in two": (sl.Spec(rank=2, order=3, fold=(12, 16, 12)), (24, 96)),
}


def work_of(one, other, kept, output, sizes):
    """Return what a contraction costs: multiplications of a matrix product, entries else.

    Where the product of matrices has its labels in no order that the output goes on with, it is
    copied; with tokens the inputs would have to be instead.
    """
    entries = math.prod(sizes[label] for label in one | other)
    common = one & other
    both = common & kept
    if common == both or (both and (one == common or other == common)):
        return BALANCE * entries
    if TOKENS in kept:
        return entries
    order = [label for label in output if label in kept]
    for first, second in ((one, other), (other, one)):
        if order == sorted(
            order, key=lambda own: (own not in both, own in second, own not in first)
        ):
            return entries
    return entries + BALANCE * math.prod(sizes[label] for label in kept)


def least(operands, output, sizes, frozen=()):
    """Return the least cost of all orders of pairwise contractions, and how many are tried."""
    terms = [frozenset(own) for own in operands]
    everything = frozenset(range(len(terms)))

    def labels(subset):
        inside = frozenset().union(*(terms[index] for index in subset))
        outside = frozenset(output).union(*(terms[index] for index in everything - subset))
        return inside & outside

    @functools.cache
    def work(subset):
        if len(subset) == 1:
            return 0
        first, *rest = sorted(subset)
        found = []
        for count in range(len(rest)):
            for others in itertools.combinations(rest, count):
                one = frozenset({first, *others})
                two = subset - one
                own = work_of(labels(one), labels(two), labels(subset), output, sizes)
                passes = 1 + sum(bool(part - frozenset(frozen)) for part in (one, two))
                found.append(passes * own + work(one) + work(two))
        return min(found)

    return work(everything)


def cost_of(path, sizes, frozen=()):
    """Return the cost of a path by the same counts, step by step."""
    labels = list(map(frozenset, path.operands))
    trained = [place not in frozen for place in range(len(labels))]
    total = 0
    for step, own in zip(path.steps, path.labels[len(path.operands) :], strict=True):
        sides = (step.left, step.right)
        work = work_of(*(labels[side] for side in sides), frozenset(own), path.output, sizes)
        total += work * (1 + sum(trained[side] for side in sides))
        labels.append(frozenset(own))
        trained.append(any(trained[side] for side in sides))
    return total


@pytest.mark.parametrize("which", ["few", "many", "formed"])
@pytest.mark.parametrize("key", NETWORKS)
def test_the_order_of_contractions_costs_least(key, which):
    """Of every network with its inputs, and of the one that forms: all orders are tried."""
    spec, shape = NETWORKS[key]
    layout = make_plan(spec, {"q": shape}).layout
    found = cost_rule.application(layout, "q").factored
    assert found.opened is None
    network = network_of(layout, "q")
    sources, terms, first = network.sources, network.terms(), 0
    if which != "formed":
        sources, terms, first = found.sources, getattr(found, which), 1
    for term in terms:
        path = term.contraction
        frozen = {
            first + place
            for place, own in enumerate(term.operands)
            if sources[own.source].block in layout.frozen
        }
        assert bool(frozen) == (key == "vera")
        sizes = {**path.sizes, TOKENS: {"few": FEW, "many": MANY}.get(which, 0)}
        assert cost_of(path, sizes, frozen) == least(path.operands, path.output, sizes, frozen)


def test_what_an_order_costs_can_be_more():
    """LoRA's two thin products against the product of its factors first, and back."""
    operands, output, sizes = [(TOKENS, 1), (0, 2), (1, 2)], (TOKENS, 0), {0: 9, 1: 7, 2: 2}
    thin, formed = (contract(operands, output, sizes, tokens) for tokens in (1, 10**6))
    assert thin.cost == formed.cost == Cost(0, 2 * (9 + 7), 2 * (9 + 7), 7 + 2 + 2 + 9)
    for tokens in (1, 10**6):
        real = {**sizes, TOKENS: tokens}
        assert least(operands, output, real) == 3 * tokens * 2 * (9 + 7)
        # At a rank that is larger than what lies on its sides.
        real[2] = wide = 20
        found = contract(operands, output, real, tokens)
        product, factors = 3 * tokens * 9 * 7, 3 * 9 * 7 * wide
        assert least(operands, output, real) == min(product + factors, 3 * tokens * wide * 16)
        assert cost_of(found, real) == least(operands, output, real)


def test_a_result_is_not_transposed_where_another_order_costs_about_as_much():
    """A core with two factors and an open rank: the copy of 64 x 98 x 4 entries is saved."""
    operands, output = [(3, 4, 5), (0, 3), (1, 4)], (0, 1, 5)
    sizes = {3: 4, 4: 4, 5: 4, 0: 64, 1: 98}
    found = contract(operands, output, sizes)
    assert found.axes is None
    assert found.steps[-1].pair.axes is None
    fewest = contract(operands, (1, 0, 5), sizes)
    assert fewest.axes is None
    assert fewest.cost.multiplications < found.cost.multiplications


@pytest.mark.parametrize(("frozen", "other"), [(3, 2), (2, 3)])
def test_gradients_that_frozen_blocks_have_not_are_not_counted(frozen, other):
    """A diagonal core is multiplied into the factor that has a gradient of its own."""
    operands, output = [(TOKENS, 1), (2,), (0, 2), (1, 2)], (TOKENS, 0)
    sizes = {0: 10, 1: 10, 2: 4}
    found = contract(operands, output, sizes, MANY, frozenset({frozen}))
    assert {1, other} in [{step.left, step.right} for step in found.steps]


def test_counts_of_lora():
    """A token of LoRA: r (do + di) multiplications, and nothing else grows with the weight."""
    found = application(sl.lora(rank=8), {"q": (640, 512)})
    for cost in found.factored.costs:
        assert cost.each_multiplications == 8 * (640 + 512)
        assert cost.each_moved < 3 * (640 + 512)
        assert cost.multiplications == 0
        assert cost.moved == 8 * (640 + 512)
    assert found.forming.multiplications == 8 * 640 * 512
    assert found.forming.each_multiplications == found.forming.each_moved == 0
    # Read, written by the product, and once more as the update.
    assert found.forming.moved == 8 * (640 + 512) + 2 * 640 * 512


SWITCHED = {
    "loha": sl.loha(rank=8),
    "loha, large": sl.loha(rank=32),
    "aligned": sl.Spec(rank=8, fold="aligned", order=3),
}


@pytest.mark.parametrize("spec", SWITCHED.values(), ids=SWITCHED)
def test_another_order_is_taken_from_the_number_of_tokens_on_at_which_it_costs_less(spec):
    found = application(spec).factored
    few, many = found.costs
    assert 1 < found.switch < MANY
    assert many.of(found.switch) < few.of(found.switch)
    assert many.of(found.switch - 1) >= few.of(found.switch - 1)
    assert found.terms(found.switch) is found.many
    assert found.terms(found.switch - 1) is found.few


def formed_cost(shape, forming, tokens, trained, fused):
    """Return what a formed update costs, by the text: W₀ + ΔW is formed, written and read.

    With a backward pass it is formed again, and two products as large give the gradients of what
    it is made of; that of the sum is one more product. Where it is no part of the layer's own
    product there is one more, and two in the backward pass.
    """
    entries = math.prod(shape)
    once = forming.multiplications + BALANCE * (forming.moved + 3 * entries)
    each = entries * trained
    if not fused:
        each += entries * (2 if trained else 1) + BALANCE * sum(shape)
    return once * (4 if trained else 1) + tokens * each


BOUNDED = {
    "lora": sl.lora(rank=256),
    "loha": sl.loha(rank=32),
    "lokr": sl.lokr(rank=8),
    "fourierft": sl.fourierft(),
    "dense": sl.dense(),
    "opened": sl.Spec(rank=8, fold="aligned", order=3),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("spec", BOUNDED.values(), ids=BOUNDED)
def test_an_update_is_formed_from_the_number_of_tokens_on_at_which_that_costs_less(
    spec, trained, fused
):
    shape = (768, 512)
    found = application(spec, {"q": shape})
    bound = found.bounds[trained, fused]

    def gain(tokens):
        cost = found.factored.costs[tokens >= found.factored.switch]
        factored = (3 if trained else 1) * cost.of(tokens)
        return factored - formed_cost(shape, found.forming, tokens, trained, fused)

    options = {"trained": trained, "fused": fused}
    if bound is None:
        assert gain(1 << 40) <= 0
        assert not found.formed(1 << 40, **options)
        return
    assert gain(bound) > 0 >= gain(bound - 1)
    assert found.formed(bound, **options)
    assert not found.formed(bound - 1, **options)


def test_some_updates_are_formed_from_some_number_of_tokens_on_and_some_never():
    every = [bound for spec in BOUNDED.values() for bound in application(spec).bounds.values()]
    assert None in every
    assert len({bound for bound in every if bound is not None}) > len(BOUNDED)
