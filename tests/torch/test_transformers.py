"""Real models of transformers, tiny and random: GPT-2's Conv1D, BERT, ViT."""

import pytest
import torch

import superlora as sl
import superlora.torch as slt
from tests.pairs import in_turn
from tests.torch.helpers import SPECS, assert_near, fill, seeded, unchanged

transformers = pytest.importorskip("transformers")

SPEC_KEYS = [key for key in SPECS if key != "splits-3"]


def make_gpt2():
    config = transformers.GPT2Config(
        n_layer=2,
        n_embd=24,
        n_head=2,
        vocab_size=50,
        n_positions=16,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config), torch.tensor([[1, 7, 3, 9], [2, 4, 6, 8]])


def make_bert():
    config = transformers.BertConfig(
        num_hidden_layers=2,
        hidden_size=24,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=50,
        max_position_embeddings=16,
    )
    return transformers.BertModel(config), torch.tensor([[1, 7, 3, 9], [2, 4, 6, 8]])


def make_vit():
    config = transformers.ViTConfig(
        num_hidden_layers=2,
        hidden_size=24,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
    )
    return transformers.ViTModel(config), torch.linspace(-1, 1, 384).reshape(2, 3, 8, 8)


MODELS = {
    "gpt2": (make_gpt2, ["c_attn"]),
    "bert": (make_bert, ["query", "value"]),
    "vit": (make_vit, None),
}


def build(kind):
    make, targets = MODELS[kind]
    with seeded(0):
        model, x = make()
    names = [name for name, _ in model.named_modules()]
    if targets is None:
        # Named query and value, q_proj and v_proj, ... from release to release.
        old = any(name.endswith(".query") for name in names)
        targets = ["query", "value"] if old else ["q_proj", "v_proj"]
    return model.double().eval(), x.double() if x.is_floating_point() else x, targets


def fitting(key, targets):
    """Return a spec of the table, its names and explicit folds made to fit this model."""
    width = 24
    rows = 3 * width if targets == ["c_attn"] else width
    changes = {
        "lorta_cp": {"fold": (2, len(targets), 2, rows // 2, width)},
        "per-split-order": {"fold": ((2, 2, 4), (rows // 12, 3, 6))},
        "overrides": {"overrides": {rf".*\.0\..*{targets[-1]}": {"rank": 3, "scale": -0.5}}},
    }
    return SPECS[key].replace(**changes.get(key, {}))


def output(model, x):
    found = model(x)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


@pytest.mark.filterwarnings("ignore:no Kronecker structure:UserWarning")
@in_turn("key", SPEC_KEYS, "kind", list(MODELS))
def test_attach_train_merge_save_detach(kind, key, tmp_path):
    model, x, targets = build(kind)
    base = output(model, x)
    with unchanged(model):
        adapter = slt.attach(model, fitting(key, targets), targets)
        assert len(adapter.plan.shapes) == 2 * len(targets)
        # One vector for all blocks cannot be zero and have a gradient.
        assert torch.equal(output(model, x), base) or key == "unilora"
        optimizer = torch.optim.SGD(adapter.parameters(), 0.05)
        for _ in range(2):
            optimizer.zero_grad()
            output(model, x).square().mean().backward()
            optimizer.step()
        assert all(factor.grad.abs().max() > 0 for factor in adapter.parameters())
        fill(adapter)
        y = output(model, x)
        assert (y - base).norm() > 1e-3 * base.norm()
        adapter.merge()
        assert_near(output(model, x), y)
        adapter.unmerge()
        adapter.save(tmp_path / "a.safetensors")
        adapter.detach()
        assert torch.equal(output(model, x), base)
        loaded = slt.load(model, tmp_path / "a.safetensors")
        assert torch.equal(output(model, x), y)
        loaded.detach()


@pytest.mark.parametrize("key", ["lora", "cut"])
def test_generation_with_cache(key):
    model, x, targets = build("gpt2")
    fill(slt.attach(model, SPECS[key], targets))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(x)
    cached = model.generate(x, attention_mask=mask, use_cache=True, **options)
    plain = model.generate(x, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(cached, plain)


def test_all_linear_leaves_out_the_head_that_shares_the_embedding():
    model, x, _ = build("gpt2")
    adapter = slt.attach(model, sl.lora(2))
    assert len(adapter.plan.shapes) == 8
    assert "lm_head" not in adapter.plan.shapes
    fill(adapter)
    y = output(model, x)
    adapter.merge()
    assert_near(output(model, x), y)


def test_tied_head_is_refused_and_both_owners_are_named():
    model, _, _ = build("gpt2")
    with unchanged(model), pytest.raises(ValueError, match=r"'lm_head\.weight'.*'transformer\.wte"):
        slt.attach(model, sl.lora(2), ["lm_head"])


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_gradient_checkpointing_of_transformers(reentrant):
    model, x, targets = build("gpt2")
    adapter = fill(slt.attach(model, SPECS["cut"], targets))
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    output(model, x).square().mean().backward()
    expected = [factor.grad.clone() for factor in adapter.parameters()]
    adapter.zero_grad()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    output(model, x).square().mean().backward()
    for factor, gradient in zip(adapter.parameters(), expected, strict=True):
        assert_near(factor.grad, gradient)


def test_save_pretrained_of_a_detached_model_is_plain(tmp_path):
    model, x, targets = build("gpt2")
    adapter = fill(slt.attach(model, SPECS["lora"], targets))
    adapter.merge()
    y = output(model, x)
    adapter.detach(keep_merged=True)
    model.save_pretrained(tmp_path)
    dtype = "dtype" if int(transformers.__version__.partition(".")[0]) > 4 else "torch_dtype"
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, **{dtype: torch.float64}).eval()
    assert_near(output(again, x), y)


def test_bert_under_autocast():
    model, x, targets = build("bert")
    model.float()
    fill(slt.attach(model, SPECS["lora"], targets))
    expected = output(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        y = output(model, x)
    assert (y - expected).norm() <= 0.1 * expected.norm()
