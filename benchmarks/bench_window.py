"""What a one-hot map that reads within windows costs in accuracy, beside one that reads anywhere.

A window's entries of the vector stay in a processor's cache, which is why `OneHot(window=…)` is
faster (`bench_maps.py`). The demo's task, model and settings: ViT-S/14 on digits, an adapter of
the query and value weights and a head, one group of order 2.

Run: ``python benchmarks/bench_window.py [--seeds 0 1 2]``.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path

from superlora import Spec, maps
from superlora.demo.data import Splits, read_digits, split
from superlora.demo.fetch import MNIST, VIT, fetch
from superlora.demo.methods import QUICK, Method, Settings
from superlora.demo.run import measure
from superlora.demo.vit import VisionTransformer, load_onnx

WINDOWS = (None, 4096, 256)


def accuracy(
    window: int | None, model: VisionTransformer, splits: Splits, settings: Settings
) -> tuple[int, float]:
    """Return the trained parameters and the test accuracy of one window."""
    fixed = maps.OneHot(window=window)
    spec = Spec(rank=8, order=2, groups=1, fold="balanced", ratio=0.1, map=fixed)
    method = Method("2-D + one-hot, one group", 8, spec, 2e-2)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(model, splits, settings, method, Path(folder))
    return found.parameters, found.test_accuracy


def main() -> None:
    """Print a row for each window."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "superlora")
    options = parser.parse_args()
    model = load_onnx(fetch(VIT, options.cache))
    digits = read_digits(fetch(MNIST, options.cache))
    found: dict[int | None, list[float]] = {window: [] for window in WINDOWS}
    for seed in options.seeds:
        settings = dataclasses.replace(QUICK, seed=seed)
        sizes = {name: getattr(settings, name) for name in ("train", "validation", "test")}
        splits = split(digits, **sizes, seed=seed)
        for window, own in found.items():
            parameters, share = accuracy(window, model, splits, settings)
            own.append(share)
            where = "anywhere" if window is None else f"window {window}"
            print(f"seed {seed}, {where}: {parameters:,} parameters, {share:.2%}", flush=True)
    for window, own in found.items():
        where = "anywhere" if window is None else f"window {window}"
        print(f"{where:14} mean {statistics.mean(own):.2%}, {min(own):.2%} to {max(own):.2%}")


if __name__ == "__main__":
    main()
