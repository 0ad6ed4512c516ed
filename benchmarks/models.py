"""The models of the benchmarks, each with its targets, a batch and a loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

QUERY_VALUE = ["q_proj", "v_proj"]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Setting:
    """A model, the layers of it that are adapted, and what one step reads."""

    name: str
    title: str
    targets: list[str]
    make: Callable[[bool], nn.Module]  # whether tiny
    batch: Callable[[bool, nn.Module], dict[str, Tensor]]
    entry: str  # the module whose output must get a gradient, so that all layers pass one on

    def model(self, *, tiny: bool, device: str, dtype: torch.dtype) -> nn.Module:
        """Return the frozen model."""
        torch.manual_seed(0)
        model = self.make(tiny).to(device=device, dtype=dtype)
        return model.train().requires_grad_(False)

    def inputs(self, model: nn.Module, *, tiny: bool) -> dict[str, Tensor]:
        """Return one batch, on the model's device and in its dtype."""
        torch.manual_seed(1)
        like = next(model.parameters())
        return {
            name: value.to(like.device, like.dtype if value.is_floating_point() else None)
            for name, value in self.batch(tiny, model).items()
        }

    def matches(self, name: str) -> bool:
        """Whether the layer of this dotted name is adapted."""
        return name.rpartition(".")[2] in self.targets

    def weights(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the weights that are adapted."""
        return {
            name: tuple(module.weight.shape)
            for name, module in model.named_modules()
            if self.matches(name) and isinstance(module, nn.Linear)
        }


def shared_copy(model: nn.Module, entry: str) -> nn.Module:
    """Return a copy of the modules that shares every weight, and whose input gets a gradient."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in model.parameters()}
    memo.update({id(tensor): tensor for tensor in model.buffers()})
    made = copy.deepcopy(model, memo)
    made.get_submodule(entry).register_forward_hook(_Start(next(model.parameters())))
    return made


class _Start:
    """Adds a zero that wants a gradient; torch.compile takes no `requires_grad_` on the way."""

    def __init__(self, like: Tensor) -> None:
        self.zero = torch.zeros((), dtype=like.dtype, device=like.device, requires_grad=True)

    def __call__(self, module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        return output + self.zero


def loss_of(output: Any) -> Tensor:
    """Return a number that depends on all of the output; its value does not matter."""
    found = output.logits if "logits" in output else output.last_hidden_state
    return found.float().square().mean()


def _vit(tiny: bool) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    small = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32}
    return ViTModel(ViTConfig(**(small if tiny else {})), add_pooling_layer=False)


def _images(tiny: bool, model: Any) -> dict[str, Tensor]:
    side = model.config.image_size
    return {"pixel_values": torch.randn(4, 3, side, side)}


def llama(width: int, layers: int, hidden: int, heads: int, vocabulary: int) -> nn.Module:
    """Return a Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            intermediate_size=hidden,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            vocab_size=vocabulary,
            use_cache=False,
        )
    )


def _llama(tiny: bool) -> nn.Module:
    return llama(64, 2, 176, 4, 128) if tiny else llama(1024, 12, 2816, 16, 1024)


def _smollm(tiny: bool) -> nn.Module:
    from smollm import smollm

    return llama(64, 2, 176, 4, 128) if tiny else smollm()


def tokens(rows: int, columns: int) -> Callable[[bool, nn.Module], dict[str, Tensor]]:
    def batch(tiny: bool, model: Any) -> dict[str, Tensor]:
        return {"input_ids": torch.randint(model.config.vocab_size, (rows, columns))}

    return batch


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(
            "vit",
            "ViT-B/16, query and value, 4 images",
            QUERY_VALUE,
            _vit,
            _images,
            "embeddings",
        ),
        Setting(
            "llama",
            "Llama of 12 layers of width 1024, all linear layers, 64 tokens",
            PROJECTIONS,
            _llama,
            tokens(1, 64),
            "model.embed_tokens",
        ),
        Setting(
            "smollm-1x128",
            "SmolLM2-135M, all linear layers, 128 tokens",
            PROJECTIONS,
            _smollm,
            tokens(1, 128),
            "model.embed_tokens",
        ),
        Setting(
            "smollm-8x128",
            "SmolLM2-135M, all linear layers, 8 x 128 tokens",
            PROJECTIONS,
            _smollm,
            tokens(8, 128),
            "model.embed_tokens",
        ),
    )
}
