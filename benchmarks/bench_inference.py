"""What a GLoRA adapter costs at inference: images per second, and FLOPs.

The demo's ViT-S/14 with query, key and value as one layer, four linear layers a block, as GLoRA's
authors adapt it. Rows: the base; GLoRA merged into it; the same GLoRA unmerged; LoRA unmerged.
All have their own copy of the model with random weights, since values do not matter to time.
The rows take turns in a random order each round; a ratio is that of one round's times, the table
has medians. FLOPs are those that torch's counter sees.

Run: ``python benchmarks/bench_inference.py [--batches 1 4 16]``; ``--docs`` puts the table into the
docs.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring
import torch
from measuring import Spread, ratios
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import superlora as sl
import superlora.torch as slt
from superlora.demo.supernet import TARGETS, fuse
from superlora.demo.vit import VisionTransformer

DOCS = Path(__file__).parent.parent / "docs"
sys.path.append(str(DOCS))
from tables import replaced  # noqa: E402  (lies beside the docs)

PAGE = DOCS / "performance" / "inference.md"
BASE, MERGED, UNMERGED, LORA = "base", "GLoRA merged", "GLoRA unmerged", "LoRA unmerged"
TINY = {"width": 32, "depth": 2, "heads": 2, "hidden": 64}


def models(rank: int, device: str = "cpu", *, tiny: bool = False) -> dict[str, nn.Module]:
    """Return the rows' models, all with the same base weights."""
    torch.manual_seed(0)
    base = fuse(VisionTransformer(**(TINY if tiny else {}))).to(device)
    found: dict[str, nn.Module] = {BASE: base}
    for name, design in (
        (MERGED, sl.glora(rank)),
        (UNMERGED, sl.glora(rank)),
        (LORA, sl.lora(rank)),
    ):
        model = copy.deepcopy(base)
        adapter = slt.attach(model, design, targets=list(TARGETS), seed=1)
        torch.manual_seed(1)  # the same adapter, merged and unmerged
        with torch.no_grad():
            for factor in adapter.parameters():
                factor.normal_(std=0.02)
        if name == MERGED:
            adapter.merge()
            adapter.detach(keep_merged=True)
        found[name] = model
    return found


def flops(model: nn.Module, images: Tensor) -> int:
    """Return the floating point operations of one forward pass."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(images)
    return counter.get_total_flops()


def measure(
    found: dict[str, nn.Module], batch: int, resolution: int, rounds: int, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Return a row for each model at one batch size."""
    images = torch.randn(batch, 3, resolution, resolution, device=device)

    def forward(model: nn.Module) -> Callable[[], Any]:
        return torch.no_grad()(functools.partial(model, images))

    calls = {name: forward(model) for name, model in found.items()}
    times = measuring.in_turns(calls, rounds + 1)
    times = {name: own[1:] for name, own in times.items()}  # the first use is not counted
    base = flops(found[BASE], images)
    rows = []
    for name, model in found.items():
        own = flops(model, images)
        rows.append(
            {
                "batch": batch,
                "model": name,
                **Spread.of([batch / each for each in times[name]]).fields("images_per_second"),
                **ratios(times[name], times[BASE]).fields("over_base"),
                "flops": own,
                "flops_over_base": own / base,
                "rounds": rounds,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table, a line a model."""
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    heads = [f"images/s at batch {batch}" for batch in batches]
    times = [f"time over the base's at {batch}" for batch in batches]
    lines = [
        f"| model | {' | '.join(heads)} | {' | '.join(times)} | FLOPs over the base's |",
        "|---|" + "--:|" * (2 * len(batches) + 1),
    ]
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        speeds = [f"{row['images_per_second']:.1f}" for row in own]
        over = [
            f"{row['over_base']:.2f} ({row['over_base_low']:.2f} to {row['over_base_high']:.2f})"
            for row in own
        ]
        share = " / ".join(dict.fromkeys(f"{row['flops_over_base']:.4f}" for row in own))
        lines.append(f"| {name} | {' | '.join(speeds)} | {' | '.join(over)} | {share} |")
    return "\n".join(lines)


def main() -> None:
    """Measure all batch sizes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, help="by default torch decides")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--docs", action="store_true", help="rewrite the table of the docs")
    parser.add_argument("--output", type=Path, help="folder for CSV and JSON")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    found = models(options.rank, options.device, tiny=options.tiny)
    rows = [
        row
        for batch in options.batches
        for row in measure(found, batch, options.resolution, options.rounds, options.device)
    ]
    print(table(rows))
    merged = {row["flops"] == base["flops"] for row, base in _beside(rows)}
    print("FLOPs of the merged model are the base's" if merged == {True} else "FLOPs differ")
    if options.docs:
        about = measuring.facts(options.device)
        made = (
            f"{table(rows)}\n\nAt {options.resolution} px with rank {options.rank}, medians of "
            f"{options.rounds} rounds, the ratios with their quartiles; "
            f"{about['threads']} threads, {about['processor']}, torch {about['torch']}."
        )
        PAGE.write_text(replaced(PAGE.read_text("utf-8"), "glora-inference", made), "utf-8")
    if options.output:
        about = {"resolution": options.resolution, "rank": options.rank} | measuring.facts(
            options.device
        )
        measuring.write(options.output, "inference", rows, about)


def _beside(rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    own = {(row["batch"], row["model"]): row for row in rows}
    return [(own[batch, MERGED], own[batch, BASE]) for batch in {row["batch"] for row in rows}]


if __name__ == "__main__":
    main()
