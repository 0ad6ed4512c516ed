"""Folders that PEFT wrote, and folders for PEFT to load."""

from __future__ import annotations

import json

import pytest
import torch

import superlora as sl
import superlora.torch as slt
from tests.interop.models import (
    assert_outputs,
    attach_random,
    load_with_peft,
    make_model,
    make_x,
    peft,
    quiet,
    randomise,
    save_with_peft,
)
from tests.torch.helpers import unchanged

pytestmark = quiet

QV = ["q", "v"]
CONFIGS = {
    "lora": peft.LoraConfig(r=4, lora_alpha=9, target_modules=QV),
    "lora-rank-above-widths": peft.LoraConfig(r=20, lora_alpha=9, target_modules=QV),
    "lora-patterns": peft.LoraConfig(
        r=4,
        lora_alpha=9,
        target_modules=QV,
        rank_pattern={"blocks.0.q": 2, "v": 3},
        alpha_pattern={"blocks.1.q": 5},
    ),
    "lora-rslora": peft.LoraConfig(
        r=4, lora_alpha=9, target_modules=QV, use_rslora=True, rank_pattern={"v": 9}
    ),
    "lora-conv1d": peft.LoraConfig(r=4, lora_alpha=9, target_modules=["c"], fan_in_fan_out=True),
    "lora-regex": peft.LoraConfig(r=4, lora_alpha=9, target_modules=r"blocks\.\d\.[qv]"),
    "lora-all-linear": peft.LoraConfig(r=2, lora_alpha=9, target_modules="all-linear"),
    "lora-one-block": peft.LoraConfig(
        r=2, lora_alpha=9, target_modules=QV, layers_to_transform=[1], layers_pattern="blocks"
    ),
    "lora-excluded": peft.LoraConfig(
        r=2, lora_alpha=9, target_modules=QV, exclude_modules=["blocks.0.v"]
    ),
    "lora-head": peft.LoraConfig(
        r=4, lora_alpha=9, target_modules=QV, modules_to_save=["head", "norm"]
    ),
    "lora-biases": peft.LoraConfig(r=4, lora_alpha=9, target_modules=QV, bias="lora_only"),
    "lora-all-biases": peft.LoraConfig(r=4, lora_alpha=9, target_modules=QV, bias="all"),
    "lokr": peft.LoKrConfig(r=1, alpha=5, target_modules=QV),
    "lokr-both": peft.LoKrConfig(r=1, alpha=5, target_modules=QV, decompose_both=True),
    "lokr-factor": peft.LoKrConfig(r=2, alpha=5, target_modules=QV, decompose_factor=2),
    "lokr-large-factor": peft.LoKrConfig(r=2, alpha=5, target_modules=QV, decompose_factor=6),
    "lokr-both-dense": peft.LoKrConfig(
        r=9, alpha=5, target_modules=QV, rank_pattern={"v": 1}, alpha_pattern={"q": 7}
    ),
    "loha": peft.LoHaConfig(r=2, alpha=5, target_modules=QV),
    "loha-patterns": peft.LoHaConfig(
        r=2, alpha=5, target_modules=QV, rank_pattern={"q": 3}, alpha_pattern={"v": 1}
    ),
    "vera": peft.VeraConfig(r=5, target_modules=QV),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@every_config
def test_peft_adapter_gives_its_outputs_here(config, tmp_path):
    expected = save_with_peft(config, tmp_path)
    model = make_model()
    base = model(make_x())
    adapter = slt.from_peft(model, tmp_path)
    assert_outputs(model(make_x()), expected)
    with adapter.disabled():
        assert torch.equal(model(make_x()), base)
    adapter.merge()
    assert_outputs(model(make_x()), expected)
    adapter.unmerge()
    adapter.detach()
    assert torch.equal(model(make_x()), base)


@every_config
def test_import_and_detach_leave_the_model_as_it_was(config, tmp_path):
    save_with_peft(config, tmp_path)
    model = make_model()
    with unchanged(model):
        slt.from_peft(model, tmp_path).detach()


@every_config
def test_what_came_from_peft_goes_back_exactly(config, tmp_path):
    expected = save_with_peft(config, tmp_path / "in")
    model = make_model()
    export = slt.from_peft(model, tmp_path / "in").to_peft(tmp_path / "out")
    assert set(export.errors.values()) == {0.0}
    assert "exact" in str(export)
    assert "error" not in str(export)
    theirs = load_with_peft(tmp_path / "out")
    assert_outputs(theirs(make_x()), expected)
    assert_outputs(theirs.merge_and_unload()(make_x()), expected)
    if config.peft_type.value != "VERA":  # which is written as LoRA
        written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert written["peft_type"] == config.peft_type.value


@every_config
def test_parameter_counts_agree(config, tmp_path):
    model = peft.get_peft_model(make_model(), config)
    model.save_pretrained(tmp_path)
    kinds = ("lora_", "lokr_", "hada_", "vera_lambda")
    own = [p for name, p in model.named_parameters() if any(kind in name for kind in kinds)]
    adapter = slt.from_peft(make_model(), tmp_path)
    assert adapter.num_parameters == sum(p.numel() for p in own if p.requires_grad)


@every_config
def test_own_file_of_an_imported_adapter(config, tmp_path):
    expected = save_with_peft(config, tmp_path)
    slt.from_peft(make_model(), tmp_path).save(tmp_path / "own.safetensors")
    model = make_model()
    base = model(make_x())
    adapter = slt.load(model, tmp_path / "own.safetensors")
    assert_outputs(model(make_x()), expected)
    adapter.detach()
    assert torch.equal(model(make_x()), base)


SPECS = {
    "lora": (sl.lora(3, alpha=7), "LORA"),
    "lora-overrides": (sl.lora(3, alpha=7, overrides={"q": {"rank": 2}}), "LORA"),
    "lora_fa": (sl.lora_fa(3, alpha=7), "LORA"),
    "lora_xs": (sl.lora_xs(3, scale=0.7), "LORA"),
    "vera": (sl.vera(3, scale=0.7), "LORA"),
    "tinylora": (sl.tinylora(2, 5, scale=0.7), "LORA"),
    "loha": (sl.loha(2, alpha=7), "LOHA"),
    "loha-overrides": (sl.loha(2, alpha=7, overrides={"v": {"rank": 3}}), "LOHA"),
    "lokr": (sl.lokr(1, scale=0.7), "LOKR"),
    "lokr-both": (sl.lokr(1, decompose_both=True, scale=0.7), "LOKR"),
    "lokr-factor": (sl.lokr(2, factor=2, scale=0.7), "LOKR"),
    "lokr-rank-above-half": (sl.lokr(3, dense_from="rank", scale=0.7), "LOKR"),
    "krona": (sl.krona(scale=0.7), "LOKR"),
    "lorta-aligned": (sl.lorta(2, fold="aligned", scale=0.7), "LORA"),
    "two-terms": (sl.Spec(rank=2, terms=2, scale=0.7), "LORA"),
}


@pytest.mark.parametrize(("spec", "method"), SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("scale", [None, -0.3])
def test_own_adapter_gives_its_outputs_in_peft(spec, method, scale, tmp_path):
    model, adapter = attach_random(spec)
    if scale is not None:
        adapter.scale = scale
    export = adapter.to_peft(tmp_path)
    assert set(export.errors.values()) == {0.0}
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == method
    theirs = load_with_peft(tmp_path)
    assert_outputs(theirs(make_x()), model(make_x()))
    again = make_model()
    slt.from_peft(again, tmp_path)
    assert_outputs(again(make_x()), model(make_x()))


@pytest.mark.parametrize("spec", [sl.lotr(2, scale=0.7), sl.fact_tk(2, scale=0.7)])
def test_a_stack_of_weights_is_a_lora_of_its_rank(spec, tmp_path):
    model, adapter = attach_random(spec, ["q"])
    export = adapter.to_peft(tmp_path)
    assert set(export.errors.values()) == {0.0}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2
    assert_outputs(load_with_peft(tmp_path)(make_x()), model(make_x()))


def test_conv1d_of_any_spec_is_written_as_lora(tmp_path):
    model, adapter = attach_random(sl.loha(2, scale=0.7), ["q", "c"])
    export = adapter.to_peft(tmp_path)
    assert set(export.methods.values()) == {"lora"}
    assert_outputs(load_with_peft(tmp_path)(make_x()), model(make_x()))


@pytest.mark.parametrize("names", [["blocks.0.q"], ["blocks.0.q", "blocks.1.v"], ["q", "down"]])
def test_only_the_adapted_layers_are_targets(names, tmp_path):
    model, adapter = attach_random(sl.lora(2, alpha=3), names)
    adapter.to_peft(tmp_path)
    assert_outputs(load_with_peft(tmp_path)(make_x()), model(make_x()))


def test_names_that_are_ends_of_others_are_told_apart(tmp_path):
    class Nested(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q = torch.nn.Linear(4, 4)
            self.inner = torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4)})

        def forward(self, x):
            return self.q(self.inner["q"](x))

    x = torch.randn(3, 4)
    model, base = Nested(), Nested()
    base.load_state_dict(model.state_dict())
    adapter = slt.attach(model, sl.lora(2), lambda name, _: name == "q")
    randomise(adapter)
    adapter.to_peft(tmp_path)
    assert_outputs(load_with_peft(tmp_path, base)(x), model(x))


