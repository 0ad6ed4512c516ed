"""What adapters cost as models grow, and when one adapter takes another's place.

* ``plan``: planning and describing an adapter for all linear layers of Llama 3 with 8, 70 and
  405 billion parameters, from shapes alone: seconds, the interpreter's peak memory, and how
  large the adapter is.
* ``step``: a training step of Llamas with 10 million to a billion parameters on this machine,
  with a straight line through time and memory, and that line at 70 billion.
* ``swap``: one adapter file for another on a ViT-B; one batch whose rows use different adapters
  beside one batch an adapter. Left out where the library does not have them.

Run: ``python benchmarks/bench_scale.py [--parts plan step swap] [--quick]``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import measuring
import plots
import scale_plan
import scale_step
import scale_swap
import torch

PARTS = ("plan", "step", "swap")


def main() -> None:
    """Measure the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="small models and few rounds")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, help="folder for CSV, JSON and plots")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.worker:
        print(json.dumps(scale_step.memory_here(*options.worker, options.device)))
        return
    about = measuring.facts(options.device)
    for part in options.parts:
        if part == "plan":
            rows = scale_plan.measure()
            scale_plan.show(rows)
        elif part == "step":
            rows = scale_step.measure(options.device, quick=options.quick, threads=options.threads)
            fits = scale_step.fits(rows)
            scale_step.show(rows, fits)
            about = about | {"fits": fits, "assumptions": scale_step.ASSUMPTIONS}
        else:
            rows = scale_swap.measure(
                options.device, tiny=options.quick, rounds=5 if options.quick else 25
            )
            scale_swap.show(rows)
        if options.output:
            measuring.write(options.output, f"scale-{part}", rows, about)
            if part == "step":
                for kind in ("svg", "png"):
                    plots.scaling(rows, options.output / f"scale-step.{kind}")


if __name__ == "__main__":
    main()
