"""A training step costs what the method's formula says: counted, so that no noise hides it.

Every bound is a formula of sizes and ranks. Work that is done twice, an update formed where
factors would do, a group formed for each of its layers, or a formed weight kept: each exceeds one.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

import superlora as sl
import superlora.torch as slt
from superlora import maps
from superlora.design import contraction
from superlora.torch import operands, update
from superlora.torch.scope import Scope
from tests.torch.counting import FEW, MANY, MODELS, WEIGHT, count, make_chain

DEPTH = 2
FLOAT = 4
# Distinct inputs of a block's adapted layers: each is kept once, whatever number of layers read it.
INPUTS = {"llama": 128 + 128 + 128 + 352, "vit": 128}
# What a few scalings of small tensors may add.
SLACK = 1.02


@dataclass(frozen=True)
class Case:
    """A method, how it is applied, and what it may cost above the frozen model.

    Attributes
    ----------
    spec : Spec
        The method.
    way : str
        As `attach` takes it.
    token : callable
        Takes a weight's rows and columns; returns flops a token.
    once : callable
        Takes all shapes; returns flops however many tokens there are.
    reduced : callable
        Takes a weight's rows and columns; returns entries kept a token beside the inputs.
    made : callable
        Takes all shapes; returns the entries of what updates are made of.
    large : int
        Tensors of a weight's size, a layer.
    large_once : int
        And for all layers together.
    kind : str
        The model.
    """

    spec: sl.Spec
    way: str
    token: Callable[[int, int], float]
    once: Callable[[list[tuple[int, int]]], float] = lambda shapes: 0
    reduced: Callable[[int, int], float] = lambda rows, columns: 0
    made: Callable[[list[tuple[int, int]]], float] = lambda shapes: 0
    large: int = 0
    large_once: int = 0
    kind: str = "llama"


def entries(shapes):
    return sum(rows * columns for rows, columns in shapes)


def low_rank(spec, rank, last=None, modes=2, *, passes=(3, 3), **options):
    """Return a case of ``left (I ⊗ right)``: three products with each, over q blocks of inputs."""

    def blocks_of(columns):
        return columns // (last or columns)

    def token(rows, columns):
        return 2 * rank * (passes[0] * blocks_of(columns) * rows + passes[1] * columns)

    def opened(shapes):  # entries of the rows of all modes but the last
        return sum(rank * rows * blocks_of(columns) for rows, columns in shapes)

    def once(shapes):  # made, made again and both gradients; in the last mode above all
        return 4 * 2 * opened(shapes) * rank * 1.2 if modes > 2 else 0

    def made(shapes):
        # Mapped or scaled, and once more where a transpose is read faster.
        return 2 * (opened(shapes) + rank * sum(last or columns for _, columns in shapes))

    def reduced(rows, columns):
        return rank * blocks_of(columns)

    return Case(spec, "factored", token, once, reduced, made, **options)


def kronecker(spec, sizes):
    """Return a case of a product with matrices of (rows, columns, rank), 0 for a dense one."""

    def thin(rows, columns, rank):  # its two factors are applied instead
        return rank and 2 * rank * (rows + columns) < rows * columns

    def steps(*shape):
        """Return multiplications and kept entries a token, in the order of the least work."""
        found = []
        for order in itertools.permutations(reversed(sizes[shape])):
            width, work, kept = shape[1], 0, 0
            for matrix in order:
                rows, columns, rank = matrix
                rest = width // columns
                work += rest * (rank * (rows + columns) if thin(*matrix) else rows * columns)
                width = rest * rows
                kept += width + (rest * rank if thin(*matrix) else 0)
            # The output is not kept; where another digit than the last is first, inputs are turned.
            turned = order[0] is not sizes[shape][-1]
            found.append((work, kept - shape[0] + turned * shape[1]))
        return min(found)

    def once(shapes):  # of a matrix that is the product of two
        return 3 * 2 * sum(math.prod(matrix) for shape in shapes for matrix in sizes[shape])

    def made(shapes):
        return sum(rows * columns for shape in shapes for rows, columns, _ in sizes[shape])

    def token(*shape):
        return 3 * 2 * steps(*shape)[0]

    return Case(spec, "factored", token, once, lambda *shape: steps(*shape)[1], made)


def formed(spec, rank, large=6, *, opened=0, **options):
    """Return a case of ``W₀ + ΔW``: one product more, the weight's gradient.

    Formed is it twice, with two products for its gradient; `opened` is the last mode of a group
    whose opened rows are made once.
    """

    def once(shapes):
        rows = entries(shapes) / opened * rank if opened else 0
        return 4 * 2 * (entries(shapes) * rank + rows * rank * 1.2)

    def made(shapes):
        return rank * (entries(shapes) / opened + opened) if opened else 0

    return Case(spec, "formed", one_product, once, made=made, large=large, **options)


def one_product(rows, columns):
    return 2 * rows * columns


def one_group(fold, rank, **fields):
    return sl.Spec(rank=rank, groups=1, fold=fold, **fields)


def mapped(fixed, large, large_once, transforms=0, made=0.1):
    """Return a case of a map of a tenth as many entries, which are made once for all layers."""

    def once(shapes):
        return 4 * 2 * 8 * 0.1 * entries(shapes) + transforms

    return Case(
        one_group("balanced", 8, ratio=0.1, map=fixed),
        "formed",
        one_product,
        once,
        made=lambda shapes: made * entries(shapes),
        large=large,
        large_once=large_once,
    )


# By products with Hadamard matrices of these sizes: forward and backward, every block at its
# first transform alone, all of them at the second.
STACKED = 2 * (1 + 7) * (32 * 32 * 64) * 2 * (32 + 32 + 64)
SEPARABLE = 2 * 4 * 2 * (16 * 32 * 32 * (16 + 32 + 32) + 64 * 64 * (64 + 64))
LOKR = {
    (128, 128): [(8, 8, 0), (16, 16, 2)],
    (352, 128): [(16, 8, 0), (22, 16, 2)],
    (128, 352): [(8, 16, 0), (16, 22, 2)],
}
LONKR = {
    (128, 128): [(4, 4, 0), (4, 4, 0), (8, 8, 8)],
    (352, 128): [(4, 4, 0), (8, 4, 0), (11, 8, 8)],
    (128, 352): [(4, 4, 0), (4, 8, 0), (8, 11, 8)],
}
CASES = {
    "lora": low_rank(sl.lora(8), 8),
    "lora, formed": formed(sl.lora(8), 8),
    "lokr": kronecker(sl.lokr(2), LOKR),
    "lonkr": kronecker(sl.lonkr(8, splits=3), LONKR),
    "loha": low_rank(sl.loha(2), 4, large=0),
    "loha, formed": formed(sl.loha(8), 16, large=12),
    "lotr": low_rank(sl.lotr(8), 8, modes=3, kind="vit"),
    "fact_tt": low_rank(sl.fact_tt(8), 8, modes=3, kind="vit"),
    # The right factor is frozen and has no gradient.
    "vera": low_rank(sl.vera(8), 8, passes=(3, 2)),
    "unilora": low_rank(sl.unilora(256, 4), 4),
    "fourierft": Case(sl.fourierft(100), "factored", lambda rows, columns: 0),
    # Large once are a group's opened rows and their gradient.
    "2-D aligned": low_rank(one_group("aligned", 4), 4, 32, large_once=1),
    "3-D aligned": low_rank(sl.lorta(4, fold="aligned"), 4, 32, 3, large_once=4),
    "4-D aligned": low_rank(sl.lorta(2, order=4, fold="aligned"), 2, 16, 4, large_once=4),
    "2-D balanced": formed(one_group("balanced", 8), 8, opened=784),
    "3-D balanced": formed(sl.lorta(8), 8, opened=98, large_once=4),
    "2-D + separable": replace(
        low_rank(one_group("aligned", 4, ratio=0.1, map=maps.Separable()), 4, 32, large_once=58),
        once=lambda shapes: SEPARABLE,
    ),
    "2-D + one-hot": mapped(maps.OneHot(), 10, 8),
    "2-D + fastfood": mapped(maps.Fastfood(blocks="stacked"), 6, 48, STACKED, made=1),
    "dense": formed(sl.dense(), 0, large=4),
}


every_case = pytest.mark.parametrize("key", CASES)


def attached(case, depth=DEPTH):
    """Return the adapted model and the frozen one."""
    model, limit = (make_chain(case.kind, depth) for _ in range(2))
    adapter = slt.attach(model, case.spec, MODELS[case.kind][1], apply=case.way)
    return model, limit, adapter


def exceeded(case):
    """Return which bounds a step exceeds, and by how much."""
    model, limit, adapter = attached(case)
    shapes = list(adapter.plan.shapes.values())
    count(model, FEW)  # draws what maps keep
    few, many = (count(model, tokens) - count(limit, tokens) for tokens in (FEW, MANY))
    a_token = (many.flops - few.flops) / (MANY - FEW)
    inputs = FLOAT * FEW * DEPTH * INPUTS[case.kind]
    reduced = FLOAT * FEW * sum(case.reduced(*shape) for shape in shapes)
    made = FLOAT * case.made(shapes)
    gradients = FLOAT * adapter.num_parameters
    # Formed: the weight, rows of the update, the weight's gradient, and what makes it.
    most = FLOAT * max(math.prod(shape) for shape in shapes)
    work = 6 * most if case.way == "formed" else most
    found = {
        "flops a token": (a_token, sum(case.token(*shape) for shape in shapes)),
        "flops once": (few.flops - FEW * a_token, case.once(shapes)),
        "large": (few.large, case.large * len(shapes) + case.large_once),
        "saved": (few.saved, inputs + reduced + made),
        "held": (few.held, inputs + reduced + made),
        "peak": (few.peak, inputs + reduced + 4 * made + gradients + work),
    }
    return {name: pair for name, pair in found.items() if pair[0] > SLACK * pair[1]}


@every_case
def test_a_step_costs_what_the_formula_says(key):
    assert exceeded(CASES[key]) == {}


@every_case
def test_every_layer_costs_as_much_in_a_deeper_model(key):
    """Nothing of the group's size is made for each of its layers, of which there are three times
    as many."""
    case = CASES[key]
    found = []
    for depth in (DEPTH, 3 * DEPTH):
        model, limit, _ = attached(case, depth)
        count(model, FEW)
        found.append(count(model, FEW) - count(limit, FEW))
    few, many = found
    # Blocks of transforms are of powers of two, so that their number rises by steps.
    slack = 1.6 if isinstance(case.spec.map, maps.Fastfood | maps.Separable) else 1.1
    assert many.flops <= slack * 3 * few.flops
    assert many.written <= slack * 3 * few.written
    assert many.large <= slack * 3 * few.large + 3


def calls_in_a_step(monkeypatch, case, owner, function):
    """Return how often a function is called forward, and backward."""
    model, _, _ = attached(case)
    x = torch.randn(FEW, 128)
    model(x).sum().backward()
    original = getattr(owner, function)
    calls = []

    def counted(*arguments, **options):
        calls.append(function)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, function, counted)
    loss = model(x).sum()
    forward = len(calls)
    loss.backward()
    return forward, len(calls) - forward


ROWS = ["lotr", "fact_tt", *(f"{order}-D aligned" for order in (2, 3, 4)), "2-D + separable"]
ROWS += ["2-D balanced", "3-D balanced"]


@pytest.mark.parametrize("key", ROWS)
def test_opened_rows_are_made_once_a_pass_for_all_layers(monkeypatch, key):
    assert calls_in_a_step(monkeypatch, CASES[key], operands, "open_rows") == (1, 1)


def test_maps_are_applied_once_a_pass_for_all_layers(monkeypatch):
    stacked = CASES["2-D + fastfood"]
    assert calls_in_a_step(monkeypatch, stacked, maps.Fastfood, "_forward") == (1, 0)
    assert calls_in_a_step(monkeypatch, stacked, maps.Fastfood, "_backward") == (0, 1)
    for key in ("2-D + fastfood", "2-D + one-hot"):
        assert calls_in_a_step(monkeypatch, CASES[key], operands, "joint_entries") == (1, 1)
    # Of each of two factors, by its adjoint in the backward pass.
    modes = CASES["2-D + separable"]
    assert calls_in_a_step(monkeypatch, modes, maps.Separable, "map_mode") == (2, 2)


# Mutations: that a bound can be exceeded, each by what it is there for.


def test_an_update_that_is_formed_is_noticed():
    case = replace(CASES["lora"], way="formed")
    assert {"flops a token", "flops once", "large"} <= exceeded(case).keys()


def twice(function):
    """Return a function that does its work two times; some return more than one tensor."""

    def done(*arguments):
        one, other = function(*arguments), function(*arguments)
        if isinstance(one, tuple):
            return (one[0] + other[0]) / 2, *one[1:]
        return (one + other) / 2

    return done


def test_work_done_twice_is_noticed(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(update.FactoredWay, "forward", twice(update.FactoredWay.forward))
        for key in ("lora", "lokr", "3-D aligned"):
            assert "flops a token" in exceeded(CASES[key])
    with monkeypatch.context() as patch:
        patch.setattr(operands, "open_rows", twice(operands.open_rows))
        assert {"flops once", "large"} & exceeded(CASES["lotr"]).keys()
    monkeypatch.setattr(operands.Operands, "form", twice(operands.Operands.form))
    assert {"flops once", "large"} <= exceeded(CASES["2-D balanced"]).keys()


class Plain:
    """Autograd in place of a Function that keeps less."""

    @staticmethod
    def apply(way, scale, x, weight, bias, *tensors):
        y = way.plain(update.Call(x, weight, bias, tensors, scale))
        return (y, *[tensors[place] for place, *_ in way.whole])


class FormedOnTheWay:
    @staticmethod
    def apply(way, scale, x, weight, bias, left, right):
        return (torch.nn.functional.linear(x, weight + left @ right.t(), bias),)


def test_a_factored_update_that_is_formed_on_the_way_is_noticed(monkeypatch):
    monkeypatch.setattr(update, "Applied", FormedOnTheWay)
    assert {"flops once", "large", "saved", "held"} <= exceeded(CASES["lora"]).keys()


@pytest.mark.parametrize("key", ["2-D balanced", "lora, formed", "dense"])
def test_a_formed_weight_that_is_kept_is_noticed(monkeypatch, key):
    monkeypatch.setattr(update, "Applied", Plain)
    assert {"saved", "held"} <= exceeded(CASES[key]).keys()


def test_a_product_that_keeps_its_stages_is_noticed(monkeypatch):
    monkeypatch.setattr(update, "Applied", Plain)
    assert {"saved", "held"} <= exceeded(CASES["fourierft"]).keys()


@pytest.mark.parametrize("key", ["2-D aligned", "3-D aligned", "4-D aligned", "2-D + separable"])
def test_a_gradient_of_the_whole_from_every_layer_is_noticed(monkeypatch, key):
    def cut(whole, ranges):
        return [whole[start:stop] for start, stop in ranges]

    monkeypatch.setattr(operands, "parts", cut)
    assert "large" in exceeded(CASES[key])


def test_a_stage_that_is_made_again_is_noticed(monkeypatch):
    monkeypatch.setattr(contraction.Contraction, "cheap", property(lambda self: frozenset()))
    for key in ("lora", "lonkr", "lotr"):
        assert "flops a token" in exceeded(CASES[key])


@pytest.mark.parametrize("key", ["3-D aligned", "2-D + separable", "3-D balanced"])
def test_a_group_that_each_layer_makes_is_noticed(monkeypatch, key):
    monkeypatch.setattr(Scope, "values", lambda self: {})
    assert {"flops once", "large"} & exceeded(CASES[key]).keys()
    assert calls_in_a_step(monkeypatch, CASES[key], operands, "open_rows") != (1, 1)


def test_products_that_are_added_in_place_are_counted():
    class InPlace(torch.nn.Module):
        def forward(self, x):
            return x.clone().addmm_(x.detach(), torch.ones(128, 128))

    assert count(InPlace(), FEW).flops == 2 * FEW * WEIGHT
