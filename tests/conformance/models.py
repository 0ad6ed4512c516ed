"""The architectures that every method is tried on: a line says how one is built and called."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """An architecture.

    Attributes
    ----------
    library : str
        What has to be installed.
    build : callable
        Makes the model, with random weights.
    call : callable
        Makes the inputs by name; ``"x"`` is given by its place.
    quick : bool
        Whether the suite tries it; else only the slow tests do.
    generates : bool
        Whether it has ``generate``.
    """

    library: str
    build: Callable[[], nn.Module]
    call: Callable[[], Inputs]
    quick: bool = False
    generates: bool = False
    # Grouped products of experts have no other kernel.
    dtype: torch.dtype = torch.float64


def _ids(*names: str) -> Inputs:
    ids = torch.tensor([[3, 9, 27, 17, 5, 8], [4, 8, 16, 32, 1, 7]])
    return {name: ids for name in names or ("input_ids",)}


def _image(size: int = 32, channels: int = 3, name: str = "x") -> Inputs:
    return {name: torch.linspace(-1, 1, 2 * channels * size * size).view(2, channels, size, size)}


def _signal(shape: tuple[int, ...], **more: Any) -> Inputs:
    count = int(torch.tensor(shape).prod())
    return {"x": torch.sin(torch.arange(count) * 0.7).view(shape), **more}


_TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _transformers(config: str, model: str, **fields: Any) -> nn.Module:
    library = importlib.import_module("transformers")
    found = getattr(library, model)(getattr(library, config)(**fields))
    assert isinstance(found, nn.Module)
    return found


def text(
    family: str,
    model: str = "ForCausalLM",
    quick: bool = False,
    architecture: str = "",
    **fields: Any,
) -> Entry:
    """Return a language model of transformers."""
    build = functools.partial(
        _transformers,
        f"{family}Config",
        architecture or f"{family}{model}",
        **{k: v for k, v in {**_TEXT, **fields}.items() if v is not ...},
    )
    generates = model in ("ForCausalLM", "LMHeadModel")
    names = (
        ("input_ids", "decoder_input_ids") if "Seq2Seq" in model or "Conditional" in model else ()
    )
    single = "num_experts_per_tok" in fields
    dtype = torch.float32 if single else torch.float64
    return Entry("transformers", build, lambda: _ids(*names), quick, generates, dtype)


def other(
    family: str,
    call: Callable[[], Inputs],
    model: str = "Model",
    quick: bool = False,
    **fields: Any,
) -> Entry:
    """Return another model of transformers."""
    build = functools.partial(_transformers, f"{family}Config", f"{family}{model}", **fields)
    return Entry("transformers", build, call, quick)


def timm(name: str, size: int = 32, quick: bool = False, **fields: Any) -> Entry:
    """Return an image model of timm."""

    def build() -> nn.Module:
        library = importlib.import_module("timm")
        found = library.create_model(name, pretrained=False, num_classes=5, **fields)
        assert isinstance(found, nn.Module)
        return found

    return Entry("timm", build, lambda: _image(size), quick)


def torchvision(name: str, size: int = 64, quick: bool = False, **fields: Any) -> Entry:
    """Return an image model of torchvision, by the name of a function or a class."""

    def build() -> nn.Module:
        library = importlib.import_module("torchvision.models")
        found = getattr(library, name)(num_classes=5, **fields)
        assert isinstance(found, nn.Module)
        return found

    return Entry("torchvision", build, lambda: _image(size), quick)


def _resnet() -> nn.Module:
    library = importlib.import_module("torchvision.models.resnet")
    found = library.ResNet(library.BasicBlock, [1, 1, 1, 1], num_classes=5)
    assert isinstance(found, nn.Module)
    return found


def diffusers(name: str, call: Callable[[], Inputs], quick: bool = False, **fields: Any) -> Entry:
    """Return a model of diffusers."""

    def build() -> nn.Module:
        found = getattr(importlib.import_module("diffusers"), name)(**fields)
        assert isinstance(found, nn.Module)
        return found

    return Entry("diffusers", build, call, quick)


def plain(build: Callable[[], nn.Module], call: Callable[[], Inputs], quick: bool = True) -> Entry:
    """Return a model of torch alone."""
    return Entry("torch", build, call, quick)


class Recurrent(nn.Module):
    """A recurrent layer and a head."""

    def __init__(self, kind: type[nn.RNNBase], **fields: Any) -> None:
        super().__init__()
        self.rnn = kind(8, 12, batch_first=True, **fields)
        self.out = nn.Linear(12 * (1 + self.rnn.bidirectional), 5)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of every step."""
        found: Tensor = self.out(self.rnn(x)[0])
        return found


