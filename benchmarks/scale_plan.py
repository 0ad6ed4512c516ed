"""Planning adapters for large models from their shapes alone."""

from __future__ import annotations

import sys
import time
import tracemalloc
from collections.abc import Callable, Mapping
from typing import Any

from measuring import MEGABYTE
from step_rows import stacked

import superlora as sl

# Layers, width, width inside the MLP, and outputs of keys and values.
LLAMAS = {
    "8B": (32, 4096, 14336, 1024),
    "70B": (80, 8192, 28672, 1024),
    "405B": (126, 16384, 53248, 1024),
}
SECONDS, MEGABYTES = 1.0, 50.0  # targets
FLOAT32 = 4  # bytes


def shapes(model: str) -> dict[str, tuple[int, int]]:
    """Return the shapes of all linear layers of a model's blocks."""
    layers, width, hidden, keys = LLAMAS[model]
    linears = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (hidden, width),
        "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
    }
    return {
        f"model.layers.{layer}.{name}": shape
        for layer in range(layers)
        for name, shape in linears.items()
    }


Shapes = Mapping[str, tuple[int, int]]


def _just(spec: sl.Spec) -> Callable[[Shapes], sl.Spec]:
    return lambda found: spec


def _stacks(spec: sl.Spec) -> Callable[[Shapes], sl.Spec]:
    return lambda found: stacked(spec, found)


def _joint(fold: str, **fields: Any) -> Callable[[Shapes], sl.Spec]:
    return _just(sl.Spec(rank=8, groups=1, fold=fold, **fields))


SPECS: dict[str, Callable[[Shapes], sl.Spec]] = {
    "dense": _just(sl.dense()),
    "LoRA r8": _just(sl.lora(rank=8)),
    "LoKr r8": _just(sl.lokr(rank=8)),
    "KronA": _just(sl.krona()),
    "LoNKr K=3 r8": _just(sl.lonkr(rank=8)),
    "LoHa r8": _just(sl.loha(rank=8)),
    "LoTR r8": _stacks(sl.lotr(rank=8)),
    "FacT-TK r16": _stacks(sl.fact_tk(rank=16)),
    "VeRA r256": _just(sl.vera(rank=256)),
    "LoRA-XS r8": _just(sl.lora_xs(rank=8)),
    "TinyLoRA": _just(sl.tinylora()),
    "FourierFT n1000": _just(sl.fourierft(size=1000)),
    "Uni-LoRA r4": _just(sl.unilora(size=256, rank=4)),
    "NOLA r4": _just(sl.nola(size=64, rank=4)),
    "2-D aligned r8": _joint("aligned"),
    "LoRTA 3-D aligned r8": _just(sl.lorta(rank=8, fold="aligned")),
    "LoRTA 4-D aligned r8": _just(sl.lorta(rank=8, order=4, fold="aligned")),
    "2-D balanced r8": _joint("balanced"),
    "LoRTA 3-D balanced r8": _just(sl.lorta(rank=8)),
    "LoRTA 4-D balanced r8": _just(sl.lorta(rank=8, order=4)),
    "2-D + separable": _joint("aligned", ratio=0.1, map=sl.maps.Separable()),
    "2-D + one-hot": _joint("balanced", ratio=0.1, map=sl.maps.OneHot()),
    "2-D + fastfood, stacked": _joint(
        "balanced", ratio=0.1, map=sl.maps.Fastfood(blocks="stacked")
    ),
}


def _forget() -> None:
    """Empty the library's caches, so that a plan costs what the first one does."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "superlora":
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def plan(method: str, model: str) -> dict[str, Any]:
    """Plan one adapter twice, for its time and for its memory, which is slow to trace."""
    found = shapes(model)

    def make() -> sl.Plan:
        made = sl.Plan(SPECS[method](found), found)
        made.describe()
        return made

    _forget()
    start = time.perf_counter()
    made = make()
    seconds = time.perf_counter() - start
    _forget()
    tracemalloc.start()
    try:
        make()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return {
        "model": model,
        "method": method,
        "seconds": seconds,
        "peak_MB": peak / MEGABYTE,
        "target_seconds": SECONDS,
        "target_MB": MEGABYTES,
        "met": seconds <= SECONDS and peak / MEGABYTE <= MEGABYTES,
        "parameters": made.num_parameters,
        "dense": made.num_dense,
        "bytes": FLOAT32 * made.num_parameters,
    }


def measure() -> list[dict[str, Any]]:
    """Return a row for each method and model; those that have no such plan are left out."""
    rows = []
    for method in SPECS:
        for model in LLAMAS:
            try:
                rows.append(plan(method, model))
            except (ValueError, OverflowError) as error:
                rows.append({"model": model, "method": method, "failed": str(error)})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows."""
    for row in rows:
        if "failed" in row:
            print(f"{row['method']:26}{row['model']:6}{row['failed'][:100]}")
        else:
            print(
                f"{row['method']:26}{row['model']:6}{row['seconds']:>8.3f} s"
                f"{row['peak_MB']:>8.2f} MB {'met' if row['met'] else 'no':5}"
                f"{row['parameters']:>18,} parameters"
            )
