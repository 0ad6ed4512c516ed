"""Parameters of the model that come with an adapter, among other adapters and moves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import superlora as sl
import superlora.torch as slt
from tests.interop.models import (
    assert_outputs,
    load_with_peft,
    make_model,
    make_x,
    peft,
    quiet,
    randomise,
    save_with_peft,
)
from tests.torch.helpers import bits, seeded, unchanged

pytestmark = quiet
transformers = pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q", "v"], modules_to_save=["head"])
    save_with_peft(config, tmp_path / "peft")
    return tmp_path / "peft"


def with_two(folder):
    """Return a model with a replaced head, and a second adapter on that head."""
    model = make_model()
    first = slt.from_peft(model, folder)
    second = slt.attach(model, sl.lora(2), ["head"], name="second")
    randomise(second)
    return model, first, second


ACTS = {
    "disabled": lambda adapter, _: adapter.disabled().__enter__(),
    "detach": lambda adapter, _: adapter.detach(),
    "save": lambda adapter, folder: adapter.save(folder / "out"),
    "to_peft": lambda adapter, folder: adapter.to_peft(folder / "out"),
}


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_a_head_with_merged_updates_stays(folder, act, tmp_path):
    model, first, second = with_two(folder)
    second.merge()
    before, output = bits(model.head.weight), model(make_x())
    with pytest.raises(sl.AdapterError, match="unmerge 'second' first"):
        act(first, tmp_path)
    assert bits(model.head.weight) == before
    assert torch.equal(model(make_x()), output)
    second.unmerge()
    second.detach()
    first.detach()
    assert torch.equal(model(make_x()), make_model()(make_x()))


def test_a_head_is_not_replaced_under_a_merged_adapter(folder):
    model = make_model()
    adapter = slt.attach(model, sl.lora(2), ["head"], name="second")
    randomise(adapter)
    adapter.merge()
    with unchanged(model), pytest.raises(sl.AdapterError, match="unmerge 'second' first"):
        slt.from_peft(model, folder)


def test_merging_inside_a_disabled_block_can_be_mended(folder):
    model, first, second = with_two(folder)
    expected = model(make_x())
    with pytest.raises(sl.AdapterError, match="unmerge 'second' first"), first.disabled():
        second.merge()
    second.unmerge()
    with first.disabled():
        pass
    assert torch.equal(model(make_x()), expected)


@pytest.mark.parametrize("order", ["first", "second"])
def test_two_adapters_leave_in_any_order(folder, order):
    model, first, second = with_two(folder)
    for adapter in (first, second) if order == "first" else (second, first):
        adapter.detach()
    assert torch.equal(model(make_x()), make_model()(make_x()))
    assert all(p.requires_grad for p in model.parameters())


def test_nested_blocks(folder):
    model = make_model()
    adapter = slt.from_peft(model, folder)
    adapter.merge()
    expected, base = model(make_x()), make_model()(make_x())
    with adapter.disabled():
        with adapter.disabled():
            assert torch.equal(model(make_x()), base)
        assert torch.equal(model(make_x()), base)
    assert torch.equal(model(make_x()), expected)
    with pytest.raises(RuntimeError, match="inside"), adapter.disabled():
        raise RuntimeError("inside")
    assert torch.equal(model(make_x()), expected)
    with adapter.disabled():
        adapter.detach()
    assert torch.equal(model(make_x()), base)


def test_a_model_that_moved(folder):
    model = make_model()
    adapter = slt.from_peft(model, folder)
    model.double()
    with torch.inference_mode(), adapter.disabled():
        expected = make_model().double()(make_x().double())
        assert_outputs(model(make_x().double()), expected, 1e-12)
    adapter.detach()
    assert all(p.requires_grad and p.dtype == torch.float64 for p in model.parameters())
    model(make_x().double()).sum().backward()


def test_a_model_without_memory_can_lose_its_adapter(folder):
    model = make_model()
    adapter = slt.from_peft(model, folder)
    model.to("meta")
    with adapter.disabled():
        pass
    adapter.detach()
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("way", ["from_peft", "load", "attach"])
def test_made_in_inference_mode_it_can_be_trained(folder, way, tmp_path):
    slt.from_peft(make_model(), folder).save(tmp_path / "a.safetensors")
    model = make_model()
    with torch.inference_mode():
        if way == "attach":
            adapter = slt.attach(model, sl.vera(3), ["q"])
        elif way == "load":
            adapter = slt.load(model, tmp_path / "a.safetensors")
        else:
            adapter = slt.from_peft(model, folder)
    model.head.requires_grad_(True)
    model(make_x()).square().mean().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    assert model.head.weight.grad is not None


def test_a_reference_without_the_adapter_and_its_head(folder):
    """As in preference optimisation: both outputs, one backward pass."""
    model = make_model()
    adapter = slt.from_peft(model, folder)
    y = model(make_x())
    with adapter.disabled():
        reference = model(make_x()).detach()
    (y - reference).square().mean().backward()
    assert all(factor.grad is not None for factor in adapter.parameters())


def test_the_head_of_an_unmerged_adapter_leaves_with_it(folder):
    model = make_model()
    with unchanged(model):
        slt.from_peft(model, folder).detach(keep_merged=True)


def test_no_state_dict_without_the_head(folder):
    model = make_model()
    adapter = slt.from_peft(model, folder)
    with adapter.disabled(), pytest.raises(sl.AdapterError, match="must not be disabled"):
        model.state_dict()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(make_x()), model(make_x()))
    with twin.superlora.disabled():
        assert torch.equal(twin(make_x()), make_model()(make_x()))


def test_a_head_that_was_exchanged_is_told(folder, tmp_path):
    model = make_model()
    adapter = slt.from_peft(model, folder)
    model.head = nn.Linear(36, 3)
    with pytest.raises(sl.AdapterError, match="'head' must be the module whose"):
        adapter.save(tmp_path / "a.safetensors")


def test_the_head_trains_and_is_saved(folder, tmp_path):
    model = make_model()
    adapter = slt.from_peft(model, folder)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    model(make_x()).square().mean().backward()
    optimizer.step()
    adapter.to_peft(tmp_path / "out")
    assert_outputs(load_with_peft(tmp_path / "out")(make_x()), model(make_x()))


def through(base, config, call, tmp_path):
    """Send a random PEFT adapter here and back; compare three outputs."""
    with seeded(1):
        theirs = peft.get_peft_model(copy.deepcopy(base), config)
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "in")
    expected = call(theirs.eval())
    ours = copy.deepcopy(base)
    adapter = slt.from_peft(ours, tmp_path / "in")
    assert_outputs(call(ours), expected, 1e-5)
    adapter.to_peft(tmp_path / "out")
    assert_outputs(call(load_with_peft(tmp_path / "out", copy.deepcopy(base))), expected, 1e-5)
    with unchanged_outputs(base, call, ours):
        adapter.detach()


class unchanged_outputs:
    """Assert that after the block a model computes what its base does."""

    def __init__(self, base, call, model):
        self.check = lambda: torch.equal(call(model), call(base))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        assert self.check()


TEXT = torch.arange(12).reshape(2, 6)


def test_all_biases_of_a_masked_language_model(tmp_path):
    with seeded(0):
        config = transformers.BertConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
        )
        base = transformers.BertForMaskedLM(config).eval()
    peft_config = peft.LoraConfig(r=2, target_modules=["query", "dense"], bias="all")
    through(base, peft_config, lambda model: model(TEXT).logits.detach(), tmp_path)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x):
        x = self.q(x)
        return self.attn(x, x, x, need_weights=False)[0] + self.bias


@pytest.mark.parametrize("options", [{"modules_to_save": ["attn"]}, {"bias": "all"}], ids=str)
def test_modules_with_parts_and_parameters_of_the_model_itself(options, tmp_path):
    with seeded(0):
        base = Attending().eval()
        x = torch.randn(2, 5, 8)
    config = peft.LoraConfig(r=2, target_modules=["q"], **options)
    through(base, config, lambda model: model(x).detach(), tmp_path)


def test_scales_of_zero_among_others(tmp_path):
    config = peft.LoraConfig(
        r=2, lora_alpha=0, target_modules=["q", "v"], alpha_pattern={"blocks.0.q": 4}
    )
    expected = save_with_peft(config, tmp_path)
    model = make_model()
    slt.from_peft(model, tmp_path)
    assert_outputs(model(make_x()), expected)


def test_generic_targets(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q", "query", "c_attn"])
    expected = save_with_peft(config, tmp_path)
    model = make_model()
    slt.from_peft(model, tmp_path)
    assert_outputs(model(make_x()), expected)


def test_a_layer_with_two_names_is_refused(tmp_path):
    save_with_peft(peft.LoraConfig(r=2, target_modules=["q", "v"]), tmp_path)
    model = make_model()
    model.twin = model.blocks[0].q
    with unchanged(model), pytest.raises(ValueError, match=r"'blocks\.0\.q' has another name"):
        slt.from_peft(model, tmp_path)


@pytest.mark.parametrize("saved", [["lm_head"], ["wte", "lm_head"]], ids="+".join)
def test_tied_modules_that_peft_keeps_tied(saved, tmp_path):
    with seeded(0):
        config = transformers.GPT2Config(
            vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2, use_cache=False
        )
        base = transformers.GPT2LMHeadModel(config).eval()
    peft_config = peft.LoraConfig(
        r=2,
        target_modules=["c_attn"],
        fan_in_fan_out=True,
        modules_to_save=saved,
        ensure_weight_tying=True,
    )
    with seeded(1):
        theirs = peft.get_peft_model(copy.deepcopy(base), peft_config)
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    expected = theirs.eval()(TEXT).logits.detach()
    slt.from_peft(base, tmp_path)
    assert_outputs(base(TEXT).logits, expected, 1e-5)
