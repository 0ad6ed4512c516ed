"""One adapter in another's place, and several in one batch."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import measuring
import torch
from measuring import Spread
from models import SETTINGS, shared_copy
from steps import NOISE, Run

import superlora as sl
import superlora.torch as slt

SPECS = {
    "LoRA r8": sl.lora(rank=8),
    "LoRTA 3-D aligned r8": sl.lorta(rank=8, fold="aligned"),
    "2-D balanced r8": sl.Spec(rank=8, groups=1, fold="balanced"),
}
SWAP_MS = 5.0  # target
ADAPTERS = 4


def measure(device: str, *, tiny: bool, rounds: int) -> list[dict[str, Any]]:
    """Return the rows that the library can run."""
    setting = SETTINGS["vit"]
    base = Run(setting, device, tiny=tiny).base().eval()
    inputs = setting.inputs(base, tiny=tiny)
    rows = []
    for method, spec in SPECS.items():
        model = shared_copy(base, setting.entry)
        adapter = slt.attach(model, spec, targets=setting.targets)
        with tempfile.TemporaryDirectory() as scratch:
            files = [Path(scratch) / f"{index}.safetensors" for index in range(2)]
            for file in files:
                _stir(adapter)
                adapter.save(file)
            rows += _swap(method, model, adapter, files, rounds)
        rows += _together(method, spec, base, inputs, rounds)
    return rows


def _stir(adapter: Any) -> None:
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=NOISE)


def _swap(
    method: str, model: Any, adapter: Any, files: list[Path], rounds: int
) -> list[dict[str, Any]]:
    found = []
    if hasattr(adapter, "swap"):
        turn = iter(range(10**9))
        times = [
            measuring.seconds(lambda: adapter.swap(files[next(turn) % 2]))
            for _ in range(rounds + 1)
        ]
        row = {"what": "swap", "method": method, **_milliseconds(times[1:])}
        row["target"], row["met"] = SWAP_MS, row["ms"] <= SWAP_MS
        found.append(row)
    times = []
    for index in range(rounds + 1):
        current = next(module for module in model.modules() if isinstance(module, slt.Adapter))
        times.append(measuring.seconds(lambda: _reload(current, model, files[index % 2])))  # noqa: B023
    return [*found, {"what": "detach and load", "method": method, **_milliseconds(times[1:])}]


def _reload(adapter: Any, model: Any, file: Path) -> None:
    adapter.detach()
    slt.load(model, file)


def _together(
    method: str, spec: sl.Spec, base: Any, inputs: dict[str, torch.Tensor], rounds: int
) -> list[dict[str, Any]]:
    """Time a batch whose rows use different adapters against a batch of one row for each."""
    if not hasattr(slt, "rows"):
        return []
    setting = SETTINGS["vit"]
    model = shared_copy(base, setting.entry)
    names = [f"adapter{index}" for index in range(ADAPTERS)]
    for name in names:
        _stir(slt.attach(model, spec, targets=setting.targets, name=name))
    single = {key: value[:1] for key, value in inputs.items()}

    def mixed() -> None:
        with torch.no_grad(), slt.rows(model, names):
            model(**inputs)

    def one_by_one() -> None:
        for name in names:
            with torch.no_grad(), slt.rows(model, [name]):
                model(**single)

    mixed()
    one_by_one()
    times = measuring.in_turns({"mixed": mixed, "single": one_by_one}, rounds)
    ratio = measuring.ratios(times["mixed"], times["single"])
    return [
        {"what": f"{ADAPTERS} adapters in one batch", "method": method}
        | _milliseconds(times["mixed"])
        | ratio.fields("over_one_by_one")
    ]


def _milliseconds(times: list[float]) -> dict[str, float]:
    return Spread.of([1e3 * each for each in times]).fields("ms")


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows."""
    for row in rows:
        over = f", {row['over_one_by_one']:.2f} x" if "over_one_by_one" in row else ""
        print(f"{row['what']:28}{row['method']:26}{row['ms']:>9.2f} ms{over}")
