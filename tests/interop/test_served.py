"""Files for servers and for other programs, read by these or by their formats' description."""

import copy
import json

import numpy
import peft
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from torch import nn

import superlora as sl
import superlora.torch as slt

transformers = pytest.importorskip("transformers")
# Of what PEFT asks transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

X = torch.arange(12).reshape(2, 6)


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=16, max_position_embeddings=16, **sizes, **heads)
    return transformers.LlamaForCausalLM(config).eval()


def filled(adapter):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter) / 3)
    return adapter


SPECS = {
    "lora": sl.lora(2, alpha=5),
    "rslora": sl.lora(4, alpha=3, rslora=True),
    "ranks": sl.lora(2, alpha=5, overrides={"v_proj": {"rank": 4, "scale": -0.5}}),
    "lokr": sl.lokr(2, scale=0.7),
    "lokr-negative": sl.lokr(1, decompose_both=True, dense_from="never", scale=-2.0),
    "lorta": sl.lorta(2, fold="aligned", scale=0.7),
    "lotr": sl.lotr(2, scale=5.0, overrides={"v_proj": None}),
    "no scale": sl.lora(2, scale=0.0),
}


def read_as_servers_do(folder, model):
    """The format's description in NumPy: W + alpha / r B A, by the names of the tensors."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["lora_alpha"] == config["r"]
    assert isinstance(config["lora_alpha"], int)
    assert not config["modules_to_save"]
    assert not config.get("use_rslora")
    tensors = load_file(folder / "adapter_model.safetensors")
    state = dict(model.named_parameters())
    for key, down in tensors.items():
        if not key.endswith(".lora_A.weight"):
            assert key.endswith(".lora_B.weight")
            continue
        up = tensors[key.replace("lora_A", "lora_B")]
        assert down.shape[0] == up.shape[1] == config["r"]
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        assert name.rpartition(".")[2] in config["target_modules"]
        with torch.no_grad():
            state[f"{name}.weight"] += torch.from_numpy(
                config["lora_alpha"] / config["r"] * up @ down
            )
    return config


@pytest.mark.parametrize("case", SPECS)
def test_servers_and_peft_compute_the_same(case, tmp_path):
    model = llama()
    base = copy.deepcopy(model)
    adapter = filled(slt.attach(model, SPECS[case], ["q_proj", "v_proj"]))
    export = adapter.to_peft(tmp_path, serve=True)
    assert set(export.methods.values()) == {"lora"}
    assert set(export.errors.values()) == {0.0}
    expected = model(X).logits.detach()
    served = copy.deepcopy(base)
    assert read_as_servers_do(tmp_path, served)["task_type"] == "CAUSAL_LM"
    torch.testing.assert_close(served(X).logits, expected, atol=2e-4, rtol=1e-4)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(theirs(X).logits, expected, atol=2e-4, rtol=1e-4)
    if case != "no scale":
        assert (expected - llama()(X).logits).abs().max() > 1e-2


def test_gpt2_is_served(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=16, n_positions=16, n_embd=24, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    base = copy.deepcopy(model)
    adapter = filled(slt.attach(model, sl.lora(2, alpha=5), ["c_attn", "c_proj"]))
    adapter.to_peft(tmp_path, serve=True)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(theirs(X).logits, model(X).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        # Under the names of tasks with a head of classes PEFT wants the head in the file.
        ("BertForSequenceClassification", None),
        ("BertForTokenClassification", None),
        ("BertForQuestionAnswering", None),
        ("BertModel", "FEATURE_EXTRACTION"),
    ],
)
def test_peft_opens_the_folder_of_every_task(name, task, tmp_path):
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=50,
    )
    model = getattr(transformers, name)(config).eval()
    base = copy.deepcopy(model)
    adapter = slt.attach(model, sl.lora(2, alpha=3), ["query", "value"])
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    adapter.to_peft(tmp_path, serve=True)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == task
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    words = torch.arange(10).reshape(2, 5)
    torch.testing.assert_close(theirs(words)[0], model(words)[0], atol=1e-4, rtol=1e-4)


def test_what_is_no_low_rank_says_what_it_costs(tmp_path):
    model = llama()
    adapter = filled(slt.attach(model, sl.dense(scale=0.1), ["q_proj"]))
    with pytest.raises(
        ValueError, match=r"its rank is 32.* 1, .* at rank 4.*error of 0\.1 takes rank"
    ):
        adapter.to_peft(tmp_path, serve=True)
    export = adapter.to_peft(tmp_path, serve=True, energy=0.9)
    assert all(0 < error**2 <= 0.1 + 1e-6 for error in export.errors.values())
    kept = adapter.delta("model.layers.0.self_attn.q_proj").detach().clone()
    served = llama()
    read_as_servers_do(tmp_path, served)
    weights = [own.model.layers[0].self_attn.q_proj.weight for own in (served, llama())]
    found = (weights[0] - weights[1]).detach()
    error = float((found - kept).norm() / kept.norm())
    assert error == pytest.approx(export.errors["model.layers.0.self_attn.q_proj"], rel=1e-3)


def test_what_servers_do_not_load_is_refused(tmp_path):
    model = llama()
    adapter = slt.attach(model, sl.lora(2), ["q_proj"], also=["lm_head"])
    with pytest.raises(ValueError, match=r"servers load none: got 'lm_head\.weight'"):
        adapter.to_peft(tmp_path / "a", serve=True)
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4))
    adapter = slt.attach(conv, sl.lora(2), ["0"])
    with pytest.raises(ValueError, match="linear or embeddings to be served"):
        adapter.to_peft(tmp_path / "a", serve=True)
    assert not (tmp_path / "a").exists()


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.double_blocks = nn.ModuleList(nn.Linear(24, 36) for _ in range(2))
        self.out = nn.Linear(36, 24)

    def forward(self, x):
        return sum(self.out(torch.tanh(block(x))) for block in self.double_blocks)


FILES = {
    "lora": sl.lora(2, alpha=5),
    "lokr": sl.lokr(2, scale=0.7),
    "krona": sl.krona(scale=-1.5),
    "loha": sl.loha(2, scale=0.7),
    "dense": sl.dense(scale=0.7),
}
PREFIXES = {"lycoris": "lycoris_", "kohya": "lora_unet_", "comfy": "diffusion_model."}


@pytest.mark.parametrize("keys", [*PREFIXES, "diffusers"])
@pytest.mark.parametrize("case", FILES)
def test_files_of_all_names_are_read(keys, case, tmp_path):
    torch.manual_seed(0)
    model = Blocks()
    adapter = filled(slt.attach(model, FILES[case], ["0", "1", "out"]))
    x = torch.randn(3, 24)
    expected = model(x).detach()
    options = {"rank": 24} if keys == "diffusers" and case != "lora" else {}
    adapter.to_lycoris(tmp_path / "a.safetensors", keys=keys, **options)
    adapter.detach()
    names = set(load_tensors(tmp_path / "a.safetensors"))
    begin = PREFIXES.get(keys, "transformer.")
    layers = (f"{begin}double_blocks{begin[-1]}0.", f"{begin}double_blocks{begin[-1]}1.")
    assert all(name.startswith((*layers, f"{begin}out.")) for name in names)
    slt.from_lycoris(model, tmp_path / "a.safetensors")
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)


def scale_by_comfy(tensors, stem):
    """ComfyUI's rule: alpha over the inner width of the last factored part, 1 without any."""
    widths = [
        tensors[f"{stem}.{leaf}"].shape[0]
        for leaf in ("lokr_w1_b", "lokr_w2_b", "hada_w1_b")
        if f"{stem}.{leaf}" in tensors
    ]
    alpha = float(tensors[f"{stem}.alpha"])
    return alpha / widths[-1] if widths else 1.0


