"""Run every benchmark of steps, merging and scale, and rewrite the tables of the docs.

Run: ``python benchmarks/run_all.py`` for the docs' numbers, ``--quick`` to see that all runs
(tiny models, and the docs are left as they are), ``--tables-only`` to format what a folder holds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import report

HERE = Path(__file__).parent
# One of each way to apply an update: the compiler takes minutes for each.
COMPILED = "ours: LoRA r8|ours: LoKr|ours: FourierFT|3-D aligned|2-D balanced|2-D + separable"
STEPS = ("vit", "llama", "smollm-1x128", "smollm-8x128")


def commands(options: argparse.Namespace) -> list[list[str]]:
    """Return the scripts to run with their arguments."""
    small = ["--tiny", "--rounds", "3"] if options.quick else []
    rounds = [] if options.quick else ["--rounds", str(options.rounds)]
    found = [["bench_step.py", "--setting", name, *small, *rounds] for name in STEPS]
    if options.quick:
        # Memory takes a process a row, and the tiny models are the same for all Llamas.
        found = [[*command, "--no-memory"] for command in found]
        found.append(["bench_step.py", "--setting", "llama", "--rows", "ours: LoRA", *small])
    if options.compile:
        found += [[*command, "--compile", "--rows", COMPILED] for command in found[:2]]
    found += [["bench_merge.py", "--setting", name, *small] for name in STEPS[:2]]
    found.append(["bench_decode.py", *small[1:]])
    found.append(["bench_scale.py", *(["--quick"] if options.quick else [])])
    return found


def main() -> None:
    """Run all, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("benchmark-results"))
    parser.add_argument("--quick", action="store_true", help="tiny models; the docs stay")
    parser.add_argument("--compile", action="store_true", help="compiled steps as well")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="only commands with this in them")
    parser.add_argument("--tables-only", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.output /= "quick"  # where no table is made of it
    failed = []
    chosen = [] if options.tables_only else commands(options)
    for command in chosen:
        line = " ".join(command)
        if options.only not in line:
            continue
        print(f"== {line}", flush=True)
        start = time.perf_counter()
        script, *arguments = command
        run = [sys.executable, str(HERE / script), *arguments, "--output", str(options.output)]
        if subprocess.run(run, check=False).returncode:
            failed.append(line)
        print(f"== {time.perf_counter() - start:.0f} s", flush=True)
    if not options.quick:
        missing = report.rewrite(options.output)
        print(f"{report.PAGE.name} is written", end="")
        print(f"; no results of {', '.join(missing)}" if missing else "")
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
