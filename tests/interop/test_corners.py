"""What PEFT and LyCORIS do in corners: shared weights, names, missing parts, odd sizes."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import superlora as sl
import superlora.torch as slt
from tests.interop.models import (
    assert_outputs,
    attach_random,
    load_with_lycoris,
    load_with_peft,
    make_model,
    make_x,
    peft,
    quiet,
    randomise,
    save_with_peft,
)
from tests.torch.helpers import seeded, unchanged

pytestmark = quiet
transformers = pytest.importorskip("transformers")
TEXT = torch.arange(12).reshape(2, 6)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def make_gpt2(seed=0):
    with seeded(seed):
        config = transformers.GPT2Config(
            vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, use_cache=False
        )
        return transformers.GPT2LMHeadModel(config).eval()


def through_peft(model, config, folder):
    """Save a random PEFT adapter of a model, and return its output."""
    with seeded(1):
        theirs = peft.get_peft_model(copy.deepcopy(model), config)
    randomise(theirs)
    theirs.save_pretrained(folder)
    with torch.no_grad():
        return theirs.eval()(TEXT).logits


@pytest.mark.parametrize("saved", [["lm_head"], ["wte"], ["wte", "lm_head"]], ids="+".join)
def test_a_saved_module_that_shares_its_weight_is_untied_as_in_peft(saved, tmp_path):
    base = make_gpt2()
    config = peft.LoraConfig(
        r=2, lora_alpha=5, target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=saved
    )
    expected = through_peft(base, config, tmp_path / "in")
    before = base(TEXT).logits
    with unchanged(base):
        adapter = slt.from_peft(base, tmp_path / "in")
        assert_outputs(base(TEXT).logits, expected, 1e-5)
        with adapter.disabled():
            assert torch.equal(base(TEXT).logits, before)
        adapter.to_peft(tmp_path / "out")
        adapter.save(tmp_path / "own.safetensors")
        adapter.detach()
    assert base.lm_head.weight is base.transformer.wte.weight
    theirs = peft.PeftModel.from_pretrained(make_gpt2(), tmp_path / "out").eval()
    assert_outputs(theirs(TEXT).logits, expected, 1e-5)
    again = make_gpt2()
    slt.load(again, tmp_path / "own.safetensors")
    assert_outputs(again(TEXT).logits, expected, 1e-5)


CLASSIFIERS = {
    "distilbert": (
        transformers.DistilBertConfig,
        ["q_lin", "v_lin"],
        {"dim": 16, "hidden_dim": 24},
    ),
    "roberta": (transformers.RobertaConfig, "all-linear", {"hidden_size": 16}),
    "llama": (transformers.LlamaConfig, ["q_proj"], {"hidden_size": 16}),
}
WIDTHS = {
    "vocab_size": 40,
    "intermediate_size": 24,
    "n_layers": 2,
    "n_heads": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(("kind", "targets", "sizes"), CLASSIFIERS.values(), ids=CLASSIFIERS)
@pytest.mark.parametrize("bias", ["none", "all"])
def test_classifiers_of_transformers(kind, targets, sizes, bias, tmp_path):
    with seeded(0):
        config = kind(**WIDTHS, **sizes)
        base = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    peft_config = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, lora_alpha=5, target_modules=targets, bias=bias
    )
    expected = through_peft(base, peft_config, tmp_path)
    before = base(TEXT).logits
    adapter = slt.from_peft(base, tmp_path)
    assert_outputs(base(TEXT).logits, expected, 1e-5)
    adapter.detach()
    assert torch.equal(base(TEXT).logits, before)


def test_saved_modules_are_named_by_any_end(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q"], modules_to_save=["orm", "own"])
    expected = save_with_peft(config, tmp_path)
    model = make_model()
    slt.from_peft(model, tmp_path)
    assert_outputs(model(make_x()), expected)


@pytest.mark.parametrize(
    ("options", "drop", "message"),
    [
        ({"modules_to_save": ["head"]}, ["head.bias"], r"missing 'head\.bias'"),
        ({"modules_to_save": ["head"]}, ["head"], r"missing 'head\.weight'"),
        ({"bias": "lora_only"}, ["bias"], r"missing 'blocks\.0\.q\.bias'"),
        ({"bias": "all"}, ["norm.bias"], r"missing 'norm\.bias'"),
        (
            {"layers_to_transform": [0, 1], "layers_pattern": "blocks"},
            ["blocks.1"],
            r"missing the tensors of 'blocks\.1\.q'",
        ),
    ],
)
def test_what_peft_saved_and_the_file_lacks(options, drop, message, tmp_path):
    save_with_peft(peft.LoraConfig(r=2, target_modules=["q", "v"], **options), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    held = {key: t for key, t in tensors.items() if not any(part in key for part in drop)}
    assert 0 < len(held) < len(tensors)
    save_file(held, tmp_path / WEIGHTS)
    model = make_model()
    with unchanged(model), pytest.raises(ValueError, match=message):
        slt.from_peft(model, tmp_path)


def test_an_adapted_head_comes_with_its_base_weight(tmp_path):
    base = make_gpt2()
    config = peft.LoraConfig(r=2, target_modules=["lm_head"])
    expected = through_peft(base, config, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = "base_model.model.lm_head.base_layer.weight"
    tensors.setdefault(key, base.lm_head.weight.detach().clone())
    save_file(tensors, tmp_path / WEIGHTS)
    untied = make_gpt2()
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    slt.from_peft(untied, tmp_path)
    assert_outputs(untied(TEXT).logits, expected, 1e-5)
    save_file({**tensors, key: tensors[key] + 1}, tmp_path / WEIGHTS)
    other = make_gpt2()
    other.lm_head.weight = nn.Parameter(other.lm_head.weight.detach().clone())
    with pytest.raises(ValueError, match="saved with another base"):
        slt.from_peft(other, tmp_path)


class Nested(nn.Module):
    """Whose layers' names are ends of others."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.inner = nn.ModuleDict({part: nn.Linear(8, 8) for part in "qab"})

    def forward(self, x):
        for layer in (*self.inner.values(), self.q):
            x = layer(x)
        return x


