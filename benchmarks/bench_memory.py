"""Peak memory of a training step when all weights share one group.

A chain of frozen linear layers is adapted and trained for a few steps. Each row runs
in processes of its own and reports the peak above what model and factors hold:

* ``live``: bytes of tensors alive at once, whatever the allocator does with them (what
  ``torch.cuda.max_memory_allocated`` would say);
* ``resident``: resident memory of the process, with glibc told to give blocks above
  1 MB back to the system (``MALLOC_MMAP_THRESHOLD_=1000000``);
* ``default``: resident memory with glibc's own moving threshold, under which
  freed weights can leave holes that are not used again.

"whole group" is the equation as it is usually typed in: every update formed at once
and kept for the backward pass.

Run: ``python benchmarks/bench_memory.py [--layers 48] [--width 960] [--tokens 64]``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import measuring
from measuring import MEGABYTE, RETURN_LARGE_BLOCKS

from superlora.design.cost_rule import application

MEASURES = ("live", "resident", "default")


def specs() -> dict[str, Any]:
    """Return the rows by name; None is the frozen base with gradients to its input."""
    import superlora as sl

    projected = sl.Spec(rank=8, groups=1, fold="balanced", ratio=0.1, map=sl.maps.OneHot())
    return {
        "frozen base": None,
        "LoRA r8": sl.lora(rank=8),
        "one group, 2-D balanced r8": sl.Spec(rank=8, groups=1, fold="balanced"),
        "one group, LoRTA 3-D balanced r8": sl.lorta(rank=8),
        "one group, LoRTA 4-D balanced r8": sl.lorta(rank=8, order=4),
        "one group, LoRTA 3-D aligned r8": sl.lorta(rank=8, fold="aligned"),
        "2-D + fastfood, single": projected.replace(map=sl.maps.Fastfood()),
        "2-D + fastfood, stacked": projected.replace(map=sl.maps.Fastfood(blocks="stacked")),
        "2-D + one-hot": projected,
        "2-D + separable": projected.replace(map=sl.maps.Separable()),
        "whole group, 2-D balanced r8": sl.Spec(rank=8, groups=1, fold="balanced"),
        "whole group, LoRTA 3-D balanced r8": sl.lorta(rank=8),
    }


def measure(row: str, how: str, layers: int, width: int, tokens: int) -> dict[str, Any]:
    """Run one row in this process and return its figures."""
    import torch

    torch.set_num_threads(1)
    _training(row, 2, 96, tokens)[0]()  # loads what torch loads at first use
    step, held, adapter = _training(row, layers, width, tokens)
    peak = measuring.peak_of_resident(lambda: (step(), step()))
    if how == "live":
        peak = measuring.peak_of_live_tensors(step, held)
    way = "" if adapter is None else str(application(adapter.plan.layout, "0"))
    return {
        "row": row,
        "parameters": 0 if adapter is None else adapter.num_parameters,
        "path": way,
        "weight_MB": 4 * width * width / MEGABYTE,
        how: peak / MEGABYTE,
    }


def _training(row: str, layers: int, width: int, tokens: int) -> tuple[Any, list[Any], Any]:
    """Return a training step, the tensors it starts from, and the adapter."""
    import torch

    import superlora.torch as slt

    torch.manual_seed(0)
    spec = specs()[row]
    chain = torch.nn.ModuleList(
        torch.nn.Linear(width, width, bias=False) for _ in range(layers)
    ).requires_grad_(False)
    x = torch.randn(tokens, width, requires_grad=True)
    adapter = None if spec is None else slt.attach(chain, spec, "all-linear")
    parameters = [x] if adapter is None else list(adapter.parameters())
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)
    whole = row.startswith("whole")

    def step() -> None:
        optimizer.zero_grad()
        y = x
        deltas = adapter.plan.deltas(adapter.factors()) if whole else {}
        for index, layer in enumerate(chain):
            if whole:
                y = y + torch.tanh(y @ (layer.weight + deltas[str(index)]).t())
            else:
                y = y + torch.tanh(layer(y))
        y.square().mean().backward()
        optimizer.step()

    return step, [x, *chain.parameters(), *parameters], adapter


def run(row: str, how: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one row in a fresh process."""
    command = [sys.executable, __file__, "--row", row, "--how", how]
    for name in ("layers", "width", "tokens"):
        command += [f"--{name}", str(getattr(options, name))]
    environment = dict(os.environ)
    if how == "resident":
        environment.update(RETURN_LARGE_BLOCKS)
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def collect(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every row several times, interleaved, and return medians in megabytes."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in specs()}
    for _ in range(options.repeats):
        for name, runs in found.items():
            runs.append(
                {key: value for how in MEASURES for key, value in run(name, how, options).items()}
            )
    rows = []
    for runs in found.values():
        row = dict(runs[0])
        for how in MEASURES:
            row[how] = round(statistics.median(each[how] for each in runs), 1)
        rows.append(row)
    for row in rows:
        above = row["live"] - rows[0]["live"]
        row["live_above_frozen_in_weights"] = round(above / row["weight_MB"], 2)
    return rows


def main() -> None:
    """Print the table and write it as CSV and JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--width", type=int, default=960)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="folder for memory.csv and memory.json")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--how", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        sizes = (options.layers, options.width, options.tokens)
        print(json.dumps(measure(options.row, options.how, *sizes)))
        return
    rows = collect(options)
    weight = rows[0]["weight_MB"]
    print(
        f"{options.layers} layers of {options.width} x {options.width}, {options.tokens} tokens: "
        f"one weight {weight:.1f} MB, the group {weight * options.layers:.0f} MB; peaks in MB, "
        f"medians of {options.repeats} processes"
    )
    print(
        f"{'':36}{'parameters':>11} {'path':8}{'live':>7}{'resident':>10}{'default':>9}"
        f"{'live above frozen, weights':>28}"
    )
    for row in rows:
        print(
            f"{row['row']:36}{row['parameters']:>11,} {row['path']:8}{row['live']:>7}"
            f"{row['resident']:>10}{row['default']:>9}{row['live_above_frozen_in_weights']:>28}"
        )
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "memory.json").write_text(json.dumps(rows, indent=1))
        with (options.output / "memory.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