class Pair(nn.Module):
    """A bilinear layer of two halves."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Bilinear(6, 4, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return one output a row."""
        found: Tensor = self.out(torch.tanh(self.mix(x[..., :6], x[..., 6:])))
        return found


class Attention(nn.Module):
    """Attention with keys of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, kdim=8, vdim=12, batch_first=True)
        self.key, self.value = nn.Linear(16, 8), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the inputs take from each other."""
        found: Tensor = self.attention(x, self.key(x), self.value(x))[0]
        return found


def _autoencoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4, padding_mode="reflect"),
        nn.GroupNorm(2, 8),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.ConvTranspose2d(8, 4, 4, 2, 1, groups=2),
        nn.Conv2d(4, 3, 1),
    )


_VIT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_WAVE = {
    **_VIT,
    "conv_dim": (8, 8),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 16,
}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
_HEADS = {"n_head": 4, "n_layer": 2, "n_embd": 32, "n_positions": 64, "hidden_size": 32}
_wave = functools.partial(_signal, (2, 400))
_pixels = functools.partial(_image, 32, 3, "pixel_values")


MODELS: dict[str, Entry] = {
    # torch.nn
    "nn MLP": plain(
        lambda: nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4)),
        lambda: _signal((3, 8)),
    ),
    "nn convolutions": plain(_autoencoder, lambda: _image(16)),
    "nn Conv1d": plain(
        lambda: nn.Sequential(
            nn.Conv1d(4, 8, 5, padding=2, padding_mode="circular"),
            nn.SiLU(),
            nn.ConvTranspose1d(8, 2, 3),
        ),
        lambda: _signal((2, 4, 11)),
    ),
    "nn Conv3d": plain(
        lambda: nn.Sequential(
            nn.Conv3d(2, 6, (1, 3, 3), 2), nn.SiLU(), nn.ConvTranspose3d(6, 3, 2)
        ),
        lambda: _signal((2, 2, 4, 7, 7)),
    ),
    "nn MultiheadAttention": plain(Attention, lambda: _signal((2, 5, 16))),
    "nn TransformerEncoder": plain(
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2, enable_nested_tensor=False
        ),
        lambda: _signal((2, 5, 16)),
    ),
    "nn Transformer": plain(
        lambda: nn.Transformer(16, 4, 1, 1, 32, batch_first=True),
        lambda: {"src": _signal((2, 5, 16))["x"], "tgt": _signal((2, 3, 16))["x"]},
    ),
    "nn LSTM": plain(lambda: Recurrent(nn.LSTM, bidirectional=True), lambda: _signal((2, 5, 8))),
    "nn GRU": plain(lambda: Recurrent(nn.GRU, num_layers=2), lambda: _signal((2, 5, 8))),
    "nn Bilinear": plain(Pair, lambda: _signal((4, 10))),
    # Text
    "Llama": text("Llama", quick=True),
    "Mistral": text("Mistral"),
    "Qwen2": text("Qwen2"),
    "Qwen3": text("Qwen3", quick=True),
    "Gemma2": text("Gemma2"),
    "Gemma3": text(
        "Gemma3Text",
        "",
        architecture="Gemma3ForCausalLM",
        layer_types=["full_attention", "sliding_attention"],
    ),
    "Phi": text("Phi"),
    "Phi3": text("Phi3"),
    "OLMo2": text("Olmo2"),
    "Cohere": text("Cohere"),
    "StableLM": text("StableLm"),
    "Falcon": text("Falcon", head_dim=..., new_decoder_architecture=True),
    "GPT-NeoX": text("GPTNeoX"),
    "GPT-J": text("GPTJ", n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64),
    "GPT-2": text("GPT2", "LMHeadModel", quick=True, **_HEADS),
    "OPT": text("OPT", ffn_dim=48, word_embed_proj_dim=32),
    "Bloom": text("Bloom", slow_but_exact=True, pretraining_tp=2),
    "Mamba": text("Mamba", state_size=4, quick=True),
    "Mamba2": text("Mamba2", state_size=4, num_heads=8, expand=2, n_groups=2, chunk_size=4),
    "Falcon-Mamba": text("FalconMamba", state_size=4),
    "Jamba": text(
        "Jamba",
        mamba_d_state=4,
        use_mamba_kernels=False,
        attn_layer_offset=1,
        attn_layer_period=2,
        **_EXPERTS,
    ),
    "RecurrentGemma": text(
        "RecurrentGemma", lru_width=32, num_hidden_layers=3, attention_window_size=8
    ),
    "BERT": text("Bert", "ForSequenceClassification", quick=True),
    "RoBERTa": text("Roberta", "ForSequenceClassification"),
    "DistilBERT": text(
        "DistilBert", "ForSequenceClassification", dim=32, n_heads=4, n_layers=2, hidden_dim=48
    ),
    "ALBERT": text("Albert", "Model", embedding_size=16),
    "ELECTRA": text("Electra", "Model", embedding_size=16),
    "DeBERTa-v2": text(
        "DebertaV2",
        "ForSequenceClassification",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
    ),
    "ModernBERT": text("ModernBert", "ForMaskedLM"),
    "MobileBERT": text(
        "MobileBert",
        "ForMaskedLM",
        embedding_size=16,
        intra_bottleneck_size=16,
        true_hidden_size=16,
    ),
    "T5": text(
        "T5",
        "ForConditionalGeneration",
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    ),
    "BART": text(
        "Bart",
        "ForConditionalGeneration",
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
    ),
    # Experts
    "Mixtral": text("Mixtral", quick=True, **_EXPERTS),
    "Qwen2-MoE": text(
        "Qwen2Moe", moe_intermediate_size=24, shared_expert_intermediate_size=24, **_EXPERTS
    ),
    "Qwen3-MoE": text("Qwen3Moe", moe_intermediate_size=24, **_EXPERTS),
    "GPT-OSS": text("GptOss", quick=True, **_EXPERTS),
    "DeepSeek-V3": text(
        "DeepseekV3",
        moe_intermediate_size=24,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        first_k_dense_replace=1,
        num_key_value_heads=4,
        head_dim=4,
        num_experts_per_tok=2,
    ),
    "OLMoE": text("Olmoe", **_EXPERTS),
    "Llama 4": text(
        "Llama4Text",
        "",
        architecture="Llama4ForCausalLM",
        intermediate_size_mlp=48,
        num_experts_per_tok=1,
        num_local_experts=4,
        interleave_moe_layer_step=2,
    ),
    "Phi-MoE": text("Phimoe", **_EXPERTS),
    # Images and sound
    "ViT": other(
        "ViT", _pixels, "ForImageClassification", True, image_size=32, patch_size=8, **_VIT
    ),
    "DeiT": other("DeiT", _pixels, image_size=32, patch_size=8, **_VIT),
    "DINOv2": other("Dinov2", _pixels, image_size=32, patch_size=8, **_VIT),
    "BEiT": other("Beit", _pixels, image_size=32, patch_size=8, **_VIT),
    "Swin": other(
        "Swin",
        _pixels,
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
    ),
    "ConvNeXt": other(
        "ConvNext",
        _pixels,
        "ForImageClassification",
        hidden_sizes=[8, 16, 16, 16],
        layer_scale_init_value=1.0,
        depths=[1, 1, 1, 1],
    ),
    "SegFormer": other(
        "Segformer",
        _pixels,
        depths=[1, 1],
        num_encoder_blocks=2,
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        num_attention_heads=[1, 2],
        patch_sizes=[7, 3],
        strides=[4, 2],
        mlp_ratios=[2, 2],
    ),
    "CLIP vision": other("CLIPVision", _pixels, image_size=32, patch_size=8, **_VIT),
    "WavLM": other("WavLM", lambda: {"input_values": _wave()["x"]}, quick=True, **_WAVE),
    "Wav2Vec2": other("Wav2Vec2", lambda: {"input_values": _wave()["x"]}, **_WAVE),
    "Whisper": other(
        "Whisper",
        lambda: {"input_features": _signal((2, 8, 40))["x"], "decoder_input_ids": _ids("i")["i"]},
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=16,
        vocab_size=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    ),
    "timm ViT": timm(
        "vit_tiny_patch16_224", 32, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4
    ),
    "timm EVA-02": timm(
        "eva02_tiny_patch14_224", 28, img_size=28, patch_size=14, embed_dim=32, depth=2, num_heads=4
    ),
    "timm BEiT": timm(
        "beit_base_patch16_224", 32, img_size=32, patch_size=16, embed_dim=32, depth=2, num_heads=4
    ),
    "timm SwinV2": timm(
        "swinv2_tiny_window8_256",
        64,
        img_size=64,
        window_size=4,
        embed_dim=16,
        depths=(1, 1),
        num_heads=(2, 2),
    ),
    "timm ResNet": timm("resnet10t", 64),
    "timm EfficientNet": timm("efficientnet_b0", 64),
    "timm ConvNeXt": timm("convnext_atto", 64, depths=(1, 1, 1, 1), dims=(8, 16, 16, 16)),
    "timm MLP-Mixer": Entry(
        "timm",
        lambda: importlib.import_module("timm.models").MlpMixer(
            num_classes=5, img_size=32, patch_size=8, num_blocks=2, embed_dim=32
        ),
        _image,
    ),
    "torchvision Swin": torchvision(
        "SwinTransformer",
        patch_size=[4, 4],
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=[4, 4],
    ),
    "torchvision ResNet": Entry("torchvision", _resnet, lambda: _image(64)),
    "torchvision MobileNet": torchvision("mobilenet_v3_small"),
    "torchvision ViT": torchvision(
        "VisionTransformer",
        32,
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=4,
        hidden_dim=32,
        mlp_dim=48,
    ),
    # Diffusion
    "UNet": diffusers(
        "UNet2DConditionModel",
        lambda: {
            "sample": _image(8, 4)["x"],
            "timestep": torch.tensor(3),
            "encoder_hidden_states": _signal((2, 5, 16))["x"],
        },
        True,
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
    "VAE": diffusers(
        "AutoencoderKL",
        lambda: {"sample": _image(16)["x"]},
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ),
    "DiT": diffusers(
        "DiTTransformer2DModel",
        lambda: {
            "hidden_states": _image(8, 4)["x"],
            "timestep": torch.tensor([3, 5]),
            "class_labels": torch.tensor([1, 2]),
        },
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    ),
    "SD3": diffusers(
        "SD3Transformer2DModel",
        lambda: {
            "hidden_states": _image(8, 4)["x"],
            "timestep": torch.tensor([3.0, 5.0]),
            "encoder_hidden_states": _signal((2, 5, 16))["x"],
            "pooled_projections": _signal((2, 12))["x"],
        },
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=12,
    ),
}
