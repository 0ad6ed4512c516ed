"""Adapters that start from given factors: with their update, or with the output that was."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import superlora as sl
import superlora.torch as slt
from superlora.errors import AdapterError
from superlora.torch.start import with_opposite_terms
from tests.pairs import in_turn
from tests.torch.helpers import (
    LAYERS,
    SPECS,
    assert_near,
    attach_filled,
    base_bits,
    every_spec,
    fill,
    gradients,
    loss_of,
    make_input,
    make_net,
    targets_of,
    unchanged,
)
from tests.torch.support_cases import DESIGNS
from tests.torch.test_quantised import make_cast

LORA = sl.lora(2, alpha=5)
DOUBLE = {"dtype": torch.float64}


def factors_of(key, **to):
    """Return factors as a fit may give them, and the update that they make."""
    adapter = attach_filled(make_net(**to), key)
    deltas = {name: delta.detach() for name, delta in adapter.deltas().items()}
    return {name: own.detach().clone() for name, own in adapter.named_parameters()}, deltas


def attach_kept(model, key, factors, **options):
    spec = SPECS[key]
    return slt.attach(model, spec, targets_of(key), init=factors, keep_output=True, **options)


def shift(adapter, seed=5):
    """Train for a step of random direction."""
    with torch.no_grad():
        for factor in adapter.parameters():
            generator = torch.Generator().manual_seed(seed)
            factor += 0.3 * torch.rand(factor.shape, generator=generator).to(factor)
    return adapter


@every_spec
def test_the_model_starts_with_the_update_of_given_factors(key):
    factors, deltas = factors_of(key, **DOUBLE)
    model, x = make_net(**DOUBLE), make_input(**DOUBLE)
    adapter = slt.attach(model, SPECS[key], targets_of(key), init=factors)
    assert all(torch.equal(adapter.blocks[name], own) for name, own in factors.items())
    for name, delta in adapter.deltas().items():
        assert torch.equal(delta, deltas[name])
    other = make_net(**DOUBLE)
    attach_filled(other, key)
    assert torch.equal(model(x), other(x))


@every_spec
def test_the_output_is_kept_and_training_goes_on_from_the_factors(key):
    factors, deltas = factors_of(key, **DOUBLE)
    model, x = make_net(**DOUBLE), make_input(**DOUBLE)
    before, expected = base_bits(model), model(x)
    adapter = attach_kept(model, key, factors)
    assert adapter.num_parameters == sl.Plan(SPECS[key], adapter.plan.shapes).num_parameters
    assert dict(adapter.named_parameters()).keys() == factors.keys()
    assert base_bits(model) == before
    assert_near(model(x), expected)
    # The gradients are those where the output has the update.
    assert all(not delta.any() or delta.abs().max() < 1e-12 for delta in adapter.deltas().values())
    loss = loss_of(model(x))
    found = gradients(adapter, loss)
    changed = make_net(**DOUBLE)
    plain = slt.attach(changed, SPECS[key], targets_of(key), init=factors)
    for name, layer in plain.layers().items():
        with torch.no_grad():
            layer.weight -= deltas[name].reshape(layer.weight.shape)
    for name, own in gradients(plain, loss_of(changed(x))).items():
        assert_near(found[name], own)
    # The update is the difference of two.
    shift(adapter), shift(plain)
    for name, delta in adapter.deltas().items():
        assert_near(delta, plain.delta(name) - deltas[name])
    assert_near(model(x), changed(x))


@in_turn("key", SPECS, "layer", LAYERS)
def test_it_merges_saves_and_detaches_on_the_model_as_it_was(key, layer, tmp_path):
    factors, _ = factors_of(key, layer=layer)
    model, x = make_net(layer), make_input()
    before, base = base_bits(model), model(x)
    adapter = shift(attach_kept(model, key, factors))
    y = model(x)
    assert not torch.allclose(y, base, atol=1e-4)
    with adapter.disabled():
        assert torch.equal(model(x), base)
    adapter.merge()
    assert_near(model(x), y)
    adapter.unmerge()
    assert base_bits(model) == before
    adapter.save_pretrained(tmp_path / "adapter")
    other = make_net(layer)
    twin = slt.load(other, tmp_path / "adapter")
    assert torch.equal(other(x), y)
    assert {n for n, p in twin.named_parameters() if p.requires_grad} == factors.keys()
    shift(adapter, 6)
    adapter.swap(tmp_path / "adapter")
    assert torch.equal(model(x), y)
    assert torch.equal(copy.deepcopy(model)(x), y)
    state = model.state_dict()
    again = make_net(layer)
    attach_kept(again, key, {name: -own for name, own in factors.items()})
    again.load_state_dict(state)
    assert torch.equal(again(x), y)
    adapter.detach()
    assert base_bits(model) == before
    assert torch.equal(model(x), base)


@in_turn("key", DESIGNS, "layer", ["bias", "conv1d"])
def test_merge_operations_keep_the_output(key, layer):
    design, targets = DESIGNS[key], ["q", "v", "o"]
    model, x = make_net(layer, **DOUBLE), make_input(**DOUBLE)
    plain = fill(slt.attach(model, design, targets))
    factors = {name: own.detach().clone() for name, own in plain.named_parameters()}
    plain.detach()
    base = model(x)
    adapter = slt.attach(model, design, targets, init=factors, keep_output=True)
    assert_near(model(x), base)
    shift(adapter)
    y = model(x)
    assert not torch.allclose(y, base)
    adapter.merge()
    assert_near(model(x), y)
    adapter.unmerge()
    adapter.detach()
    # What the supports change is linear in them.
    other = shift(slt.attach(model, design, targets, init=factors))
    for name, delta in adapter.deltas().items():
        first = sl.Plan(other.plan.spec, other.plan.layout.layer_axes).delta(
            {**other.factors(), **factors}, name
        )
        assert_near(delta, other.delta(name) - first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_output_better_than_a_changed_weight_would(dtype):
    model, x = make_net(dtype=dtype), make_input(dtype=dtype)
    factors, deltas = factors_of("lora")
    base = model(x)
    adapter = attach_kept(model, "lora", factors)
    assert adapter.dtype == torch.float32
    kept = (model(x) - base).abs().max()
    adapter.detach()
    slt.attach(model, SPECS["lora"], targets_of("lora"), init=factors)
    for name, delta in deltas.items():
        layer = model.get_submodule(name)
        layer.weight.data = (layer.weight - delta).to(dtype)
    assert kept <= (model(x) - base).abs().max()
    assert_near(base + kept, base)


def test_factors_are_cast_and_copied_from_any_library():
    jnp = pytest.importorskip("jax.numpy")
    factors, deltas = factors_of("cut", **DOUBLE)
    given = {
        "numpy": {name: np.asfortranarray(own.numpy()) for name, own in factors.items()},
        "jax": {name: jnp.asarray(own.numpy()) for name, own in factors.items()},
        "jax, half": {
            name: jnp.asarray(own.numpy(), jnp.bfloat16) for name, own in factors.items()
        },
        "torch": {name: own.float() for name, own in factors.items()},
    }
    for library, arrays in given.items():
        adapter = slt.attach(make_net(), SPECS["cut"], targets_of("cut"), init=arrays)
        assert adapter.dtype == torch.float32
        for name, delta in deltas.items():
            kind = torch.bfloat16 if "half" in library else torch.float32
            assert_near(adapter.delta(name).double(), delta, kind)
    shift(adapter)
    kept = {name: own.float() for name, own in factors.items()}
    assert all(torch.equal(given["torch"][name], own) for name, own in kept.items())


def test_a_group_that_spans_layers_starts_from_a_fit():
    plan = sl.Plan(sl.lorta(2), {"0": (8, 6), "1": (8, 6)})
    rng = np.random.default_rng(0)
    factors = {name: rng.normal(size=shape) for name, shape in plan.factor_shapes.items()}
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(6, 8)).double()
    adapter = slt.attach(model, sl.lorta(2), init=factors)
    for name, delta in plan.deltas(factors).items():
        assert_near(adapter.delta(name), torch.from_numpy(delta))


def test_frozen_blocks_may_be_given_if_they_are_the_plans():
    model = make_net()
    adapter = attach_filled(model, "vera")
    factors = {name: own.detach().clone() for name, own in adapter.factors().items()}
    expected = adapter.delta("blocks.0.q")
    adapter.detach()
    adapter = slt.attach(model, SPECS["vera"], targets_of("vera"), init=factors)
    assert torch.equal(adapter.delta("blocks.0.q"), expected)
    adapter.detach()
    frozen = next(iter(adapter.plan.frozen_shapes))
    factors[frozen] = factors[frozen] + 1
    with unchanged(model), pytest.raises(ValueError, match=f"'{frozen}' is frozen and has other"):
        slt.attach(model, SPECS["vera"], targets_of("vera"), init=factors)


def test_a_design_with_stored_blocks_starts_from_all_of_them():
    adapter = attach_kept(make_net(), "lora", factors_of("lora")[0])
    model = make_net()
    with unchanged(model), pytest.raises(ValueError, match=r"'stored' in a file; or init must"):
        slt.attach(model, adapter.plan.spec, targets_of("lora"))
    shift(adapter)
    twin = slt.attach(model, adapter.plan.spec, targets_of("lora"), init=adapter.factors())
    assert torch.equal(twin.delta("blocks.1.v"), adapter.delta("blocks.1.v"))


def test_a_model_without_memory_gets_the_factors_with_it():
    factors, _ = factors_of("vera")
    with torch.device("meta"):
        empty = make_net()
    adapter = attach_kept(empty, "vera", factors)
    x, full = make_input(), make_net()
    state = {name: own.clone() for name, own in full.state_dict().items()}
    empty.load_state_dict(state, strict=False, assign=True)
    assert_near(empty(x), full(x))
    shift(adapter)
    other = shift(attach_kept(full, "vera", factors))
    assert_near(empty(x), full(x))
    assert_near(adapter.delta("blocks.0.q"), other.delta("blocks.0.q"))


def test_quantised_and_shared_weights_keep_the_output():
    x = torch.randn(3, 64)
    quantised = make_cast()
    tied = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    tied[2].weight = tied[0].weight
    for model, options in ((quantised, {}), (tied, {"tied": "once"})):
        with torch.no_grad():
            base = model(x)
        adapter = fill(slt.attach(model, LORA, ["0"], **options))
        factors = {name: own.detach().clone() for name, own in adapter.named_parameters()}
        adapter.detach()
        adapter = slt.attach(model, LORA, ["0"], init=factors, keep_output=True, **options)
        assert_near(model(x), base)
        shift(adapter)
        assert not torch.allclose(model(x), base, atol=1e-3)


def test_other_libraries_get_the_difference(tmp_path):
    peft = pytest.importorskip("peft")
    factors, _ = factors_of("lora")
    model, x = make_net(), make_input()
    adapter = shift(attach_kept(model, "lora", factors))
    y = model(x)
    adapter.to_peft(tmp_path)  # exact, or it would ask for a rank
    found = peft.PeftModel.from_pretrained(make_net(), tmp_path)
    assert_near(found(x), y)


def test_a_sum_with_fixed_terms_has_no_form():
    factors, _ = factors_of("lora")
    model = make_net()
    adapters = [attach_kept(model, "lora", factors, name=name) for name in ("a", "b")]
    with unchanged(model), pytest.raises(ValueError, match="some of their terms are fixed"):
        slt.combine(adapters)
    with pytest.raises(AdapterError, match="must have no fixed terms to be reset"):
        adapters[0].reset()
    x = make_input()
    shift(adapters[0])
    adapters[1].detach()
    y = model(x)
    slt.combine([adapters[0]], [1.0], name="one")
    assert torch.equal(model(x), y)
    assert [group["lr"] for group in model.one.param_groups(1.0, ratio=4.0)] == [4.0, 1.0]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"0.0.factor0": None}, ValueError, r"missing '0\.0\.factor0'"),
        ({"0.0.factor2": torch.zeros(2)}, ValueError, r"unknown '0\.0\.factor2'"),
        ({"0.0.factor0": torch.zeros(3, 2)}, ValueError, r"has shape \(3, 2\) instead of \(8, 2\)"),
        ({"0.0.factor0": torch.full((8, 2), torch.nan)}, ValueError, "not finite in torch.float32"),
        ({"0.0.factor0": torch.full((8, 2), 1e39, dtype=torch.float64)}, ValueError, "not finite"),
        ({"0.0.factor0": torch.zeros(8, 2).int()}, TypeError, "must have a floating-point dtype"),
        ({"0.0.factor0": [[0.0, 0.0]] * 8}, TypeError, "arrays must be of numpy, torch, jax"),
        ({"0.0.factor0": torch.zeros(8, 2, device="meta")}, AdapterError, "must have memory"),
    ],
)
@pytest.mark.parametrize("keep_output", [False, True])
def test_factors_that_are_not_the_plans_are_refused(change, error, match, keep_output):
    factors, _ = factors_of("lora")
    given = {name: own for name, own in {**factors, **change}.items() if own is not None}
    model = make_net()
    with unchanged(model), pytest.raises(error, match=match):
        slt.attach(model, LORA, targets_of("lora"), init=given, keep_output=keep_output)


def test_arguments_that_say_nothing_are_refused():
    model = make_net()
    with unchanged(model):
        with pytest.raises(ValueError, match="keep_output must come with init"):
            slt.attach(model, LORA, keep_output=True)
        with pytest.raises(TypeError, match=r"init must be a mapping of block .* got tuple"):
            slt.attach(model, LORA, init=(factors_of("lora")[0], "a report"))
        with pytest.raises(ValueError, match="keep_output must have a design of at most 8 terms"):
            slt.attach(model, LORA.replace(terms=9), init={}, keep_output=True)
        spec = LORA.replace(terms=2, frozen_terms=1)
        with pytest.raises(ValueError, match="of which none is fixed"):
            slt.attach(model, spec, init={}, keep_output=True)
    with pytest.raises(ValueError, match="frozen_terms must be below terms=2"):
        sl.Spec(terms=2, frozen_terms=2)


def test_terms_are_doubled_in_overrides_too():
    spec = sl.lora(2, overrides={"v": {"terms": 3}, "o": {"rank": 1}, "k": None})
    found = with_opposite_terms(spec)
    assert [(found.of(n).terms, found.of(n).frozen_terms) for n in "qvo"] == [
        (2, 1),
        (6, 3),
        (2, 1),
    ]
    assert found.of("k") is None
