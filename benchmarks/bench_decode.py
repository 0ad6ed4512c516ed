"""What one layer's forward costs at one token without gradients, as in decoding, beside PEFT.

All layers of one width have the same base, and take turns in a random order; a figure is the median
of the rounds, in microseconds above the layer without any adapter.

Run: ``python benchmarks/bench_decode.py [--width 256] [--device cuda]``.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
import warnings

import peft
import torch
from torch import nn

import superlora as sl
import superlora.torch as slt

RANK = 8
METHODS = {
    "LoRA": (sl.lora(RANK, alpha=16), peft.LoraConfig(r=RANK, lora_alpha=16)),
    "LoKr": (sl.lokr(RANK), peft.LoKrConfig(r=RANK, alpha=RANK)),
    "LoHa": (sl.loha(RANK), peft.LoHaConfig(r=RANK, alpha=RANK)),
    "GLoRA": (sl.glora(RANK), peft.GloraConfig(r=RANK)),
    "LoRTA 3-D aligned": (sl.lorta(RANK, fold="aligned"), None),
}


def models(width: int, device: str) -> dict[str, nn.Module]:
    """Return the base, and what each library makes of it."""
    base = nn.Sequential(nn.Linear(width, width)).to(device).requires_grad_(False)
    found: dict[str, nn.Module] = {"base": base}
    for name, (spec, config) in METHODS.items():
        found[f"ours: {name}"] = copy.deepcopy(base)
        slt.attach(found[f"ours: {name}"], spec)
        if config is not None:
            config.target_modules = ["0"]
            found[f"PEFT: {name}"] = peft.get_peft_model(copy.deepcopy(base), config)
    return found


@torch.no_grad()
def measure(width: int, device: str, rounds: int) -> dict[str, float]:
    """Return the median seconds of every model's forward."""
    made = models(width, device)
    x = torch.randn(1, width, device=device)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    names = list(made)
    for _ in range(rounds):
        random.shuffle(names)
        for name in names:
            start = time.perf_counter()
            made[name](x)
            if x.is_cuda:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(own[rounds // 10 :]) for name, own in seconds.items()}


def main() -> None:
    """Print microseconds above the base, and ours over PEFT's."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    found = measure(options.width, options.device, options.rounds)
    base = found["base"]
    print(f"width {options.width}, one token, no gradients: base {base * 1e6:.0f} us; above it")
    for name in METHODS:
        ours = (found[f"ours: {name}"] - base) * 1e6
        theirs = found.get(f"PEFT: {name}")
        beside = "" if theirs is None else f"  PEFT {(theirs - base) * 1e6:5.0f} us"
        ratio = "" if theirs is None else f"  {ours / ((theirs - base) * 1e6):.2f} of it"
        print(f"{name:18} {ours:5.0f} us{beside}{ratio}")


if __name__ == "__main__":
    main()
