"""What ``import superlora`` costs beside ``import tensorly``: paired fresh processes.

Run: ``python benchmarks/bench_import.py [--pairs 15]``. Prints the median of the
ratios of pairs that ran one after the other, in alternating order.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time


def seconds(module: str) -> float:
    """Return the wall time that importing `module` takes inside a fresh interpreter."""
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    return float(output.stdout)


def main() -> None:
    """Time both imports in pairs and print ratio, medians and spread."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=15)
    options = parser.parse_args()
    seconds("superlora"), seconds("tensorly")  # fills the byte-code and file caches
    ratios, ours, theirs = [], [], []
    for pair in range(options.pairs):
        order = ("superlora", "tensorly") if pair % 2 else ("tensorly", "superlora")
        found = {module: seconds(module) for module in order}
        ours.append(found["superlora"])
        theirs.append(found["tensorly"])
        ratios.append(found["superlora"] / found["tensorly"])
        time.sleep(0.01)
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(
        f"superlora {statistics.median(ours):.3f} s, tensorly {statistics.median(theirs):.3f} s; "
        f"ratio {middle:.3f} (quartiles {low:.3f} to {high:.3f}, {options.pairs} pairs)"
    )


if __name__ == "__main__":
    main()
