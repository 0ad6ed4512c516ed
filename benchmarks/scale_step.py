"""A training step against the size of the model, and a straight line through it."""

from __future__ import annotations

import sys
from typing import Any

import measuring
import models
import numpy
import steps
from models import PROJECTIONS, Setting
from step_rows import ROWS
from steps import Run
from torch import nn

TOKENS = 64
VOCABULARY = 1024
# Width and layers: 10 million to a billion parameters.
SIZES = ((256, 12), (512, 8), (512, 16), (768, 16), (1024, 20), (1536, 18), (2048, 20))
METHODS = (
    "limit: frozen trunk",
    "ours: LoRA r8",
    "ours: LoRTA 3-D aligned r8",
    "ours: 2-D balanced r8",
)
LARGE = 70e9
ASSUMPTIONS = (
    "cost linear in the number of parameters, whatever width and depth make it",
    f"{TOKENS} tokens a step, float32",
    "the same processor, with memory for the weights themselves",
)


def setting(name: str) -> Setting:
    """Return a Llama by its name ``WIDTHxLAYERS``."""
    width, layers = map(int, name.split("x"))

    def make(tiny: bool) -> nn.Module:
        if tiny:
            return models.llama(64, 2, 176, 4, 128)
        hidden = width * 11 // 4
        return models.llama(width, layers, hidden, width // 64, VOCABULARY)

    return Setting(
        name,
        f"Llama of {layers} layers of width {width}",
        PROJECTIONS,
        make,
        models.tokens(1, TOKENS),
        "model.embed_tokens",
    )


def memory_here(name: str, key: str, device: str) -> dict[str, float]:
    """Return a row's peaks; for a process of its own."""
    return steps.peaks(ROWS[key], Run(setting(name), device))


def measure(device: str, *, quick: bool, threads: int | None) -> list[dict[str, Any]]:
    """Return a row for each size and method: time in turns, memory in fresh processes."""
    rows = []
    for width, layers in SIZES[: 3 if quick else None]:
        name = f"{width}x{layers}"
        run = Run(setting(name), device, rounds=3 if quick else 7)
        entries = sum(parameter.numel() for parameter in run.base().parameters())
        for found in steps.times([ROWS[key] for key in METHODS], run):
            if "failed" in found:
                continue
            key = f"{found['library']}: {found['method']}"
            print(f"memory of {key}, {name}", file=sys.stderr, flush=True)
            arguments = ["--worker", name, key, "--device", device]
            arguments += ["--threads", str(threads)] if threads else []
            peaks = measuring.in_fresh_process(arguments)
            rows.append({"model": entries, **found, **peaks})
    return rows


def fits(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return straight lines through time and memory of each method, and their value at 70B."""
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        sizes = numpy.array([row["model"] for row in own], dtype=float)
        for kind in ("seconds", "live_MB"):
            values = numpy.array([row[kind] for row in own])
            slope, intercept = numpy.polyfit(sizes, values, 1)
            residual = values - (slope * sizes + intercept)
            spread = values - values.mean()
            found.append(
                {
                    "method": method,
                    "measure": kind,
                    "slope": float(slope),
                    "intercept": float(intercept),
                    "r2": float(1 - (residual @ residual) / (spread @ spread)),
                    "at_70B": float(slope * LARGE + intercept),
                }
            )
    return found


def show(rows: list[dict[str, Any]], lines: list[dict[str, Any]]) -> None:
    """Print the rows, the lines and what they rest on."""
    for row in rows:
        print(
            f"{row['method']:26}{row['model'] / 1e6:>8.0f} M{row['seconds']:>9.3f} s"
            f"{row['live_MB']:>9.1f} MB live{row['resident_MB']:>9.1f} MB resident"
        )
    print(f"straight lines, and their value at {LARGE:.0e} parameters")
    for line in lines:
        print(
            f"{line['method']:26}{line['measure']:10}{line['slope'] * 1e9:>10.3f} a billion "
            f"+ {line['intercept']:.3f}, R2 {line['r2']:.3f}: {line['at_70B']:,.0f}"
        )
    print("assumed: " + "; ".join(ASSUMPTIONS))
