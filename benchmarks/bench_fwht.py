"""The Walsh–Hadamard transform beside its peers: float32, torch tensors on the CPU.

Per size, all columns are timed one after the other, in an order drawn anew every
round, and the median over the rounds is printed in microseconds. ``fht-cpu`` is called
as it offers: into a new array, which is what ``sl.fwht`` returns, and in place. The
ratios are those of single rounds, with their quartiles. The processor's caches hold
what the call before left.

* ``ours``: ``fwht`` with the kernels that numba compiles; ``plain``: without them;
* ``hadamard``: the package hadamard-transform, which divides by ``sqrt(n)``;
* ``dense``: the product with the matrix of ``scipy.linalg.hadamard``, for n to 2^12;
* ``copy``: what making a new tensor of that size costs.

The peers are optional: ``pip install fht-cpu hadamard-transform``.

Run: ``python benchmarks/bench_fwht.py [--threads 2] [--rounds 41] [--plot FILE]``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

SINGLE = [(1, 2**bits) for bits in range(10, 25)]
BATCHED = [(1024, 2**8), (1024, 2**12), (64, 2**14), (3, 2**20), (16, 2**18)]
COLUMNS = ("ours", "plain", "hadamard", "fht new", "fht in place", "dense", "copy")
MOST_DENSE = 2**12


def peer(name: str) -> Any:
    """Return an optional package or None."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Let `fwht` use plain operations only."""
    from superlora.maps import walsh_hadamard

    walsh_hadamard._failures.append(ImportError("not wanted"))
    try:
        yield
    finally:
        walsh_hadamard._failures.pop()


def plain(x: Any) -> Any:
    """Return the transform by plain operations."""
    from superlora.maps.walsh_hadamard import fwht

    with without_kernels():
        return fwht(x)


def candidates(rows: int, n: int, threads: int) -> dict[str, Callable[[], Any]]:
    """Return what is timed, by column; all read the same tensor, but the one in place."""
    import torch

    from superlora.maps.walsh_hadamard import fwht

    shape = (n,) if rows == 1 else (rows, n)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found: dict[str, Callable[[], Any]] = {
        "ours": lambda: fwht(x),
        "plain": lambda: plain(x),
        "copy": lambda: x.clone(),
    }
    hadamard_transform, fht_cpu = peer("hadamard_transform"), peer("fht_cpu")
    if hadamard_transform is not None:
        found["hadamard"] = lambda: hadamard_transform.hadamard_transform(x)
    if fht_cpu is not None:
        options = {"num_threads": threads}
        work = x.clone().numpy()
        found["fht new"] = lambda: torch.from_numpy(
            fht_cpu.fht(x.numpy(), inplace=False, **options)
        )
        found["fht in place"] = lambda: fht_cpu.fht(work, **options)
    if n <= MOST_DENSE:
        from scipy.linalg import hadamard

        matrix = torch.tensor(hadamard(n), dtype=torch.float32)
        found["dense"] = lambda: x @ matrix
    return found


def measure(rows: int, n: int, threads: int, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every round, by column."""
    import numpy

    calls = candidates(rows, n, threads)
    names = [name for name in COLUMNS if name in calls]
    result = calls["ours"]()
    for name in ("plain", "hadamard", "fht new", "dense"):
        if name in calls:
            other = calls[name]() * (math.sqrt(n) if name == "hadamard" else 1.0)
            if float((other - result).abs().max()) > 1e-4 * math.sqrt(n):
                raise RuntimeError(f"{name} gives another transform of {n} entries")
    del result, other
    seconds: dict[str, list[float]] = {name: [] for name in names}
    # A short call is timed many times over, a long one less often.
    repeats = max(1, min(100, 2**20 // (rows * n) // 4))
    rounds = max(9, rounds if rows * n <= 2**22 else rounds // 2)
    order = random.Random(0)
    with numpy.errstate(all="ignore"):
        for _ in range(rounds):
            for name in order.sample(names, len(names)):
                call = calls[name]
                start = time.perf_counter()
                for _ in range(repeats):
                    call()
                seconds[name].append((time.perf_counter() - start) / repeats)
    return seconds


def ratio(ours: list[float], theirs: list[float] | None) -> str:
    """Return the median of the ratios of rounds, and their quartiles."""
    if theirs is None:
        return "—"
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def report(threads: int, rounds: int) -> dict[tuple[int, int], dict[str, list[float]]]:
    """Print a line for each size and return all that was measured."""
    head = f"{'rows':>5} {'n':>5} " + " ".join(f"{name:>13}" for name in COLUMNS)
    print(f"{head}   {'ours / fht new':>20} {'ours / fht in place':>20}")
    everything = {}
    for rows, n in SINGLE + BATCHED:
        seconds = everything[rows, n] = measure(rows, n, threads, rounds)
        cells = [
            f"{1e6 * statistics.median(seconds[name]):13.1f}"
            if name in seconds
            else f"{'—' if name == 'dense' else 'not installed':>13}"
            for name in COLUMNS
        ]
        ratios = [ratio(seconds["ours"], seconds.get(name)) for name in COLUMNS[3:5]]
        size = f"{rows:>5} {f'2^{n.bit_length() - 1}':>5}"
        print(size, *cells, " ", *(f"{text:>20}" for text in ratios), flush=True)
    return everything


def plot(everything: dict[tuple[int, int], dict[str, list[float]]], file: str) -> None:
    """Draw the times of single vectors, on two logarithmic axes."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    for name in COLUMNS:
        points = [
            (n, 1e6 * statistics.median(everything[1, n][name]))
            for _, n in SINGLE
            if name in everything[1, n]
        ]
        if points:
            axes.loglog(*zip(*points, strict=True), marker=".", label=name, base=2)
    axes.set_yscale("log", base=10)
    axes.set(xlabel="entries of a float32 vector", ylabel="microseconds")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file)


def main() -> None:
    """Time all sizes, print the table, and draw it if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--plot", metavar="FILE")
    options = parser.parse_args()
    # OpenMP, which fht-cpu and torch use, reads this when it is loaded.
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    import numpy
    import torch

    from superlora.maps.walsh_hadamard import fwht

    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    fwht(numpy.ones(2**10, numpy.float32))
    print(
        f"{options.threads} threads; first call {time.perf_counter() - start:.2f} s (imports and "
        "compiles the kernels, or loads them from numba's cache); times in microseconds"
    )
    everything = report(options.threads, options.rounds)
    if options.plot:
        plot(everything, options.plot)


if __name__ == "__main__":
    main()
