"""Any spec makes any support: grouped over layers and operations, mapped, tied, of any order."""

import pytest
import torch

import superlora as sl
import superlora.torch as slt
from superlora import maps
from tests.torch.helpers import assert_near, base_bits, gradients, loss_of, make_input
from tests.torch.support_cases import attach_small, make_model, plain_call

F64 = {"dtype": torch.float64}
PAIR = ("scale_weight", "add_weight")
BIASES = ("weight_to_bias", "scale_bias", "add_bias")
ROWS, COLUMNS, LAYERS = 8, 16, 4  # of q and v, of both blocks

JOINT = {
    "one LoTR of A and B": (PAIR, sl.lotr(2, scale=0.7), 2 * (ROWS + COLUMNS) + 2 * LAYERS * 4),
    "FacT of A and B": (
        PAIR,
        sl.fact_tk(2, scale=0.7),
        2 * (ROWS + COLUMNS + 2 * LAYERS) + 8,
    ),
    "one group of A and B": (PAIR, sl.Spec(rank=2, groups=1, fold="balanced"), None),
    "LoRTA of A and B": (PAIR, sl.lorta(2, scale=0.7), None),
    "LoRTA of order 4": (PAIR, sl.lorta(2, order=4, fold="aligned"), None),
    "fastfood of A and B": (
        PAIR,
        sl.Spec(rank=2, groups=1, fold="balanced", map=maps.Fastfood(), ratio=0.3),
        None,
    ),
    "fastfood of biases": (BIASES, sl.dense(groups=1, map=maps.Fastfood(), size=11), 11),
    "one-hot of biases": (BIASES, sl.dense(groups=1, map=maps.OneHot(), size=9), 9),
    "all of one vector": (
        (*PAIR, "right_weight", "left_weight", *BIASES),
        sl.dense(groups=1, map=maps.OneHot(), size=30, scale=0.3),
        30,
    ),
    "left and right of Kronecker": (("left_weight", "right_weight"), sl.lokr(2), None),
    "VeRA of A and B": (PAIR, sl.vera(3), None),
    "Uni-LoRA of A and B": (PAIR, sl.unilora(9, 2, scale=3.0), 9),
    "Fourier": (("scale_weight",), sl.fourierft(7, scale=20.0), 7 * LAYERS),
    "LoHa": (("scale_weight", "left_weight"), sl.loha(2), None),
    "cut anywhere": (PAIR, sl.Spec(rank=2, groups=5, fold="balanced"), None),
    "layer by layer": (PAIR, sl.Spec(rank=2, groups="layer", fold="balanced"), None),
}


def attached(model, key):
    operations, spec, _ = JOINT[key]
    design = {operations if len(operations) > 1 else operations[0]: spec}
    return attach_small(model, design, targets=["q", "v"])


@pytest.mark.parametrize("key", JOINT)
def test_the_supports_are_those_of_a_plan_of_their_own_shapes(key):
    """The design knows nothing of what its tensors are used for."""
    operations, spec, expected = JOINT[key]
    adapter = attached(make_model(**F64), key)
    plan = sl.Plan(spec, adapter.plan.shapes)
    assert list(plan.shapes) == [f"{op}.{n}" for op in operations for n in adapter.layers()]
    assert plan.factor_shapes == adapter.plan.factor_shapes
    blocks = {name: factor.detach() for name, factor in adapter.factors().items()}
    for name, delta in plan.deltas(blocks).items():
        assert delta.any()
        assert_near(adapter.delta(name), delta)
    assert expected is None or adapter.num_parameters == expected


@pytest.mark.parametrize("key", JOINT)
def test_forward_gradients_merge_and_file(tmp_path, key):
    model, fresh = make_model(**F64), make_model(**F64)
    x = make_input(**F64)
    start, before = model(x), base_bits(model)
    operations, spec, _ = JOINT[key]
    design = {operations if len(operations) > 1 else operations[0]: spec}
    if "Uni-LoRA" not in key:  # which cannot start at zero
        slt.attach(model, design, ["q", "v"])
        assert torch.equal(model(x), start)
        model.superlora.detach()
    adapter = attached(model, key)

    def step():
        return gradients(adapter, loss_of(model(x)))

    y = model(x)
    assert not torch.allclose(y, start)
    assert_near(y, plain_call(model, [adapter], lambda: model(x)))
    found, expected = step(), plain_call(model, [adapter], step)
    for name, gradient in found.items():
        assert_near(gradient, expected[name])
    adapter.save(tmp_path / "a.safetensors")
    slt.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh(x), y)
    adapter.merge()
    assert_near(model(x), y)
    adapter.unmerge()
    adapter.detach()
    assert base_bits(model) == before


@pytest.mark.parametrize("seed", [0, 1])
def test_overrides_by_operation_and_layer(seed):
    model = make_model(**F64)
    overrides = {
        "scale_weight.*v": None,
        "add_weight.*v": {"rank": 3, "scale": -0.5},
        "o": {"rank": 1},
    }
    design = {
        PAIR: sl.lora(2, overrides=overrides),
        "add_bias": sl.dense(overrides={"q": None}),
    }
    adapter = attach_small(model, design, seed=seed)
    supports = adapter.plan.layout.supports
    assert {tuple(own) for name, own in supports.items() if name.endswith("q")} == {PAIR}
    assert {tuple(own) for name, own in supports.items() if name.endswith("v")} == {
        ("add_weight", "add_bias")
    }
    assert torch.linalg.matrix_rank(adapter.delta("add_weight.blocks.0.v")) == 3
    x = make_input(**F64)
    y = model(x)
    assert_near(y, plain_call(model, [adapter], lambda: model(x)))
    adapter.merge()
    assert_near(model(x), y)
