"""What merging an adapter into the weights costs, and writing and reading its file.

``merge`` is `Adapter.merge` and ``unmerge`` its inverse; PEFT's are `merge_adapter` and
`unmerge_adapter`, LyCORIS' `onfly_merge` and `onfly_restore`. Ours is compared with a copy of
the weights and with forming the updates one at a time, and every file with its bare bytes. The
rows take turns in a random order each round; a ratio is that of one round's times, the table has
medians. Each row's output merged is compared with its output adapted, and after the last round
its weights with those before the first.

Run: ``python benchmarks/bench_merge.py [--setting vit]``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring
import torch
from measuring import Spread, seconds
from models import SETTINGS, Setting, shared_copy
from step_rows import ROWS, Adapted, Row
from steps import Run, adapted
from torch import Tensor, nn

METHODS = (
    "LoRA r8",
    "LoKr r8",
    "LoHa r8",
    "FourierFT n1000",
    "LoRTA 3-D aligned r8",
    "2-D balanced r8",
)
LIBRARIES = ("ours", "PEFT", "LyCORIS")
TARGET = 3.0  # merging less forming the updates, over a copy of the weights
PARTS = ("merge", "unmerge", "copy", "form", "save", "load", "write", "read")


@dataclass(frozen=True)
class Case:
    """One row's model with what is timed of it."""

    row: Row
    made: Adapted
    weights: dict[str, nn.Parameter]
    merge: Callable[[], Any]
    unmerge: Callable[[], Any]
    save: Callable[[Path], Any]  # into a folder
    load: Callable[[nn.Module, Path], Any]


def case(row: Row, base: nn.Module, setting: Setting) -> Case:
    """Adapt a model with weights of its own, since merging writes them."""
    model = copy.deepcopy(base)
    layers = dict(model.named_modules())
    weights = {name: layers[name].weight for name in setting.weights(model)}
    made = adapted(row, model, setting)
    return Case(row, made, weights, *_WAYS[row.library](made.keep))


def _ours(keep: Any) -> tuple[Callable[..., Any], ...]:
    import superlora.torch as slt

    def save(folder: Path) -> None:
        keep.save(folder / "adapter.safetensors")

    def load(model: nn.Module, folder: Path) -> None:
        slt.load(model, folder / "adapter.safetensors")

    return keep.merge, keep.unmerge, save, load


def _peft(keep: Any) -> tuple[Callable[..., Any], ...]:
    import peft

    return (
        keep.merge_adapter,
        keep.unmerge_adapter,
        keep.save_pretrained,
        peft.PeftModel.from_pretrained,
    )


def _lycoris(keep: Any) -> tuple[Callable[..., Any], ...]:
    from lycoris import create_lycoris_from_weights

    def merge() -> None:
        keep.restore()
        keep.onfly_merge()

    def unmerge() -> None:
        keep.onfly_restore()
        for layer in keep.loras:
            layer.apply_to()

    def save(folder: Path) -> None:
        keep.save_weights(str(folder / "lycoris.safetensors"), None, {})

    def load(model: nn.Module, folder: Path) -> None:
        network, _ = create_lycoris_from_weights(1.0, str(folder / "lycoris.safetensors"), model)
        network.apply_to()

    return merge, unmerge, save, load


_WAYS = {"ours": _ours, "PEFT": _peft, "LyCORIS": _lycoris}


def once(one: Case, base: nn.Module, setting: Setting) -> dict[str, float]:
    """Return the seconds of every part, each taken once."""
    found = {"merge": seconds(one.merge), "unmerge": seconds(one.unmerge)}
    found["copy"] = seconds(lambda: [weight.clone() for weight in one.weights.values()])
    if one.row.library == "ours":
        found["form"] = seconds(lambda: _form(one))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        found["save"] = seconds(lambda: one.save(folder))
        bare = shared_copy(base, setting.entry)
        found["load"] = seconds(lambda: one.load(bare, folder))
        files = [path for path in folder.rglob("*") if path.is_file()]
        found["bytes"] = sum(path.stat().st_size for path in files)
        contents = [path.read_bytes() for path in files]
        again = [path.with_name(f"{path.name}.again") for path in files]

        def write() -> None:
            for path, content in zip(again, contents, strict=True):
                path.write_bytes(content)

        found["write"] = seconds(write)
        found["read"] = seconds(lambda: [path.read_bytes() for path in again])
    return found


