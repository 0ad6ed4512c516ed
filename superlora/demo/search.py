"""The search from end to end: train or find a supernet, search it, extract, save and reload."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import superlora
from superlora.demo import report
from superlora.demo.data import Splits
from superlora.demo.supernet import (
    SUPERNET_FILE,
    Settings,
    Trained,
    digest,
    fuse,
    load_supernet,
    new_supernet,
    train_supernet,
)
from superlora.demo.train import Classifier, check_saved, save
from superlora.demo.vit import VisionTransformer
from superlora.search.candidates import candidates
from superlora.search.limits import Limits
from superlora.search.outcome import Outcome
from superlora.search.searching import search
from superlora.search.space import Configuration
from superlora.search.supernet import Supernet

STUDY_FILE = "study.db"
SHOWN = 10  # rows of the table


def run(
    base: VisionTransformer,
    images: Splits,
    settings: Settings,
    output: Path,
    *,
    limits: Sequence[int | None] = (None,),
    objectives: int = 1,
    sampler: str | None = None,
    storage: str | Path | None = None,
    seed: int = 0,
    saved: Path | None = None,
    console: Console | None = None,
) -> dict[Path, Outcome]:
    """Train a supernet or load a saved one, search it within each limit, and write the results."""
    console = console or Console()
    space = new_supernet(fuse(base), settings, seed).space
    for limit in limits:  # before an hour of training
        try:
            Limits(space, 1, limit)
        except ValueError as error:
            raise ValueError(str(error).replace("limits[1]", "--limit")) from None

    def after_epoch(epoch: int, loss: float) -> None:
        line = f"supernet: epoch {epoch} of {settings.epochs}, loss {loss:.4f}"
        console.print(line, highlight=False)

    if saved is None:
        trained = train_supernet(base, images, settings, seed, output, after_epoch)
    else:
        trained = load_supernet(base, images, settings, seed, saved)
    output.mkdir(parents=True, exist_ok=True)
    shared: dict[str, Any] = {"objectives": objectives, "sampler": sampler, "seed": seed}
    outcomes = {}
    for limit in limits:
        folder = output / ("no-limit" if limit is None else f"limit-{limit}")
        options = {"name": f"{images.name}, {folder.name}", **shared}
        options |= {"storage": storage or output / STUDY_FILE, "progress": console.is_terminal}
        outcomes[folder] = outcome = find(images, trained, settings, limit, **options)
        test_accuracy = keep(base, images, trained, outcome.best.configuration, folder)
        about = {
            "data": images.name,
            "data_digest": digest(images),
            "images": [len(part) for part in (images.train, images.validation, images.test)],
            "settings": dataclasses.asdict(settings),
            "limit": limit,
            **shared,
            "versions": {"superlora": superlora.__version__, "torch": torch.__version__},
            "threads": torch.get_num_threads(),
        }
        write(outcome, test_accuracy, about, folder)
        console.print(table(outcome, test_accuracy, folder.name))
        console.print(f"Results are in {folder}", highlight=False, soft_wrap=True)
    return outcomes


def find(
    images: Splits, trained: Trained, settings: Settings, limit: int | None, **options: Any
) -> Outcome:
    """Search a supernet within a limit; the options are those of `superlora.search.search`."""
    supernet = trained.supernet

    def evaluate(configuration: Configuration) -> float:
        with supernet.using(configuration):
            supernet.merge()
            return trained.classifier.accuracy(images.validation)

    history = [(supernet.sample(step), loss) for step, loss in enumerate(trained.losses)]
    return search(
        evaluate,
        supernet.space,
        trials=settings.trials,
        evolution=settings.evolution,
        limits=(1, limit),
        first=candidates(supernet.space, history),
        identity=f"{trained.digest} {digest(images)}",
        **options,
    )


def keep(
    base: VisionTransformer,
    images: Splits,
    trained: Trained,
    configuration: Configuration,
    folder: Path,
) -> float:
    """Save the adapter and head of a configuration, and return their accuracy on the test part."""
    folder.mkdir(parents=True, exist_ok=True)
    model, resolution = fuse(base), trained.classifier.resolution
    classifier = Classifier(model, images.classes, resolution)
    classifier.head.load_state_dict(trained.classifier.head.state_dict())
    # The trained one stays on its model, for other searches.
    adapter = Supernet.load(model, trained.folder / SUPERNET_FILE).extract(configuration)
    save(classifier, adapter, folder)
    correct = classifier.count_correct(images.validation)
    test_accuracy = classifier.accuracy(images.test)
    adapter.detach()
    check_saved(model, images.classes, resolution, folder, images.validation, correct)
    return test_accuracy


def table(outcome: Outcome, test_accuracy: float, name: str) -> Table:
    """Return the table to print: the best candidates and those with a name, the best first."""
    shown = report.new_table(
        f"{name}: the best of {len(outcome.trials)} configurations",
        f"{test_accuracy:.2%} of the test images with the first, which is saved. At equal "
        "accuracy fewer parameters rank first. Those with a name were tried without a search.",
    )
    for column in ("rank", "parameters", "validation\naccuracy", "generation", "name"):
        shown.add_column(column, justify="left" if column == "name" else "right")
    for place, candidate in enumerate(outcome.ranked(len(outcome.trials)), start=1):
        if place <= SHOWN or candidate.label:
            shown.add_row(
                str(place),
                f"{candidate.num_parameters:,}",
                f"{candidate.value:.2%}",
                str(candidate.generation),
                candidate.label,
                style="bold" if place == 1 else None,
            )
    return shown


def write(outcome: Outcome, test_accuracy: float, about: dict[str, Any], folder: Path) -> None:
    """Write ``ranked.csv``, all candidates, and ``results.json``, the best and the front."""
    rows: list[Any] = [("rank", "value", "num_parameters", "generation", "index", "key", "name")]
    for place, own in enumerate(outcome.ranked(len(outcome.trials)), start=1):
        key = outcome.space.key(own.configuration)
        rows += [(place, own.value, own.num_parameters, own.generation, own.index, key, own.label)]
    report.write_rows(rows, folder / "ranked.csv")
    content = {
        **about,
        "space": {**outcome.space.to_dict(), "size": str(outcome.space.size)},
        "evaluated": len(outcome.trials),
        "best": dataclasses.asdict(outcome.best),
        "test_accuracy": test_accuracy,
        "front": [
            {"index": own.index, "value": own.value, "num_parameters": own.num_parameters}
            for own in outcome.front()
        ],
    }
    report.write_json(content, folder / "results.json")