def make_nested():
    with seeded(0):
        return Nested()


@pytest.mark.parametrize("patterns", [{"alpha_pattern": {"^q": 9}}, {"rank_pattern": {"^q": 3}}])
def test_layers_whose_names_are_ends_of_others(patterns, tmp_path):
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q", "a", "b"], **patterns)
    theirs = peft.get_peft_model(make_nested(), config)
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "in")
    x = torch.randn(3, 8)
    model = make_nested()
    adapter = slt.from_peft(model, tmp_path / "in")
    assert_outputs(model(x), theirs(x))
    adapter.to_peft(tmp_path / "out")
    assert_outputs(load_with_peft(tmp_path / "out", make_nested())(x), theirs(x))
    adapter.save(tmp_path / "own.safetensors")
    again = make_nested()
    slt.load(again, tmp_path / "own.safetensors")
    assert_outputs(again(x), theirs(x))


def test_lycoris_alphas_of_layers_whose_names_are_ends_of_others(tmp_path):
    model = make_nested()
    overrides = {"^q": {"alpha": 9}}
    adapter = slt.attach(model, sl.lora(2, alpha=3, overrides=overrides), ["q", "a", "b"])
    randomise(adapter)
    adapter.to_lycoris(tmp_path / "a.safetensors")
    again = make_nested()
    back = slt.from_lycoris(again, tmp_path / "a.safetensors")
    assert back.blocks.scales == adapter.blocks.scales


@pytest.mark.parametrize("spec", [sl.lora(2), sl.loha(2), sl.lokr(1), sl.dense()])
def test_a_scale_of_zero(spec, tmp_path):
    model, adapter = attach_random(spec)
    adapter.scale = 0.0
    adapter.to_lycoris(tmp_path / "a.safetensors")
    assert_outputs(load_with_lycoris(tmp_path / "a.safetensors")(make_x()), model(make_x()))
    if spec != sl.dense():
        adapter.to_peft(tmp_path / "peft")
        assert_outputs(load_with_peft(tmp_path / "peft")(make_x()), model(make_x()))


def test_lycoris_reads_an_alpha_of_zero_as_the_rank(tmp_path):
    _, adapter = attach_random(sl.lora(2))
    path = tmp_path / "a.safetensors"
    adapter.to_lycoris(path)
    tensors = load_file(path)
    save_file({k: 0 * t if k.endswith("alpha") else t for k, t in tensors.items()}, path)
    model = make_model()
    slt.from_lycoris(model, path)
    assert_outputs(model(make_x()), load_with_lycoris(path)(make_x()))