def _form(one: Case) -> None:
    for name in one.weights:
        one.made.keep.delta(name)


def error(one: Case, inputs: dict[str, Tensor]) -> float:
    """Return how far the merged model's output is from the adapted one's, of its largest."""
    with torch.no_grad():
        expected = one.made.model(**inputs)[0]
        one.merge()
        found = one.made.model(**inputs)[0]
        one.unmerge()
    return _relative(found, expected)


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def measure(setting: Setting, run: Run) -> list[dict[str, Any]]:
    """Return one flat result a row."""
    base = run.base().eval()
    inputs = setting.inputs(base, tiny=run.tiny)
    rows = [row for row in ROWS.values() if row.library in LIBRARIES and row.method in METHODS]
    cases = {row.key: case(row, base, setting) for row in rows}
    before = {name: layer.weight for name, layer in base.named_modules() if setting.matches(name)}
    errors = {key: error(one, inputs) for key, one in cases.items()}
    found: dict[str, list[dict[str, float]]] = {key: [] for key in cases}

    def call(key: str) -> Callable[[], None]:
        def record() -> None:
            with torch.no_grad(), contextlib.redirect_stdout(sys.stderr):
                found[key].append(once(cases[key], base, setting))

        return record

    measuring.in_turns({key: call(key) for key in cases}, run.rounds + 1)
    results = []
    for row in rows:
        rounds = found[row.key][1:]  # the first use is not counted
        result: dict[str, Any] = {
            "setting": setting.name,
            "library": row.library,
            "method": row.method,
            "rounds": run.rounds,
            "bytes": int(rounds[0]["bytes"]),
            "output_error": errors[row.key],
            "left_over": max(
                _relative(weight, before[name]) for name, weight in cases[row.key].weights.items()
            ),
        }
        for part in PARTS:
            if part in rounds[0]:
                result.update(Spread.of([each[part] for each in rounds]).fields(part))
        if row.library == "ours":
            over = [(each["merge"] - each["form"]) / each["copy"] for each in rounds]
            result.update(Spread.of(over).fields("merge_over"))
            result["target"], result["met"] = TARGET, result["merge_over"] <= TARGET
        results.append(result)
    return results


def show(results: list[dict[str, Any]]) -> None:
    """Print the results, one line a row, in milliseconds."""
    print(f"{'':8}{'':22}" + "".join(f"{part:>9}" for part in PARTS) + "   over left over")
    for row in results:
        times = "".join(f"{row[part] * 1e3:>9.2f}" if part in row else " " * 9 for part in PARTS)
        over = f"{row['merge_over']:>7.2f}" if "merge_over" in row else " " * 7
        print(
            f"{row['library']:8}{row['method']:22}{times}{over}{row['left_over']:>10.0e}"
            f" output {row['output_error']:.0e}, {row['bytes']:,} bytes"
        )


def main() -> None:
    """Measure one setting."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--setting", choices=SETTINGS, default="vit")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the script")
    parser.add_argument("--output", type=Path, help="folder for CSV and JSON")
    options = parser.parse_args()
    setting = SETTINGS[options.setting]
    run = Run(setting, options.device, rounds=options.rounds, tiny=options.tiny)
    results = measure(setting, run)
    print(f"{run.title}; milliseconds")
    show(results)
    if options.output:
        about = {"setting": run.title, "rounds": options.rounds}
        name = f"merge-{options.setting}"
        measuring.write(options.output, name, results, about | measuring.facts(options.device))


if __name__ == "__main__":
    main()
