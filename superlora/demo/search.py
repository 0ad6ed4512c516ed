"""The search from end to end: train or find a supernet, search it, extract, save and reload."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

import superlora.torch as slt
from superlora.demo import search_report as report
from superlora.demo.fetch import VIT
from superlora.demo.fitting import evaluator
from superlora.demo.search_config import Config, SearchError, SupernetSettings
from superlora.demo.supernet import (
    Trained,
    check_images,
    load_supernet,
    losses_file,
    train_supernet,
)
from superlora.demo.tasks import Task
from superlora.demo.train import ADAPTER_FILE, HEAD_FILE, count_correct, new_head
from superlora.demo.vit import VisionTransformer
from superlora.search.candidates import candidates
from superlora.search.limits import Limits
from superlora.search.outcome import Outcome
from superlora.search.searching import search
from superlora.search.space import Configuration, Space
from superlora.torch.files.safetensors_file import write_tensors

STUDY_FILE = "study.db"


@dataclass(frozen=True)
class Options:
    """What a user asks of a search, besides the configuration file.

    Parameters
    ----------
    output : Path
        Folder of the results.
    limits : sequence of int or None
        A search for each: the largest number of parameters, None for no limit.
    objectives : int
        1 for the accuracy, 2 for few parameters as well.
    sampler : str or None
        As in `superlora.search.search`.
    storage : str or None
        A file's path or a database's URL; by default a file in `output`.
    seed : int
        Of everything.
    """

    output: Path
    limits: Sequence[int | None] = (None,)
    objectives: int = 1
    sampler: str | None = None
    storage: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Found:
    """The result of one search.

    Parameters
    ----------
    limit : int or None
        The largest number of parameters allowed.
    outcome : Outcome
        All that was evaluated.
    test_accuracy : float
        Of the best, on images that the search has not seen.
    folder : Path
        With its adapter and head.
    """

    limit: int | None
    outcome: Outcome
    test_accuracy: float
    folder: Path


def space_of(model: VisionTransformer, settings: SupernetSettings) -> Space:
    """Return the space of a supernet of the model, which is not changed.

    Parameters
    ----------
    model : VisionTransformer
        With one layer for query, key and value.
    settings : SupernetSettings
        Ranks and operations.

    Returns
    -------
    Space
        Of all linear layers of the blocks.
    """
    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in model.blocks.named_modules(prefix="blocks")
        if isinstance(module, torch.nn.Linear)
    }
    return Space(shapes, settings.ranks, settings.operations())


def check(space: Space, options: Options) -> None:
    """Refuse limits that no configuration meets, before anything is trained.

    Parameters
    ----------
    space : Space
        The configurations.
    options : Options
        The limits.

    Raises
    ------
    SearchError
        If it is so.
    """
    for limit in options.limits:
        try:
            Limits(space, 1, limit)
        except (TypeError, ValueError) as error:
            reason = str(error).replace("limits[1]", "--limit").replace("limits[0]", "1")
            raise SearchError(reason) from None


def surroundings() -> dict[str, Any]:
    """Return what a trained supernet depends on besides its settings, as JSON values."""
    return {
        "model_sha256": VIT.sha256,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def obtain(
    model: VisionTransformer,
    task: Task,
    config: Config,
    options: Options,
    saved: Path | None,
    epoch: Callable[[int, float], None],
) -> Trained:
    """Load the supernet that the user names, or train one.

    Parameters
    ----------
    model : VisionTransformer
        The supernet stays on it.
    task : Task
        The images.
    config : Config
        How it is trained.
    options : Options
        Where it is kept, and the seed.
    saved : Path or None
        A supernet's file.
    epoch : callable
        As in `train_supernet`.

    Returns
    -------
    Trained
        The supernet and its head.
    """
    if saved is not None:
        check_images(saved, task)
        return load_supernet(model, saved, task.classes)
    return train_supernet(
        model,
        task,
        config.supernet,
        options.seed,
        options.output,
        surroundings=surroundings(),
        epoch=epoch,
    )


def find(
    task: Task,
    trained: Trained,
    config: Config,
    options: Options,
    limit: int | None,
    *,
    progress: bool = False,
) -> Outcome:
    """Search a trained supernet within one limit, or go on where an earlier search stopped.

    Parameters
    ----------
    task : Task
        Its validation images are what a configuration is measured on.
    trained : Trained
        The supernet on its model, and its head.
    config : Config
        How many configurations, and the operators.
    options : Options
        Objectives, sampler, storage and seed.
    limit : int or None
        The largest number of parameters.
    progress : bool
        Show how far the search is.

    Returns
    -------
    Outcome
        All that was evaluated.
    """
    accuracy = evaluator(trained.model, trained.head, task.validation, task.resolution)
    supernet = trained.supernet

    def evaluate(configuration: Configuration) -> float:
        with supernet.using(configuration):
            return accuracy()

    try:
        losses = json.loads(losses_file(trained.file).read_text("utf-8"))
    except OSError:  # a supernet that was trained elsewhere
        losses = []
    history = [(supernet.sample(step), loss) for step, loss in enumerate(losses)]
    return search(
        evaluate,
        supernet.space,
        storage=options.storage or options.output / STUDY_FILE,
        name=f"{task.name}, {name_of(limit)}",
        sampler=options.sampler,
        trials=config.search.trials,
        evolution=config.search.evolution(),
        limits=(1, limit),
        objectives=options.objectives,
        first=candidates(supernet.space, history),
        seed=options.seed,
        identity=f"{trained.digest()} {task.digest()}",
        progress=progress,
    )


def name_of(limit: int | None) -> str:
    """Return what a search within a limit is called, also its folder."""
    return "no-limit" if limit is None else f"limit-{limit}"


def keep(
    model: VisionTransformer,
    task: Task,
    file: Path,
    configuration: Configuration,
    folder: Path,
) -> int:
    """Save the adapter of a configuration with its head, and count what it classifies right.

    Parameters
    ----------
    model : VisionTransformer
        Without a supernet or an adapter, and so in the end.
    task : Task
        The images.
    file : Path
        The trained supernet's.
    configuration : Configuration
        What to extract.
    folder : Path
        Receives ``adapter.safetensors`` and ``head.safetensors``.

    Returns
    -------
    int
        Correct test images.

    Raises
    ------
    SearchError
        If the files do not classify the validation images as the adapter does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trained = load_supernet(model, file, task.classes)
    adapter = trained.supernet.extract(configuration)
    validation, resolution = task.validation, task.resolution
    try:
        adapter.save(folder / ADAPTER_FILE)
        write_tensors(folder / HEAD_FILE, dict(trained.head.state_dict()))
        here = count_correct(model, trained.head, validation, resolution, lambda: None)
        test = count_correct(model, trained.head, task.test, resolution, lambda: None)
    finally:
        adapter.detach()
    head = new_head(model, task.classes)
    head.load_state_dict(load_file(folder / HEAD_FILE))
    loaded = slt.load(model, folder / ADAPTER_FILE)
    try:
        again = count_correct(model, head, validation, resolution, lambda: None)
    finally:
        loaded.detach()
    if again != here:
        raise SearchError(
            f"{folder / ADAPTER_FILE} must classify as before it was saved: {here} validation "
            f"images right then, {again} once it was loaded"
        )
    return test


