"""What the fixed maps cost as a group grows, and FourierFT beside PEFT's.

Every map takes ``ratio`` times as many entries as it makes; ``apply`` and ``adjoint`` run on
torch tensors, float32, in turns with a copy of the result, medians. "kept" is what
stays in memory for the next call; nothing of it is in any file.

Run: ``python benchmarks/bench_maps.py [--largest 100000000] [--device cuda] [--csv FILE]``;
``docs/map_figures.py FILE`` draws it. The comparison with PEFT needs ``pip install peft``.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import seconds

from superlora import maps

MAPS: dict[str, maps.Map] = {
    "Shuffle": maps.Shuffle(),
    "OneHot": maps.OneHot(),
    "OneHot, window": maps.OneHot(window=4096),
    "OneHot, not kept": maps.OneHot(stored=False),
    "Fastfood single": maps.Fastfood(),
    "Fastfood stacked": maps.Fastfood(blocks="stacked"),
    "Fastfood single, signs": maps.Fastfood(values="sign"),
    "Gaussian": maps.Gaussian(),
    "Gaussian structured": maps.Gaussian(structured=True),
    "Fourier": maps.Fourier(),
    "Separable": maps.Separable(),
}
FREQUENCIES = 1000
WEIGHTS = ((768, 768), (1024, 1024), (4096, 1024), (4096, 4096))


def in_turns(calls: dict[str, Callable[[], Any]], budget: float) -> dict[str, list[float]]:
    """Time calls one after the other, again and again, for about `budget` seconds."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + budget
    while not all(map(len, found.values())) or (
        time.perf_counter() < end and len(next(iter(found.values()))) < 30
    ):
        for name, call in calls.items():
            found[name].append(seconds(call))
    return found


def sizes_of(name: str, fixed: maps.Map, size: int, ratio: float) -> tuple[maps.Map, int]:
    """Return a map ready for a size, and the entries before it."""
    if name == "Shuffle":
        return fixed, size
    if name == "Fourier":
        side = int(size**0.5)
        while size % side:
            side -= 1
        return maps.Fourier(shape=(side, size // side)), min(FREQUENCIES, size // 10)
    if isinstance(fixed, maps.Separable):
        after = int(size**0.5)
        before = int(after * ratio**0.5)
        return maps.Separable(before=(before,) * 2, after=(after, -(-size // after))), before**2
    return fixed, round(size * ratio)


def kept_bytes(fixed: maps.Map) -> int:
    """Return the bytes that a map has kept after its use."""
    found = [fixed, *getattr(fixed, "_of_modes", {}).values()]
    found += [part for part in (vars(fixed).get("_blocks"),) if isinstance(part, maps.Map)]
    return sum(
        value.nbytes for part in found for value in vars(part).get("_constants", {}).values()
    )


def measure(name: str, size: int, ratio: float, budget: float) -> dict[str, Any] | None:
    """Return one row, or None where the map refuses the size."""
    # A copy of its own, so that what it keeps is only this row's.
    fixed, before = sizes_of(name, dataclasses.replace(MAPS[name]), size, ratio)
    try:
        fixed.check(before, size)
    except ValueError:
        return None
    x, y = torch.randn(before), torch.randn(size)
    first = seconds(lambda: (fixed.apply(x, size), fixed.adjoint(y, before)))
    found = in_turns(
        {
            "apply": lambda: fixed.apply(x, size),
            "copy": lambda: y.clone(),
            "adjoint": lambda: fixed.adjoint(y, before),
        },
        budget,
    )
    times = {key: statistics.median(values) for key, values in found.items()}
    kept = kept_bytes(fixed)
    return {
        "map": name,
        "size": size,
        "before": before,
        "apply_ms": times["apply"] * 1e3,
        "adjoint_ms": times["adjoint"] * 1e3,
        "copy_ms": times["copy"] * 1e3,
        "first_ms": first * 1e3,
        "kept_mb": kept / 1e6,
    }


def compare_with_peft(budget: float) -> None:
    """Print how long FourierFT takes to form a weight's update here and in PEFT."""
    try:
        from peft import FourierFTConfig, get_peft_model
    except ImportError:
        print("PEFT is not installed: no comparison")
        return
    print(f"\nFourierFT, {FREQUENCIES} frequencies, forming one update, ms")
    print(f"{'weight':>14} {'ours':>9} {'PEFT':>9} {'ratio (quartiles)':>22}")
    for rows, columns in WEIGHTS:
        base = torch.nn.Sequential(torch.nn.Linear(columns, rows, bias=False))
        config = FourierFTConfig(target_modules=["0"], n_frequency=FREQUENCIES)
        layer = get_peft_model(base, config).base_model.model[0]
        x = torch.randn(FREQUENCIES)
        layer.fourierft_spectrum["default"].data.copy_(x)
        u, v = layer.indices["default"].tolist()
        chosen = tuple(i * columns + j for i, j in zip(u, v, strict=True))
        fixed = maps.Fourier(shape=(rows, columns), frequencies=chosen)
        size = rows * columns

        def ours(fixed: Any = fixed, x: Any = x, size: int = size) -> Any:
            return fixed.apply(x, size) * 150.0

        with torch.no_grad():
            theirs = layer.get_delta_weight("default")
            worst = (ours().reshape(rows, columns) - theirs).abs().max() / theirs.abs().max()
            assert worst < 1e-4, worst
            found = in_turns(
                {"ours": ours, "peft": lambda layer=layer: layer.get_delta_weight("default")},
                budget,
            )
        ratios = [a / b for a, b in zip(found["ours"], found["peft"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        own, other = (statistics.median(found[key]) * 1e3 for key in ("ours", "peft"))
        print(
            f"{f'{rows} x {columns}':>14} {own:9.2f} {other:9.2f} "
            f"{f'{middle:.2f} ({low:.2f}-{high:.2f})':>22}"
        )


def main() -> None:
    """Measure every map at every size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--largest", type=int, default=10**8)
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds a row")
    parser.add_argument("--maps", nargs="*", choices=list(MAPS), default=list(MAPS))
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_default_device(options.device)
    torch.manual_seed(0)
    header = ("map", "size", "before", "apply", "adjoint", "copy", "first", "kept MB", "x copy")
    print("ms a call; 'first' draws the constants too, once; 'x copy' is apply by copy")
    print(f"{header[0]:24}" + "".join(f"{title:>11}" for title in header[1:]))
    rows = []
    size = 10_000
    with torch.no_grad():
        while size <= options.largest:
            for name in options.maps:
                row = measure(name, size, options.ratio, options.budget)
                gc.collect()
                if row is None:
                    continue
                rows.append(row)
                print(
                    f"{name:24}{size:11,}{row['before']:11,}{row['apply_ms']:11.3f}"
                    f"{row['adjoint_ms']:11.3f}{row['copy_ms']:11.3f}{row['first_ms']:11.1f}"
                    f"{row['kept_mb']:11.1f}{row['apply_ms'] / row['copy_ms']:11.1f}",
                    flush=True,
                )
            size *= 10
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    compare_with_peft(options.budget)


if __name__ == "__main__":
    main()
