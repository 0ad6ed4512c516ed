"""What merge operations add to a training step, counted: no matrix is formed but for W0 o A.

Bounds are formulas of sizes and ranks, for layers of width 128 of which two share their inputs.
"""

import pytest

import superlora as sl
import superlora.torch as slt
from superlora.torch import merge_operations, support, update
from tests.torch.counting import FEW, MANY, MODELS, WEIGHT, WIDTH, count, make_chain
from tests.torch.support_cases import vector

DEPTH = 2
LAYERS = 2 * DEPTH
FLOAT = 4
SLACK = 1.02
RANK = 2

# Two factors: outputs, gradient of what lies between, and gradient of the factor.
PAIR = 3 * 2 * RANK * (WIDTH + WIDTH)
LOW = sl.lora(RANK)
# By design flops of a token, flops once, and entries kept a token beside the inputs, of a layer.
CASES = {
    "add_weight": ({"add_weight": LOW}, PAIR, 0, RANK),
    "right_weight": ({"right_weight": LOW}, PAIR, 0, RANK),
    "left_weight": ({"left_weight": LOW}, PAIR, 0, RANK + WIDTH),
    "add_weight along inputs": ({"add_weight": vector("inputs")}, 0, 0, 1),
    "add_weight along outputs": ({"add_weight": vector("outputs")}, 0, 0, 0),
    "add_weight along all": ({"add_weight": vector("all")}, 0, 0, 1),
    "scale_weight along inputs": ({"scale_weight": vector("inputs")}, 0, 0, WIDTH),
    "scale_weight along outputs": ({"scale_weight": vector("outputs")}, 0, 0, 0),
    "scale_weight along all": ({"scale_weight": vector("all")}, 0, 0, WIDTH),
    # Times W0, and its gradient: however many tokens there are.
    "weight_to_bias": ({"weight_to_bias": sl.dense()}, 0, 4 * WEIGHT, 0),
    "weight_to_bias of a rank": (
        {"weight_to_bias": sl.lora(RANK, dense_from="never")},
        0,
        4 * WEIGHT + 4 * 2 * RANK * (WIDTH + 1),
        0,
    ),
    "scale_bias": ({"scale_bias": sl.dense()}, 0, 0, 0),
    "add_bias": ({"add_bias": sl.dense()}, 0, 0, 0),
    "bitfit": (sl.bitfit(), 0, 0, 0),
    "ssf": (sl.ssf(), 0, 0, WIDTH),
    "ia3": (sl.ia3(), 0, 0, WIDTH),
    "prompt_add": (sl.prompt_add(), 0, 4 * WEIGHT, 0),
    "repadapter": (sl.repadapter(RANK), PAIR, 4 * WEIGHT, RANK),
    "glora, matrix": (
        sl.glora(RANK, product="matrix"),
        2 * PAIR,
        4 * WEIGHT + 4 * 2 * RANK * (WIDTH + 1),
        2 * RANK,
    ),
    "glora of vectors": (
        sl.glora(scale_weight="vector", add_weight="constant", weight_to_bias="vector"),
        0,
        4 * WEIGHT,
        WIDTH + 1,
    ),
}


def added(design, tokens=FEW):
    """Return what an adapter adds to a step, and how many entries it trains."""
    model, limit = (make_chain("vit", DEPTH) for _ in range(2))
    adapter = slt.attach(model, design, MODELS["vit"][1])
    count(model, FEW)
    return count(model, tokens) - count(limit, tokens), adapter.num_parameters