@pytest.mark.parametrize("case", ["lokr", "krona", "loha"])
def test_no_reader_can_take_alpha_for_another_scale(case, tmp_path):
    model = Blocks()
    adapter = filled(slt.attach(model, FILES[case], ["0"]))
    adapter.to_lycoris(tmp_path / "a.safetensors", keys="comfy")
    tensors = load_file(tmp_path / "a.safetensors")
    stem = "diffusion_model.double_blocks.0"
    assert scale_by_comfy(tensors, stem) == 1.0

    def whole(name):
        if f"{stem}.{name}" in tensors:
            return tensors[f"{stem}.{name}"]
        return tensors[f"{stem}.{name}_a"] @ tensors[f"{stem}.{name}_b"]

    if case == "loha":
        delta = whole("hada_w1") * whole("hada_w2")
    else:
        delta = numpy.kron(whole("lokr_w1"), whole("lokr_w2"))
    expected = adapter.delta("double_blocks.0").detach().numpy()
    numpy.testing.assert_allclose(delta, expected, atol=1e-5)


def test_diffusers_loads_its_own_names(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        **{"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1},
        **{"block_out_channels": (8, 16), "cross_attention_dim": 8, "norm_num_groups": 4},
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    ).eval()
    other = copy.deepcopy(unet)
    adapter = filled(slt.attach(unet, sl.lora(2, alpha=5), ["to_q", "to_v"]))
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 8)
    expected = unet(*inputs).sample.detach()
    adapter.to_lycoris(tmp_path / "a.safetensors", keys="diffusers")
    other.load_lora_adapter(load_tensors(tmp_path / "a.safetensors"), prefix="unet")
    torch.testing.assert_close(other(*inputs).sample, expected, atol=1e-4, rtol=1e-4)


def test_other_parts_of_a_pipeline_are_left_out_with_a_warning(tmp_path):
    from safetensors.torch import save_file

    model = Blocks()
    adapter = filled(slt.attach(model, FILES["lora"], ["0"]))
    expected = model(torch.ones(1, 24)).detach()
    adapter.to_lycoris(tmp_path / "a.safetensors", keys="kohya")
    adapter.detach()
    tensors = load_tensors(tmp_path / "a.safetensors")
    more = {key.replace("lora_unet", "lora_te1"): own.clone() for key, own in tensors.items()}
    save_file(tensors | more, tmp_path / "both.safetensors")
    with pytest.raises(ValueError, match="prefix must be given"):
        slt.from_lycoris(model, tmp_path / "both.safetensors")
    slt.from_lycoris(model, tmp_path / "both.safetensors", prefix="lora_unet")
    torch.testing.assert_close(model(torch.ones(1, 24)), expected)


def test_unknown_names_are_refused(tmp_path):
    adapter = slt.attach(Blocks(), FILES["lora"], ["0"])
    with pytest.raises(ValueError, match="keys must be one of lycoris, kohya, comfy, diffusers"):
        adapter.to_lycoris(tmp_path / "a.safetensors", keys="webui")
