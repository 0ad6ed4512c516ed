"""Train a supernet with its head, or find the one that an earlier run trained."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import os
import pickle
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import superlora
from superlora.demo.fitting import Fit, Schedule
from superlora.demo.search_config import SearchError, SupernetSettings
from superlora.demo.tasks import Task
from superlora.demo.train import new_head
from superlora.demo.vit import VisionTransformer
from superlora.search.settings import differences
from superlora.search.supernet import Supernet
from superlora.torch.files.safetensors_file import write_tensors

TARGETS = ("qkv", "proj", "fc1", "fc2")
"""The linear layers of a block, as GLoRA's authors adapt them."""

FORMAT = 3
"""Raised whenever the code changes what a supernet would come out as."""

SUPERNET_FILE = "supernet.safetensors"
SETTINGS_FILE = "supernet.json"
STATE_FILE = "supernet-training.pt"


@dataclass(frozen=True)
class Trained:
    """A supernet on its model, and the head that was trained with it.

    Parameters
    ----------
    model : VisionTransformer
        The model.
    supernet : Supernet
        On the model.
    head : nn.Linear
        Of the task's classes.
    file : Path
        The supernet's; the head's lies beside it.
    """

    model: VisionTransformer
    supernet: Supernet
    head: nn.Linear
    file: Path

    def digest(self) -> str:
        """Return a hash of both files."""
        state = hashlib.sha256(self.file.read_bytes())
        state.update(head_file(self.file).read_bytes())
        return state.hexdigest()


def head_file(file: Path) -> Path:
    """Return where the head of a supernet's file lies."""
    return file.with_name(f"{file.stem}-head.safetensors")


def losses_file(file: Path) -> Path:
    """Return where the losses of all steps of a supernet's training lie."""
    return file.with_name(f"{file.stem}-losses.json")


def train_supernet(
    model: VisionTransformer,
    task: Task,
    settings: SupernetSettings,
    seed: int,
    folder: Path,
    *,
    surroundings: dict[str, Any],
    epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> Trained:
    """Train a supernet under random configurations, or go on where an earlier run stopped.

    Parameters
    ----------
    model : VisionTransformer
        With one layer for query, key and value. The supernet stays on it.
    task : Task
        The images.
    settings : SupernetSettings
        Ranks, epochs and rates.
    seed : int
        Of the initial tensors, the configurations and the order of the images.
    folder : Path
        Where the supernet is kept, and the state after each epoch until it is trained.
    surroundings : dict
        What the result depends on besides, as JSON values.
    epoch : callable
        Called after each epoch with how many are done and the mean loss.

    Returns
    -------
    Trained
        The supernet and its head.

    Raises
    ------
    SearchError
        If `folder` has a supernet of other settings.
    """
    identity = _identity(task, settings, seed, surroundings)
    file = folder / SUPERNET_FILE
    state_file = folder / STATE_FILE
    described = folder / SETTINGS_FILE
    if described.exists():
        _refuse_another(described, identity)
    if file.exists() and head_file(file).exists():
        return load_supernet(model, file, task.classes)
    described.write_text(json.dumps(identity, indent=1) + "\n", "utf-8")
    supernet = Supernet(
        model, list(TARGETS), settings.ranks, operations=settings.operations(), seed=seed
    )
    head = new_head(model, task.classes)
    schedule = Schedule(
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        rate=settings.rate,
        head_rate=settings.head_rate,
        weight_decay=settings.weight_decay,
        seed=seed,
    )
    factors = _by_rate(supernet, settings)
    fit = Fit(model, head, factors, task.train, task.resolution, schedule, supernet.draw)
    try:
        _restore(fit, state_file)
        while not fit.done:
            loss = fit.run_epoch()
            with _replacing(state_file) as partial:
                torch.save(fit.state(), partial)
            epoch(fit.epoch, loss)
    except BaseException:
        supernet.detach()
        raise
    supernet.use(None)
    # The supernet last: where it is, the head is too.
    write_tensors(head_file(file), dict(head.state_dict()))
    losses_file(file).write_text(json.dumps(fit.losses), "utf-8")
    supernet.save(file)
    state_file.unlink(missing_ok=True)
    return Trained(model, supernet, head, file)


def load_supernet(model: VisionTransformer, file: Path, classes: int) -> Trained:
    """Put a saved supernet on a model, with the head that lies beside it.

    Parameters
    ----------
    model : VisionTransformer
        As it was trained on.
    file : Path
        What `train_supernet` wrote.
    classes : int
        Of the head.

    Returns
    -------
    Trained
        The supernet and its head.

    Raises
    ------
    SearchError
        If one of the files isn't there or doesn't fit.
    """
    head = new_head(model, classes)
    try:
        head.load_state_dict(load_file(head_file(file)))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).replace("\n", " ")
        raise SearchError(
            f"{head_file(file)} must be the head of {classes} classes that was trained with "
            f"{file.name}: {reason}"
        ) from None
    try:
        supernet = Supernet.load(model, file)
    except (OSError, ValueError, TypeError) as error:
        raise SearchError(f"{file} must be a supernet of this model: {error}") from None
    return Trained(model, supernet, head, file)


def _by_rate(supernet: Supernet, settings: SupernetSettings) -> dict[float, list[nn.Parameter]]:
    found: dict[float, list[nn.Parameter]] = {}
    for layer in supernet.layers():
        for operation, stored in supernet.stored(layer).items():
            rate = settings.rates.get(operation, settings.rate)
            own = [factor for factor in stored if isinstance(factor, nn.Parameter)]
            found.setdefault(rate, []).extend(own)
    return found


def _identity(
    task: Task, settings: SupernetSettings, seed: int, surroundings: dict[str, Any]
) -> dict[str, Any]:
    found = {
        "format": FORMAT,
        "superlora": superlora.__version__,
        "task": task.name,
        "data": task.digest(),
        "settings": dataclasses.asdict(settings),
        "seed": seed,
        **surroundings,
    }
    values: dict[str, Any] = json.loads(json.dumps(found))
    return values


def _refuse_another(described: Path, identity: dict[str, Any]) -> None:
    try:
        found = json.loads(described.read_text("utf-8"))
    except (OSError, ValueError):
        found = {}
    other = differences(found, identity)
    if other:
        raise SearchError(
            f"{described.parent} must be a new folder, or one of the same settings: its supernet "
            f"has {', '.join(other)}"
        )


def check_images(file: Path, task: Task) -> None:
    """Refuse a supernet that was trained on other images, which may be searched or tested on.

    Parameters
    ----------
    file : Path
        The supernet's. Where its settings do not lie beside it, nothing is known.
    task : Task
        What it is to be searched on.

    Raises
    ------
    SearchError
        If the images, or their size, are others.
    """
    try:
        found = json.loads(file.with_name(SETTINGS_FILE).read_text("utf-8"))
        data = found["data"]
    except (OSError, ValueError, LookupError, TypeError):
        return
    if data != task.digest():
        raise SearchError(
            f"{file} must be searched on the images that it was trained beside: give it the same "
            "configuration and seed, or its training images may be among those to search and test"
        )


def _restore(fit: Fit, file: Path) -> None:
    # A state that cannot be read is of a machine that crashed; training starts again.
    unreadable: tuple[type[Exception], ...] = (OSError, EOFError, pickle.PickleError)
    unreadable += (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
    start = copy.deepcopy(fit.state())
    try:
        fit.restore(torch.load(file, weights_only=True))
    except unreadable:
        fit.restore(start)  # a part may have been read


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Write a file under another name first, so that it is never half written."""
    partial = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
