"""What a training step costs beside a frozen trunk, here and in PEFT and LyCORIS.

Every row adapts the same model. A step clears the gradients, runs forward, takes a loss and
runs backward; there is no optimiser. "limit" is the frozen trunk: forward, and backward through
the activations only. The rows' models share the base's weights and take turns, one step each a
round in a random order; a ratio is that of two steps of one round, and the table has the median
of the rounds with quartiles. Parameters are written in place between two steps, untimed, so that
nothing made of them can be kept from one step to the next.

Memory is measured in a process for each row: the peak above what model and adapter hold before
the first step, so that what a map draws then is counted,

* ``live``: bytes of tensors alive at once;
* ``resident``: of the process, with glibc told to give freed blocks above 1 MB back.

On a GPU it is what torch's allocator had handed out at most.

Run: ``python benchmarks/bench_step.py [--setting llama] [--rows LoRA]``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import measuring
import plots
import steps
import torch
from models import SETTINGS
from step_rows import LIMIT, ROWS, Row
from steps import DTYPES, Run


def memory(rows: list[Row], results: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Add each row's peaks, measured in processes of their own."""
    same = ["--setting", options.setting, "--device", options.device, "--dtype", options.dtype]
    same += ["--tiny"] if options.tiny else []
    same += ["--threads", str(options.threads)] if options.threads else []
    by_key = {f"{result['library']}: {result['method']}": result for result in results}
    for row in rows:
        if "failed" not in by_key[row.key]:
            print(f"memory of {row.key}", file=sys.stderr, flush=True)
            try:
                found = measuring.in_fresh_process([*same, "--worker", row.key])
            except subprocess.CalledProcessError as error:  # its own message is printed by then
                print(f"no memory of {row.key}: status {error.returncode}", file=sys.stderr)
            else:
                by_key[row.key].update(found)
    if not options.tiny:
        steps.judge_memory(rows, results)


def _compiled(rows: list[Row], run: Run) -> list[dict[str, Any]]:
    """Time each row beside the limit alone: all models have the same code.

    What torch has compiled of it is looked through at each call, and its number is limited.
    """
    limit, *others = rows
    results: list[dict[str, Any]] = []
    for row in others:
        torch._dynamo.reset()
        pair = steps.times([limit, row], run)
        results += pair[1:] if results else pair
    return results


def show(results: list[dict[str, Any]]) -> None:
    """Print the results, one line a row."""
    print(
        f"{'':16}{'':26}{'parameters':>12}{'s':>9}{'x limit':>9}{'quartiles':>14}{'target':>8}"
        f"{'':5}{'live MB':>9}{'resident':>9}{'x':>7}{'':5}"
    )
    words = {True: "met", False: "no", None: ""}
    for row in results:
        if "failed" in row:
            print(f"{row['library']:16}{row['method']:26}{row['failed']}")
            continue
        over = [row.get(f"over_limit{end}", float("nan")) for end in ("", "_low", "_high")]
        print(
            f"{row['library']:16}{row['method']:26}{row['parameters']:>12,}{row['seconds']:>9.3f}"
            f"{over[0]:>9.3f}{f'{over[1]:.2f}-{over[2]:.2f}':>14}{row.get('target', ''):>8}"
            f"{words[row.get('met')]:>5}"
            f"{_number(row.get('live_MB', row.get('gpu_MB'))):>9}"
            f"{_number(row.get('resident_MB')):>9}{_number(row.get('memory_over'), 2):>7}"
            f"{words[row.get('memory_met')]:>5}"
        )


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--setting", choices=SETTINGS, default="llama")
    parser.add_argument(
        "--rows", default="", help="only rows with this, or one of a|b, in 'library: method'"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument(
        "--only-memory", action="store_true", help="add memory to the times that --output has"
    )
    parser.add_argument("--compile", action="store_true", help="ours and the limit, by inductor")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the script")
    parser.add_argument("--output", type=Path, help="folder for CSV, JSON and plots")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure one setting."""
    options = parse()
    setting = SETTINGS[options.setting]
    if options.threads:
        torch.set_num_threads(options.threads)
    run = Run(setting, options.device, options.dtype, options.rounds, options.compile, options.tiny)
    if options.worker:
        print(json.dumps(steps.peaks(ROWS[options.worker], run)))
        return
    # The limit is what the others are divided by, so it is always there.
    chosen = options.rows.lower().split("|")
    rows = [
        row
        for row in ROWS.values()
        if row.key == LIMIT or any(part in row.key.lower() for part in chosen)
    ]
    if options.compile:
        rows = [row for row in rows if row.library in steps.COMPILED]
    name = f"step-{options.setting}" + ("-compiled" if options.compile else "")
    if options.only_memory:
        results = json.loads((options.output / f"{name}.json").read_text("utf-8"))["rows"]
        keys = {f"{result['library']}: {result['method']}" for result in results}
        rows = [row for row in rows if row.key in keys]
    else:
        results = _compiled(rows, run) if options.compile else steps.times(rows, run)
    if not (options.no_memory or options.compile):
        memory(rows, results, options)
    print(run.title)
    show(results)
    if options.output:
        about = {"setting": run.title, "dtype": options.dtype, "rounds": options.rounds}
        measuring.write(options.output, name, results, about | measuring.facts(options.device))
        for kind in ("svg", "png"):
            plots.steps(results, run.title, options.output / f"{name}.{kind}")


if __name__ == "__main__":
    main()
