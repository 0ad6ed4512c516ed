"""What tests of files on a disk share: small models, saved as folders, and adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import superlora.torch as slt

SIZES = {"vocab_size": 40, "num_hidden_layers": 3}


def bert(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=2, num_labels=3, **SIZES
    )
    return transformers.BertForSequenceClassification(config)


def gpt2(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=16, n_head=2, n_layer=2, n_positions=8, vocab_size=40, **options
    )
    return transformers.GPT2LMHeadModel(config)


def llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        **SIZES,
        **options,
    )
    return transformers.LlamaForCausalLM(config)


def randomise(adapter: slt.Adapter, size: float = 0.1) -> slt.Adapter:
    """Give an adapter factors that stand for trained ones."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return adapter


def saved(model: nn.Module, folder: Path, size: str = "5GB") -> Path:
    model.save_pretrained(folder, max_shard_size=size)
    return folder


def tensors_in(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a file or of a folder of shards."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {name: own for file in files for name, own in load_file(file).items()}


def assert_same(one: Path, two: Path) -> None:
    """Assert that two checkpoints have the same tensors, bit for bit."""
    first, second = tensors_in(one), tensors_in(two)
    assert first.keys() == second.keys()
    for name, own in first.items():
        assert own.dtype == second[name].dtype, name
        assert torch.equal(own.view(torch.uint8), second[name].view(torch.uint8)), name


def places(folder: Path) -> dict[str, str]:
    """Return what the index of a folder says."""
    found: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())[
        "weight_map"
    ]
    return found
