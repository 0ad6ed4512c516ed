"""What one layer's forward costs at one token without gradients, as in decoding, beside PEFT.

All layers of one width have the same base, and take turns in a random order; a figure is the median
of the rounds, in microseconds above the layer without any adapter.

Run: ``python benchmarks/bench_decode.py [--device cuda]``.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import warnings
from pathlib import Path
from typing import Any

import measuring
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

# What ours may cost over PEFT's, where that is promised.
TARGETS = {"LoRA": 1.0, "LoKr": 0.7, "LoHa": None, "GLoRA": 1.0, "LoRTA 3-D aligned": None}


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
def measure(width: int, device: str, rounds: int) -> list[dict[str, Any]]:
    """Return a row for every method: median microseconds above the base, ours over PEFT's."""
    made = models(width, device)
    x = torch.randn(1, width, device=device)
    calls = {name: (lambda model=model: model(x)) for name, model in made.items()}
    seconds = measuring.in_turns(calls, rounds)
    median = {name: statistics.median(own[rounds // 10 :]) for name, own in seconds.items()}
    above = {name: 1e6 * (own - median["base"]) for name, own in median.items()}
    rows = []
    for name, target in TARGETS.items():
        row: dict[str, Any] = {"method": name, "width": width, "base_us": 1e6 * median["base"]}
        row |= {"us": above[f"ours: {name}"], "peft_us": above.get(f"PEFT: {name}")}
        if row["peft_us"] is not None:
            row["over_peft"] = row["us"] / row["peft_us"]
        if target is not None:
            row |= {"target": target, "met": row["over_peft"] <= target}
        rows.append(row)
    return rows


def main() -> None:
    """Print microseconds above the base, and ours over PEFT's."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="folder for CSV and JSON")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    rows = []
    for width in options.width:
        found = measure(width, options.device, options.rounds)
        print(
            f"width {width}, one token, no gradients: base {found[0]['base_us']:.0f} us; above it"
        )
        for row in found:
            peft = row["peft_us"]
            beside = "" if peft is None else f"  PEFT {peft:5.0f} us  {row['over_peft']:.2f} of it"
            print(f"{row['method']:18} {row['us']:5.0f} us{beside}")
        rows += found
    if options.output:
        about = {"rounds": options.rounds} | measuring.facts(options.device)
        measuring.write(options.output, "decode", rows, about)


if __name__ == "__main__":
    main()
