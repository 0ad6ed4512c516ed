"""Structure taken out of a dense fine-tune of MiniLM, by family and budget.

python benchmarks/extract_minilm.py --output runs/extract [--targets all-linear] [--tiny]

MiniLM is tuned densely on Reuters news. Its updates are fitted by every family at some budgets, and
beside that stand the same specs trained from the start, and LyCORIS's own extraction at equal
bytes. Every row says how the model classifies with the update in the place of the tuned one, the
head as it was tuned. Rows that a former run has written are not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from minilm import Task, accuracy, stacked, task
from torch import Tensor, nn

import superlora as sl
import superlora.torch as slt

FAMILIES = ("lora", "lokr", "loha", "lotr", "metatt", "lorta", "lorta of order 4", "one matrix")
BUDGETS = (1_000, 4_000, 16_000, 64_000, 250_000, 500_000)
# Of this budget the specs of some families are trained too; of the tiny model of the other.
TRAINED = (16_000, 1_000)
TRAINED_FAMILIES = ("lora", "lotr", "metatt", "one matrix")
EPOCHS = 3
# Of training a spec from the start: which is best depends on the structure.
RATES = (2e-3, 1e-2)


def trained_steps(
    work: Task, groups: list[dict[str, Any]], *, epochs: int, batch: int = 16, seed: int = 0
) -> float:
    """Train groups of parameters of a task's model, and return the seconds."""
    start = time.perf_counter()
    optimizer = torch.optim.AdamW(groups)
    rates = [group["lr"] for group in optimizer.param_groups]
    steps = epochs * (len(work.train) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps, pct_start=0.1)
    drawn = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    work.model.train()
    for _ in range(epochs):
        order = torch.randperm(len(work.train), generator=drawn).tolist()
        for first in range(0, len(order) - batch + 1, batch):
            examples = stacked([work.train[index] for index in order[first : first + batch]])
            optimizer.zero_grad()
            work.model(**examples).loss.backward()
            for group in optimizer.param_groups:
                nn.utils.clip_grad_norm_(group["params"], 1.0)
            optimizer.step()
            schedule.step()
    return time.perf_counter() - start


def tune(work: Task, adapter: Any, rate: float, *, epochs: int) -> float:
    """Train an adapter and the head, and return the seconds."""
    groups = adapter.param_groups(lr=rate, rates={"model": 1e-3})
    return trained_steps(work, groups, epochs=epochs)


