"""What a batch costs whose rows use different LoRA adapters: one by one, by segments, the base.

A model of linear layers serves the batch in one process, and its variants take turns in a random
order: the base alone; ``slt.rows``, whose layers stack the factors of all adapters in use; the
same with every adapter's rows on their own, as where updates are no products of two matrices.
Figures are medians over the rounds, and ratios to the base are those of the rounds.

Run: ``python benchmarks/bench_rows.py [--device cuda]``.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring
import torch
from torch import nn

import superlora as sl
import superlora.torch as slt
from superlora.torch import site


def none_of(link: object) -> list[Any]:
    """Return that no update is to be stacked."""
    return []


def one_by_one(call: Callable[[], Any]) -> Callable[[], Any]:
    """Return a call in which no layer stacks factors."""

    def without() -> Any:
        before = site.low_rank_supports
        site.low_rank_supports = none_of  # no mock, whose calls cost
        try:
            return call()
        finally:
            site.low_rank_supports = before

    return without


def measure(
    rows: int, adapters: int, tokens: int, options: argparse.Namespace, training: bool
) -> dict[str, Any]:
    """Return microseconds a layer and ratios to the base of one batch."""
    width, layers, device = options.width, options.layers, options.device
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))).to(device)
    base = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))).to(device)
    base.load_state_dict(model.state_dict())
    base.requires_grad_(False)
    for index in range(adapters):
        slt.attach(model, sl.lora(options.rank, alpha=16), name=f"a{index}")
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
    x = torch.randn(rows, tokens, width, device=device, requires_grad=training)
    names = [f"a{index % adapters}" for index in range(rows)]

    def step(own: nn.Module) -> Any:
        if not training:
            with torch.no_grad():
                return own(x)
        y = own(x)
        y.sum().backward()
        return y

    with slt.rows(model, names):
        calls = {
            "base": lambda: step(base),
            "segments": lambda: step(model),
            "loop": one_by_one(lambda: step(model)),
        }
        torch.testing.assert_close(calls["segments"](), calls["loop"](), rtol=1e-3, atol=1e-3)
        seconds = measuring.in_turns(calls, options.rounds)
    row: dict[str, Any] = {"rows": rows, "adapters": adapters, "tokens": tokens}
    row["training"] = training
    for name in calls:
        row |= measuring.Spread.of([1e6 * own / layers for own in seconds[name]]).fields(name)
    for name in ("segments", "loop"):
        row |= measuring.ratios(seconds[name], seconds["base"]).fields(f"{name}_over_base")
    return row | measuring.ratios(seconds["loop"], seconds["segments"]).fields("loop_over_segments")


def main() -> None:
    """Print microseconds a layer, and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--training", action="store_true", help="forward and backward passes")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="folder for CSV and JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.layers} layers of width {options.width}, rank {options.rank}; us a layer")
    found = []
    grid = itertools.product(options.tokens, options.rows, options.adapters)
    for tokens, rows, adapters in grid:
        if adapters > rows:
            continue
        row = measure(rows, adapters, tokens, options, options.training)
        found.append(row)
        print(
            f"{rows:3} rows {adapters:3} adapters {tokens:3} tokens: base {row['base']:7.0f}  "
            f"segments {row['segments']:7.0f} ({row['segments_over_base']:5.2f})  "
            f"loop {row['loop']:7.0f} ({row['loop_over_base']:5.2f})  "
            f"loop / segments {row['loop_over_segments']:5.2f}",
            flush=True,
        )
    if options.output:
        about = {"rounds": options.rounds} | measuring.facts(options.device)
        measuring.write(options.output, "rows", found, about)


if __name__ == "__main__":
    main()
