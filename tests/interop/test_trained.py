"""Adapters after real training steps on a real architecture, in both directions."""

from __future__ import annotations

import copy

import pytest
import torch

import superlora as sl
import superlora.torch as slt
from tests.interop.models import assert_outputs, peft, quiet
from tests.torch.helpers import seeded

pytestmark = quiet
transformers = pytest.importorskip("transformers")

TEXT = torch.tensor([list(b"a stitch in time saves nine; a penny saved is a penny earned")])


@pytest.fixture(scope="module")
def base():
    with seeded(0):
        config = transformers.GPT2Config(
            vocab_size=128, n_positions=64, n_embd=32, n_layer=2, n_head=2, use_cache=False
        )
        config._attn_implementation = "eager"
        return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def llama():
    with seeded(0):
        config = transformers.LlamaConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            use_cache=False,
        )
        return transformers.LlamaForCausalLM(config).eval()


def train(model, parameters, rate=2e-2, steps=8):
    """Train for a few steps, and return the losses before and after."""
    optimizer = torch.optim.Adam(parameters, lr=rate)
    losses = []
    for _ in range(steps):
        loss = model(TEXT, labels=TEXT).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return model(TEXT).logits


PEERS = {
    "lora": peft.LoraConfig(r=4, lora_alpha=9, target_modules=["q_proj", "up_proj", "down_proj"]),
    "lokr": peft.LoKrConfig(r=2, alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]),
    "loha": peft.LoHaConfig(r=2, alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]),
    "vera": peft.VeraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"]),
}


@pytest.mark.parametrize("config", PEERS.values(), ids=PEERS)
def test_trained_in_peft(llama, config, tmp_path):
    with seeded(1):
        theirs = peft.get_peft_model(copy.deepcopy(llama), config)
    expected = train(theirs, [p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(llama)
    slt.from_peft(ours, tmp_path)
    assert_outputs(ours(TEXT).logits, expected, 1e-5)


def test_trained_in_peft_on_conv1d(base, tmp_path):
    config = peft.LoraConfig(
        r=4, lora_alpha=9, target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["ln_f"]
    )
    with seeded(1):
        theirs = peft.get_peft_model(copy.deepcopy(base), config)
    expected = train(theirs, [p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    slt.from_peft(ours, tmp_path)
    assert_outputs(ours(TEXT).logits, expected, 1e-5)


SPECS = {
    "lora": sl.lora(4, alpha=9),
    "lokr": sl.lokr(2, scale=2),
    "loha": sl.loha(2, scale=2),
    "lora_xs": sl.lora_xs(8, scale=30),
    "lorta-aligned": sl.lorta(4, fold="aligned", scale=4),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_trained_here(llama, spec, tmp_path):
    ours = copy.deepcopy(llama)
    adapter = slt.attach(ours, spec, ["q_proj", "v_proj", "down_proj"])
    expected = train(ours, adapter.parameters())
    export = adapter.to_peft(tmp_path)
    assert set(export.errors.values()) == {0.0}
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path).eval()
    assert_outputs(theirs(TEXT).logits, expected, 1e-5)
    assert_outputs(theirs.merge_and_unload()(TEXT).logits, expected, 1e-5)


def test_trained_here_on_conv1d(base, tmp_path):
    ours = copy.deepcopy(base)
    adapter = slt.attach(ours, sl.lora(4, alpha=9), ["c_attn", "c_proj"])
    expected = train(ours, adapter.parameters())
    adapter.to_peft(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert_outputs(theirs(TEXT).logits, expected, 1e-5)
