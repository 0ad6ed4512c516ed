"""Reading and adding at random places: the least that a one-hot map takes of a training step.

A one-hot map gathers every entry of an update from the vector before it, twice a step, and adds
its gradient there once. Printed are milliseconds for 2**20 entries, by the size of that vector:
torch's own gather and scattered sum, and a gather that Numba compiles for all threads.

Run: ``python benchmarks/bench_gather.py [--threads 2]``.
"""

from __future__ import annotations

import argparse
from typing import Any

import measuring
import numba
import torch

ENTRIES = 1 << 20
SIZES = (1 << 16, 1_400_000, 15_400_000)  # a cache's, and the tests' vectors at a ratio of .1
ROUNDS = 9


@numba.njit(parallel=True)  # type: ignore[untyped-decorator]
def gather(source: Any, places: Any, target: Any) -> None:
    """Read entries at some places, on all threads."""
    for index in numba.prange(places.shape[0]):
        target[index] = source[places[index]]


def measure(size: int) -> dict[str, float]:
    """Return the least milliseconds of each way."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(size, generator=generator)
    places = torch.randint(size, (ENTRIES,), generator=generator, dtype=torch.int32)
    target = torch.empty(ENTRIES)
    ways = {
        "gather": lambda: source.index_select(0, places),
        "compiled gather": lambda: gather(source.numpy(), places.numpy(), target.numpy()),
        "scattered sum": lambda: source.index_add_(0, places, target),
    }
    times = measuring.in_turns(ways, ROUNDS)
    return {way: 1e3 * min(found[1:]) for way, found in times.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    numba.set_num_threads(options.threads)
    for size in SIZES:
        found = measure(size)
        print(f"{size:>12,}" + "".join(f"  {way} {ms:6.2f}" for way, ms in found.items()))


if __name__ == "__main__":
    main()
