"""What a LoRA of PEFT loses when other structures take a quarter of its bytes, and when resized.

python benchmarks/convert_minilm.py --output runs/convert [--tiny]

PEFT trains a LoRA of rank 16 of MiniLM on Reuters news. Its updates are fitted by other designs of
a quarter of the parameters, and of half and an eighth by LoRAs: with one rank for all layers, with
ranks chosen for all layers together, and by the rule of sd-scripts' resize script (``sv_fro``:
each layer keeps the same share of its Frobenius norm).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from extract_minilm import Rows, applied, relative, trained_steps
from minilm import Task, accuracy, task
from torch import Tensor

import superlora as sl
import superlora.torch as slt

TARGETS = ("query", "value")
FAMILIES = ("lora", "lokr", "lotr", "metatt", "lorta", "one matrix")


def peft_adapter(work: Task, folder: Path, *, epochs: int) -> None:
    """Train a LoRA and the head by PEFT alone, and save them."""
    import peft

    config = peft.LoraConfig(
        r=16, lora_alpha=32, target_modules=list(TARGETS), modules_to_save=["classifier"]
    )
    model = peft.get_peft_model(work.model, config)
    head = [own for name, own in model.named_parameters() if own.requires_grad and "class" in name]
    rest = [own for own in model.parameters() if own.requires_grad]
    rest = [own for own in rest if all(own is not each for each in head)]
    groups = [{"params": rest, "lr": 1e-3}, {"params": head, "lr": 1e-3}]
    work.model = model
    trained_steps(work, groups, epochs=epochs)
    model.save_pretrained(folder)
    work.model = model.unload()


def resized_by_norm(deltas: Mapping[str, Tensor], share: float) -> dict[str, int]:
    """Return the ranks of sd-scripts' rule: each layer's least of a share of its norm."""
    ranks = {}
    for name, delta in deltas.items():
        energies = torch.linalg.svdvals(delta.double()).square().cumsum(0)
        ranks[name] = int((energies < share**2 * energies[-1]).sum()) + 1
    return ranks


def share_of(
    deltas: Mapping[str, Tensor], count: Callable[[dict[str, int]], int], budget: int
) -> dict[str, int]:
    """Return that rule's ranks of the largest share that a budget allows."""
    low, high = 0.0, 1.0
    for _ in range(30):
        share = (low + high) / 2
        if count(resized_by_norm(deltas, share)) <= budget:
            low = share
        else:
            high = share
    return resized_by_norm(deltas, low)


def truncated(delta: Tensor, rank: int) -> Tensor:
    """Return the nearest matrix of a rank."""
    left, numbers, right = torch.linalg.svd(delta, full_matrices=False)
    return (left[:, :rank] * numbers[:rank]) @ right[:rank]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="a model and data made on the spot")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    rows = Rows(options.output / "rows.json")
    folder = options.output / "peft"
    if not folder.exists():
        peft_adapter(task(tiny=options.tiny), folder, epochs=1 if options.tiny else 3)

    work = task(tiny=options.tiny)
    adapter = slt.from_peft(work.model, folder)
    deltas = {name: own.detach().clone() for name, own in adapter.deltas().items()}
    shapes = {name: tuple(own.shape) for name, own in deltas.items()}
    whole = adapter.plan.num_parameters
    rows.add("PEFT LoRA r16", parameters=whole, error=0.0, accuracy=accuracy(work.model, work.test))
    with torch.no_grad():
        adapter.scale = 0.0
    rows.add("head alone", parameters=0, error=1.0, accuracy=accuracy(work.model, work.test))
    weights = {name: work.model.get_parameter(f"{name}.weight") for name in deltas}

    def count(ranks: Mapping[str, int]) -> int:
        return sum(rank * sum(shapes[name]) for name, rank in ranks.items())

    def add(key: str, parameters: int, made: Mapping[str, Tensor]) -> None:
        score = applied(work, weights, made)
        rows.add(key, parameters=parameters, error=relative(deltas, made), accuracy=score)

    for part, families in ((2, ["lora"]), (4, FAMILIES), (8, ["lora"])):
        budget = whole // part
        for row in sl.suggest(deltas, budget=budget, families=families):
            plan = sl.Plan(row.spec, shapes)
            add(f"1/{part} {row.family}", plan.num_parameters, plan.deltas(row.factors))
        ranks = share_of(deltas, count, budget)
        made = {name: truncated(own, ranks[name]) for name, own in deltas.items()}
        add(f"1/{part} sd-scripts sv_fro", count(ranks), made)


if __name__ == "__main__":
    main()