def run(
    config: Config,
    options: Options,
    task: Task,
    base: VisionTransformer,
    *,
    saved: Path | None = None,
    console: Console | None = None,
) -> list[Found]:
    """Train, search, extract and report.

    Parameters
    ----------
    config : Config
        The settings.
    options : Options
        Limits, storage and so on.
    task : Task
        The images.
    base : VisionTransformer
        With query, key and value apart; not changed.
    saved : Path, optional
        A trained supernet's file, instead of training one.
    console : Console, optional
        Where to show progress and the tables.

    Returns
    -------
    list of Found
        One for each limit.

    Raises
    ------
    SearchError
        If no configuration meets a limit, the supernet does not fit, or the output folder is
        of other settings.
    """
    console = console or Console()
    model = base.fuse()
    if saved is None:  # before an hour of training
        check(space_of(model, config.supernet), options)
    options.output.mkdir(parents=True, exist_ok=True)

    def epoch(done: int, loss: float) -> None:
        console.print(
            f"supernet: epoch {done} of {config.supernet.epochs}, loss {loss:.4f}", highlight=False
        )

    trained = obtain(model, task, config, options, saved, epoch)
    check(trained.supernet.space, options)
    outcomes = [
        find(task, trained, config, options, limit, progress=console.is_terminal)
        for limit in options.limits
    ]
    found = []
    for limit, outcome in zip(options.limits, outcomes, strict=True):
        folder = options.output / name_of(limit)
        best = outcome.best.configuration
        correct = keep(base.fuse(), task, trained.file, best, folder)
        found.append(Found(limit, outcome, correct / len(task.test), folder))
        report.write(
            found[-1].outcome,
            found[-1].test_accuracy,
            folder,
            describe(config, options, task, limit),
        )
        console.print(report.table(outcome, found[-1].test_accuracy, name_of(limit)))
        console.print(f"Results are in {folder}", highlight=False, soft_wrap=True)
    return found


def describe(config: Config, options: Options, task: Task, limit: int | None) -> dict[str, Any]:
    """Return what a result was made with, as JSON values."""
    return {
        "task": task.name,
        "config": dataclasses.asdict(config),
        "limit": limit,
        "objectives": options.objectives,
        "sampler": options.sampler,
        "seed": options.seed,
        "images": {part: len(getattr(task, part)) for part in ("train", "validation", "test")},
        "surroundings": surroundings(),
    }