def test_names_that_are_one_in_lycoris(tmp_path):
    model = nn.ModuleDict({"x_q": nn.Linear(4, 4), "x": nn.ModuleDict({"q": nn.Linear(4, 4)})})
    adapter = slt.attach(model, sl.lora(2), "all-linear")
    with pytest.raises(ValueError, match=r"differ once dots are underscores: got x_q, x\.q"):
        adapter.to_lycoris(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_kronecker_product_with_a_number(tmp_path):
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(7, 7)

        def forward(self, x):
            return self.q(x)

    base = Small()
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoKrConfig(r=2, alpha=5, target_modules=["q"])
    )
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "in")
    x = torch.randn(3, 7)
    model = copy.deepcopy(base)
    adapter = slt.from_peft(model, tmp_path / "in")
    assert_outputs(model(x), theirs(x))
    adapter.to_peft(tmp_path / "out")
    assert_outputs(load_with_peft(tmp_path / "out", copy.deepcopy(base))(x), theirs(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("key", ["lora", "vera", "lora_xs", "lokr"])
def test_exact_is_exact_whatever_the_factors_precision(key, dtype, tmp_path):
    spec = sl.lokr(3, dense_from="never") if key == "lokr" else getattr(sl, key)(3)
    model = make_model(dtype=torch.float64)
    adapter = slt.attach(model, spec, ["q", "v"], dtype=dtype)
    randomise(adapter)
    export = adapter.to_peft(tmp_path)
    assert set(export.errors.values()) == {0.0}
    theirs = load_with_peft(tmp_path)
    blocks = {name: value.detach().double() for name, value in adapter.factors().items()}
    for name, delta in adapter.plan.deltas(blocks).items():
        found = theirs.base_model.model.get_submodule(name).get_delta_weight("default")
        assert_outputs(found.double(), delta, 1e-6)


def test_a_folder_in_a_files_place_leaves_the_other_file(tmp_path):
    _, adapter = attach_random(sl.lora(2))
    (tmp_path / CONFIG).mkdir()
    (tmp_path / WEIGHTS).write_bytes(b"mine")
    with pytest.raises(IsADirectoryError):
        adapter.to_peft(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == b"mine"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("read", [slt.from_peft, slt.from_lycoris])
def test_what_is_no_model(read, tmp_path):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module: got int"):
        read(42, tmp_path)


def test_named_adapters_are_found(tmp_path):
    model = peft.get_peft_model(
        make_model(), peft.LoraConfig(r=2, target_modules=["q"]), adapter_name="fr"
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"its sub-folders \['fr'\] have one"):
        slt.from_peft(make_model(), tmp_path)
    slt.from_peft(make_model(), tmp_path / "fr")


def test_headers_of_many_layers_stay_small(tmp_path):
    model = nn.ModuleList(
        nn.ModuleDict({part: nn.Linear(8, 8, bias=False) for part in ("query", "value", "mlp")})
        for _ in range(60)
    )
    config = peft.LoraConfig(
        r=4, target_modules=["query", "value", "mlp"], rank_pattern={"value": 2, "mlp": 1}
    )
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path)
    adapter = slt.from_peft(model, tmp_path)
    adapter.save(tmp_path / "own.safetensors")
    names = sum(map(len, [*adapter.plan.shapes, *adapter.plan.factor_shapes]))
    size = (tmp_path / "own.safetensors").stat().st_size
    assert size - 4 * adapter.num_parameters < 4096 + names + 80 * len(adapter.plan.factor_shapes)


SCRIPT = """
import sys, torch
sys.path[:0] = sys.argv[2:]
import superlora as sl
from tests.interop.models import attach_random
_, adapter = attach_random(sl.lora(2, alpha=3, overrides={"v": {"rank": 3}}))
adapter.to_peft(sys.argv[1])
adapter.to_lycoris(sys.argv[1] + "/l.safetensors")
"""


@pytest.mark.slow
def test_exports_do_not_depend_on_the_hash_seed(tmp_path):
    content = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder), *sys.path],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
        )
        content.append({file.name: file.read_bytes() for file in sorted(folder.iterdir())})
    assert content[0] == content[1]
    assert json.loads(content[0][CONFIG])["rank_pattern"]
