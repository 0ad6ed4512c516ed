"""A step of LoRA on convolutions and on stacked experts, beside PEFT's and the frozen base's.

Base, ours and PEFT's take turns in a random order. A figure is the median of the rounds' ratios of
ours to PEFT's, with its quartiles; times are medians in milliseconds.

Run: ``python benchmarks/bench_layers.py [--device cuda]``.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring
import peft
import torch
from torch import Tensor, nn

import superlora as sl
import superlora.torch as slt

RANK = 8
# Channels, window, layers, width of the images, images.
CONVOLUTIONS = ((64, 3, 4, 32, 4), (128, 3, 2, 16, 4), (128, 1, 4, 32, 4), (256, 3, 2, 8, 2))
# Experts, width, width between, sequences, tokens.
EXPERTS = ((8, 128, 256, 4, 32), (16, 256, 256, 4, 64), (8, 256, 512, 4, 256))


class Images(nn.Module):
    """Convolutions with an activation after each."""

    def __init__(self, channels: int, window: int, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv2d(channels, channels, window, padding=window // 2) for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the activations of the last."""
        for layer in self.layers:
            x = nn.functional.silu(layer(x))
        return x


def convolutions(
    channels: int, window: int, count: int, width: int, images: int, device: str
) -> dict[str, Callable[[], Tensor]]:
    """Return a call of each model, on inputs that take a gradient."""
    base = Images(channels, window, count).to(device)
    x = torch.randn(images, channels, width, width, device=device, requires_grad=True)
    names = [f"layers.{index}" for index in range(count)]
    config = peft.LoraConfig(r=RANK, target_modules=names)
    return _calls(base, names, config, lambda model: model(x))


def experts(
    count: int, width: int, between: int, sequences: int, tokens: int, device: str
) -> dict[str, Callable[[], Tensor]]:
    """Return a call of each model, on embeddings that take a gradient."""
    import transformers

    base = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=128,
            hidden_size=width,
            intermediate_size=between,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=count,
            num_experts_per_tok=2,
        )
    ).to(device)
    x = torch.randn(sequences, tokens, width, device=device, requires_grad=True)
    names = ["gate_up_proj", "down_proj"]
    config = peft.LoraConfig(
        r=RANK, target_modules=[], target_parameters=[f"mlp.experts.{name}" for name in names]
    )
    return _calls(base, names, config, lambda model: model(inputs_embeds=x).logits)


def _calls(
    base: nn.Module, names: list[str], config: Any, call: Callable[[nn.Module], Tensor]
) -> dict[str, Callable[[], Tensor]]:
    base.requires_grad_(False)
    ours = copy.deepcopy(base)
    slt.attach(ours, sl.lora(RANK), names)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    models = {"base": base, "ours": ours, "PEFT": theirs}
    return {name: lambda model=model: call(model) for name, model in models.items()}


def measure(
    calls: dict[str, Callable[[], Tensor]], rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Return milliseconds of each model and ours over PEFT's, training and without gradients."""

    def step(call: Callable[[], Tensor]) -> None:
        call().square().mean().backward()

    found: list[dict[str, float]] = []
    train = {name: lambda call=call: step(call) for name, call in calls.items()}
    for trained, own in ((True, train), (False, calls)):
        with torch.set_grad_enabled(trained):
            for call in own.values():
                call()
            seconds = measuring.in_turns(own, rounds)
        row = {f"{name}_ms": 1e3 * statistics.median(each) for name, each in seconds.items()}
        row |= measuring.ratios(seconds["ours"], seconds["PEFT"]).fields("over_peft")
        found.append(row)
    return found[0], found[1]


def main() -> None:
    """Print ours over PEFT's for every setting."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--tiny", action="store_true", help="the smallest of each alone")
    parser.add_argument("--output", type=Path, help="folder for CSV and JSON")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    settings = [("convolutions", convolutions, sizes) for sizes in CONVOLUTIONS]
    settings += [("experts", experts, sizes) for sizes in EXPERTS]
    rows = []
    for kind, make, sizes in settings[:: 4 if options.tiny else 1]:
        calls = make(*sizes, device=options.device)
        for mode, row in zip(
            ("training", "inference"), measure(calls, options.rounds), strict=True
        ):
            rows.append({"kind": kind, "sizes": " ".join(map(str, sizes)), "mode": mode} | row)
            print(
                f"{kind:12} {rows[-1]['sizes']:18} {mode:9} base {row['base_ms']:7.2f} ms  ours "
                f"{row['ours_ms']:7.2f}  PEFT {row['PEFT_ms']:7.2f}  ours over PEFT "
                f"{row['over_peft']:.2f} [{row['over_peft_low']:.2f}, {row['over_peft_high']:.2f}]"
            )
    if options.output:
        about = {"rounds": options.rounds} | measuring.facts(options.device)
        measuring.write(options.output, "layers", rows, about)


if __name__ == "__main__":
    main()