def exceeded(design, token, once, kept):
    """Return which bounds a step exceeds, and by how much."""
    few, trained = added(design)
    many, _ = added(design, MANY)
    a_token = (many.flops - few.flops) / (MANY - FEW)
    inputs = FLOAT * FEW * DEPTH * WIDTH
    most = inputs + FLOAT * (FEW * kept * LAYERS + 2 * trained)
    found = {
        "flops a token": (a_token, token * LAYERS),
        "flops once": (few.flops - FEW * a_token, once * LAYERS),
        "large": (few.large, 0),
        "saved": (few.saved, most),
        "held": (few.held, most),
        # What scales outputs, and its gradient, for one layer after the other.
        "peak": (few.peak, most + FLOAT * (4 * FEW * WIDTH + 4 * trained)),
    }
    return {name: pair for name, pair in found.items() if pair[0] > SLACK * pair[1]}


@pytest.mark.parametrize("key", CASES)
def test_no_matrix_is_formed(key):
    assert exceeded(*CASES[key]) == {}


FORMED = {"scale_weight": {"scale_weight": LOW}, "glora": sl.glora(RANK)}


@pytest.mark.parametrize("key", FORMED)
def test_a_scaled_weight_is_formed_in_chunks_and_not_kept(monkeypatch, key):
    """The sum with W0 is the one tensor of its size, and only in the forward pass."""
    monkeypatch.setattr(support, "_CHUNK", WEIGHT // 8)
    few, trained = added(FORMED[key])
    many, _ = added(FORMED[key], MANY)
    assert few.large == LAYERS
    inputs = FLOAT * FEW * DEPTH * WIDTH
    kept = inputs + FLOAT * (FEW * RANK * LAYERS + 2 * trained)
    assert few.saved <= kept
    assert few.held <= kept
    # The sum, and of a chunk: S, W0 o S, their gradients, and those of its sum.
    assert few.peak <= kept + FLOAT * (WEIGHT + 6 * WEIGHT // 8 + 4 * trained)
    a_token = (many.flops - few.flops) / (MANY - FEW)
    assert a_token <= LAYERS * (2 * WEIGHT + (PAIR if key == "glora" else 0))
    # Formed twice, with two products for the gradient.
    once = 4 * 2 * RANK * WEIGHT + (4 * WEIGHT + 8 * RANK * (WIDTH + 1)) * (key == "glora")
    assert few.flops - FEW * a_token <= LAYERS * once


def test_every_layer_costs_as_much_in_a_deeper_model():
    costs = []
    for depth in (1, 2, 3):
        model, limit = (make_chain("vit", depth) for _ in range(2))
        slt.attach(model, sl.glora(RANK), MODELS["vit"][1])
        count(model, FEW)
        costs.append(count(model, FEW) - count(limit, FEW))
    one, two, three = costs
    assert (two.flops, two.large) == (2 * one.flops, 2 * one.large)
    # The first block's inputs are none of the step's making.
    for name in ("flops", "large", "saved", "held", "written"):
        assert getattr(three - two, name) == getattr(two - one, name)


# Mutations: that a bound can be exceeded, each by what it is there for.


def test_a_product_of_its_own_for_what_scales_outputs_is_noticed(monkeypatch):
    finished = merge_operations.Operations._finished
    monkeypatch.setattr(
        merge_operations.Operations, "_finished", lambda self, y, z: finished(self, y, None)
    )
    assert "flops a token" in exceeded(*CASES["ssf"])


def test_a_support_that_is_formed_is_noticed():
    dense = {"right_weight": sl.dense()}
    assert {"flops a token", "large"} <= exceeded(dense, *CASES["right_weight"][1:]).keys()
    low = {"scale_weight": LOW}
    bounds = CASES["scale_weight along inputs"][1:]
    assert {"flops a token", "large", "flops once"} <= exceeded(low, *bounds).keys()


def test_a_scaled_weight_that_is_kept_is_noticed(monkeypatch):
    class Kept:
        @staticmethod
        def apply(way, scale, x, weight, bias, *tensors):
            return (way.plain(update.Call(x, weight, bias, tensors, scale)),)

    monkeypatch.setattr(update, "Applied", Kept)
    few, _ = added(FORMED["scale_weight"])
    assert few.saved > FLOAT * LAYERS * WEIGHT