class Rows:
    """Rows of results in a file, by their keys."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, key: str, **row: Any) -> None:
        """Write a row, and print it."""
        self.rows[key] = row
        self.path.write_text(json.dumps(self.rows, indent=1) + "\n")
        print(key, row, flush=True)


def applied(work: Task, weights: Mapping[str, Tensor], deltas: Mapping[str, Tensor]) -> float:
    """Return the accuracy with updates added to the base."""
    with torch.no_grad():
        for name, weight in weights.items():
            weight += deltas[name]
        score = accuracy(work.model, work.test)
        for name, weight in weights.items():
            weight -= deltas[name]
    return score


def relative(deltas: Mapping[str, Tensor], made: Mapping[str, Tensor]) -> float:
    """Return the norm of what is left over the norm of the updates."""
    left = sum(float((deltas[name] - made[name]).square().sum()) for name in deltas)
    return (left / sum(float(own.square().sum()) for own in deltas.values())) ** 0.5


def lycoris_pairs(delta: Tensor, rank: int) -> Tensor:
    """Return what LyCORIS extracts of one update at a rank."""
    from lycoris.utils import extract_linear

    found, kind = extract_linear(delta.clone(), mode="fixed", mode_param=rank, device="cpu")
    return found if kind == "full" else found[1] @ found[0]


def extracted(
    work: Task,
    rows: Rows,
    weights: dict[str, Tensor],
    deltas: dict[str, Tensor],
    budgets: list[int],
) -> Iterator[tuple[int, Any]]:
    """Fit every family at every budget, and yield the candidates."""
    shapes = {name: tuple(own.shape) for name, own in deltas.items()}
    for budget in budgets:
        try:
            found = sl.suggest(shapes, budget=budget, families=FAMILIES)
        except ValueError as error:
            print(f"{budget}: {error}")
            continue
        for row in found:
            key = f"{row.family} {budget}"
            if key not in rows.rows:
                plan = sl.Plan(row.spec, shapes)
                factors, report = plan.fit(deltas)
                blocks = {**plan.frozen(like=torch.float32), **factors}
                score = applied(work, weights, plan.deltas(blocks))
                rows.add(
                    key,
                    kind="fit",
                    family=row.family,
                    budget=budget,
                    parameters=plan.num_parameters,
                    spec=repr(row.spec),
                    error=report.error,
                    accuracy=score,
                    seconds=report.seconds,
                )
            yield budget, row
        rank = budget // sum(map(sum, shapes.values()))
        if rank and f"lycoris {budget}" not in rows.rows:
            start = time.perf_counter()
            made = {name: lycoris_pairs(own, rank) for name, own in deltas.items()}
            seconds = time.perf_counter() - start
            rows.add(
                f"lycoris {budget}",
                kind="lycoris",
                family="LyCORIS's SVD",
                budget=budget,
                parameters=rank * sum(map(sum, shapes.values())),
                error=relative(deltas, made),
                accuracy=applied(work, weights, made),
                seconds=seconds,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--targets", default="query,value")
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS))
    parser.add_argument("--tiny", action="store_true", help="a model and data made on the spot")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    rows = Rows(options.output / "rows.json")
    names: Any = options.targets.split(",")
    targets = names if len(names) > 1 else names[0]
    epochs = 1 if options.tiny else EPOCHS

    work = task(tiny=options.tiny)
    before = accuracy(work.model, work.test)
    file = options.output / "dense.safetensors"
    if file.exists():
        adapter = slt.load(work.model, file)
    else:
        adapter = slt.attach(work.model, sl.dense(), targets=targets, also=["classifier"])
        seconds = tune(work, adapter, 1e-4, epochs=epochs)
        adapter.save(file)
        rows.add(
            "dense",
            kind="tuned",
            family="dense",
            parameters=adapter.plan.num_parameters,
            accuracy=accuracy(work.model, work.test),
            before=before,
            seconds=seconds,
        )
    deltas = {name: own.detach().clone() for name, own in adapter.deltas().items()}
    with torch.no_grad():
        adapter.scale = 0.0
        rows.add("base with the tuned head", kind="base", accuracy=accuracy(work.model, work.test))
    weights = {name: work.model.get_parameter(f"{name}.weight") for name in deltas}
    found = list(extracted(work, rows, weights, deltas, options.budgets))

    for budget, row in found:
        key = f"trained {row.family} {budget}"
        if (
            budget == TRAINED[options.tiny]
            and row.family in TRAINED_FAMILIES
            and key not in rows.rows
        ):
            rows.add(key, family=row.family, budget=budget, **trained(row.spec, targets, options))


def trained(spec: Any, targets: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Train a spec from the start at some rates; the one that validation prefers counts."""
    tried = []
    for rate in RATES:
        own = task(tiny=options.tiny)
        own.train, kept = own.train[: -len(own.train) // 5], own.train[-len(own.train) // 5 :]
        adapter = slt.attach(own.model, spec, targets=targets, also=["classifier"])
        seconds = tune(own, adapter, rate, epochs=1 if options.tiny else EPOCHS)
        tried.append((accuracy(own.model, kept), rate, accuracy(own.model, own.test), seconds))
    _, rate, score, seconds = max(tried)
    count = adapter.plan.num_parameters
    return {
        "kind": "trained",
        "parameters": count,
        "accuracy": score,
        "rate": rate,
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
