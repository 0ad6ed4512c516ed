"""What the benchmarks share: timing in turns, spread, memory, and facts of the machine."""

from __future__ import annotations

import csv
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

MEGABYTE = 1e6
# Blocks above this many bytes go back to the system once freed; glibc's own moving
# threshold leaves holes, so that resident memory says more of the allocator than of us.
RETURN_LARGE_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": "1000000"}


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the quartiles of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def fields(self, name: str) -> dict[str, float]:
        """Return the numbers as flat fields of a row."""
        return {name: self.median, f"{name}_low": self.low, f"{name}_high": self.high}


def ratios(over: Sequence[float], under: Sequence[float]) -> Spread:
    """Return the spread of the ratios round by round."""
    return Spread.of([a / b for a, b in zip(over, under, strict=True)])


def seconds(call: Callable[[], Any]) -> float:
    """Return the wall time of one call, of a GPU in use until all its work is done."""
    finish()
    start = time.perf_counter()
    call()
    finish()
    return time.perf_counter() - start


def finish() -> None:
    """Wait for the GPU, if one is in use."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def in_turns(
    calls: dict[str, Callable[[], Any]],
    rounds: int,
    *,
    between: Callable[[str], None] | None = None,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Time each call once a round, in a new order each round; `between` runs untimed before."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(seed)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            if between is not None:
                between(name)
            found[name].append(seconds(calls[name]))
    return found


def status(key: str) -> int:
    """Return a memory figure of this process from the kernel, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{key} is not in /proc/self/status")


def peak_of_resident(step: Callable[[], Any]) -> int:
    """Return by how many bytes a call raises the process's resident memory at most."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    step()
    return status("VmHWM") - before


def peak_of_live_tensors(step: Callable[[], Any], held: Iterable[Any]) -> int:
    """Return the peak bytes of the storages that `step` makes and that live at once.

    `held` are the tensors that exist before; a view of one of them is not counted.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Tracker(TorchDispatchMode):
        current = peak = 0

        def __init__(self) -> None:
            super().__init__()
            self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in held}

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            for leaf in torch.utils._pytree.tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self.add(leaf.untyped_storage())
            return result

        def add(self, storage: Any) -> None:
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.current += storage.nbytes()
                self.peak = max(self.peak, self.current)
                weakref.finalize(storage, self.drop, storage._cdata)

        def drop(self, key: int) -> None:
            self.current -= self.sizes.pop(key)

    with Tracker() as tracker:
        step()
    return tracker.peak


def peak_on_gpu(step: Callable[[], Any]) -> int:
    """Return by how many bytes a call raises what tensors hold on the GPU at most."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def in_fresh_process(arguments: Sequence[str]) -> dict[str, Any]:
    """Run this script with other arguments and return the JSON of its last line."""
    command = [sys.executable, sys.argv[0], *arguments]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **RETURN_LARGE_BLOCKS},
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def facts(device: str = "cpu") -> dict[str, Any]:
    """Return what the numbers depend on: machine and releases, nothing that names it."""
    import torch

    import superlora

    found: dict[str, Any] = {
        "superlora": superlora.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "system": platform.system(),
        "python": platform.python_version(),
    }
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
    for package in ("torch", "numpy", "transformers", "peft", "lycoris-lora"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write(folder: Path, name: str, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """Write rows as CSV, and as JSON beside what they depend on."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"about": about, "rows": rows}, indent=1)
    (folder / f"{name}.json").write_text(text + "\n", "utf-8")
    fields = list(dict.fromkeys(key for row in rows for key in row))
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=fields)
        writer.writeheader()
        writer.writerows(rows)