def test_imported_adapter_trains_with_its_head(tmp_path):
    save_with_peft(CONFIGS["lora-head"], tmp_path)
    model = make_model()
    adapter = slt.from_peft(model, tmp_path)
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == set(map(id, adapter.parameters()))
    assert {"head.weight", "norm.bias"} < set(trained.values())
    model(make_x()).square().mean().backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_two_adapters_cannot_replace_one_head(tmp_path):
    save_with_peft(CONFIGS["lora-head"], tmp_path)
    model = make_model()
    slt.from_peft(model, tmp_path)
    with unchanged(model), pytest.raises(sl.AdapterError, match=r"has replaced 'norm\.weight'"):
        slt.from_peft(model, tmp_path, name="second")


def test_half_precision_base(tmp_path):
    expected = save_with_peft(CONFIGS["lora"], tmp_path)
    model = make_model(dtype=torch.bfloat16)
    adapter = slt.from_peft(model, tmp_path)
    assert adapter.dtype == torch.float32
    assert_outputs(model(make_x(dtype=torch.bfloat16)).float(), expected, 5e-2)


def test_what_is_disabled_is_saved_as_what_it_is(tmp_path):
    expected = save_with_peft(CONFIGS["lora-head"], tmp_path / "in")
    model = make_model()
    adapter = slt.from_peft(model, tmp_path / "in")
    with adapter.disabled():
        adapter.to_peft(tmp_path / "out")
        adapter.save(tmp_path / "own.safetensors")
    assert_outputs(load_with_peft(tmp_path / "out")(make_x()), expected)
    again = make_model()
    slt.load(again, tmp_path / "own.safetensors")
    assert_outputs(again(make_x()), expected)


def test_detached_for_good_keeps_weights_and_head(tmp_path):
    expected = save_with_peft(CONFIGS["lora-head"], tmp_path)
    model = make_model()
    adapter = slt.from_peft(model, tmp_path)
    adapter.merge()
    adapter.detach(keep_merged=True)
    assert_outputs(model(make_x()), expected)
