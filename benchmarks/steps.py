"""Training steps of the rows: made, checked, timed in turns, and their memory measured."""

from __future__ import annotations

import contextlib
import gc
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import measuring
import torch
from measuring import MEGABYTE, Spread
from models import Setting, loss_of, shared_copy
from step_rows import GROUP, LIMIT, Adapted, Row

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
COMPILED = ("limit", "ours")
NOISE = 1e-3  # standard deviation of what is added to the initial factors


@dataclass(frozen=True)
class Run:
    """How the steps are run."""

    setting: Setting
    device: str = "cpu"
    dtype: str = "float32"
    rounds: int = 15
    compile: bool = False
    tiny: bool = False

    def base(self, *, tiny: bool | None = None) -> torch.nn.Module:
        """Return the frozen model."""
        tiny = self.tiny if tiny is None else tiny
        return self.setting.model(tiny=tiny, device=self.device, dtype=DTYPES[self.dtype])

    @property
    def title(self) -> str:
        """What is measured, in words."""
        return f"tiny stand-in for {self.setting.title}" if self.tiny else self.setting.title


def adapted(row: Row, model: torch.nn.Module, setting: Setting) -> Adapted:
    """Adapt a model, and move the factors off the zero where they start."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        made = row.adapt(model, setting)
    # Dense rows are the base's weights themselves, or as large.
    if row.method != "dense":
        with torch.no_grad():
            for parameter in made.parameters:
                parameter.add_(torch.randn_like(parameter), alpha=NOISE)
    return made


def ready(row: Row, base: torch.nn.Module, run: Run) -> Adapted:
    """Adapt a copy of the base that shares its weights."""
    made = adapted(row, shared_copy(base, run.setting.entry), run.setting)
    if run.compile and row.library in COMPILED:
        return Adapted(torch.compile(made.model, fullgraph=True), made.parameters, made)
    return made


def clear(made: Adapted) -> None:
    """Drop the gradients."""
    for parameter in made.parameters:
        parameter.grad = None


def step_of(made: Adapted, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Return one step: gradients cleared, forward, loss, backward."""

    def step() -> None:
        clear(made)
        loss_of(made.model(**inputs)).backward()

    return step


def check(row: Row, made: Adapted) -> None:
    """Raise unless the last step gave every parameter a finite gradient, and then drop it."""
    for parameter in made.parameters:
        if parameter.grad is None or not parameter.grad.isfinite().all():
            raise RuntimeError(f"{row.key}: a parameter has no finite gradient after a step")
    clear(made)


def times(rows: list[Row], run: Run) -> list[dict[str, Any]]:
    """Time all rows in turns; one flat result a row, those left out that do not run."""
    base = run.base()
    inputs = run.setting.inputs(base, tiny=run.tiny)
    made: dict[str, Adapted] = {}
    calls: dict[str, Callable[[], None]] = {}
    failed: dict[str, str] = {}
    for row in rows:
        print(f"first step of {row.key}", file=sys.stderr, flush=True)
        try:
            one = ready(row, base, run)
            step = step_of(one, inputs)
            step()
            check(row, one)
        except Exception as error:  # one row of many hours must not take the others along
            failed[row.key] = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
            print(f"{row.key} is left out: {failed[row.key]}", file=sys.stderr, flush=True)
            continue
        made[row.key], calls[row.key] = one, step

    def between(name: str) -> None:
        for one in made.values():
            clear(one)
        gc.collect(0)
        # As an optimiser would, so that nothing made of the parameters outlives a step.
        with torch.no_grad():
            for parameter in made[name].parameters:
                parameter.mul_(1.0)

    measuring.in_turns(calls, 1, between=between)  # first uses are not counted
    found = measuring.in_turns(calls, run.rounds, between=between)
    timed = [row for row in rows if row.key in made]
    results = [_timed(row, timed, made[row.key], found, run) for row in timed]
    return results + [
        {"setting": run.setting.name, "library": row.library, "method": row.method, "failed": why}
        for row in rows
        if (why := failed.get(row.key))
    ]


def _timed(
    row: Row, rows: list[Row], made: Adapted, found: dict[str, list[float]], run: Run
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "setting": run.setting.name,
        "library": row.library,
        "method": row.method,
        "compiled": run.compile and row.library in COMPILED,
        "parameters": sum(parameter.numel() for parameter in made.parameters),
        "rounds": run.rounds,
        **Spread.of(found[row.key]).fields("seconds"),
    }
    if LIMIT in found:
        result.update(measuring.ratios(found[row.key], found[LIMIT]).fields("over_limit"))
    goal = None if run.tiny else row.targets.get(run.setting.name)
    if goal is not None and "over_limit" in result:
        result["target"], result["met"] = goal, result["over_limit"] <= goal
    if row.library == "ours":
        for peer in rows:
            if peer.method == row.method and peer.library != row.library:
                spread = measuring.ratios(found[row.key], found[peer.key])
                result.update(spread.fields(f"over {peer.library}"))
    return result


def peaks(row: Row, run: Run) -> dict[str, float]:
    """Return the row's peaks, MB above what it holds before its first step.

    For a process of its own. Two steps are taken from a fresh start for each measure, so that
    what is made at first use and kept counts.
    """
    on_gpu = run.device.startswith("cuda")
    if not run.tiny:  # the tiny model's step loads what is loaded at first use
        small = run.base(tiny=True)
        step_of(ready(row, small, run), run.setting.inputs(small, tiny=True))()
    base = run.base()
    inputs = run.setting.inputs(base, tiny=run.tiny)
    found: dict[str, float] = {}
    for how in ("gpu",) if on_gpu else ("resident", "live"):
        made = ready(row, base, run)
        step = step_of(made, inputs)

        def steps(step: Callable[[], None] = step) -> None:
            step()
            step()

        if how == "gpu":
            peak = measuring.peak_on_gpu(steps)
        elif how == "resident":
            peak = measuring.peak_of_resident(steps)
        else:
            held = [*inputs.values(), *base.parameters(), *base.buffers(), *made.parameters]
            held += [*made.model.parameters(), *made.model.buffers()]
            peak = measuring.peak_of_live_tensors(steps, held)
        found[f"{how}_MB"] = peak / MEGABYTE
        del made, step, steps
        gc.collect()
    entries = sum(rows * columns for rows, columns in run.setting.weights(base).values())
    found["group_MB"] = entries * DTYPES[run.dtype].itemsize / MEGABYTE
    return found


def judge_memory(rows: list[Row], results: list[dict[str, Any]]) -> None:
    """Say of each row whether its peak meets its target."""
    by_key = {f"{result['library']}: {result['method']}": result for result in results}
    for row in rows:
        result = by_key[row.key]
        measure = "gpu_MB" if "gpu_MB" in result else "resident_MB"
        if row.memory is None or result["setting"] != "llama" or measure not in result:
            continue
        base, factor = row.memory
        under = result["group_MB"] if base == GROUP else by_key.get(base, {}).get(measure)
        if under:
            result["memory_over"], result["memory_target"] = result[measure] / under, factor
            result["memory_met"] = result["memory_over"] <= factor
