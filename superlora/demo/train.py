"""Train one point: an adapter and a linear head, or the head alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import superlora.torch as slt
from superlora.demo.data import CLASSES, Images, Labelled, Splits, prepare
from superlora.demo.points import Point, Result, Settings
from superlora.demo.vit import VisionTransformer

TARGETS = ("query", "value")
EVALUATION_BATCH = 250  # images
WARM_UP = 0.1  # share of the steps
LARGEST_GRADIENT = 1.0  # Euclidean norm over the adapter
ADAPTER_FILE = "adapter.safetensors"
HEAD_FILE = "head.safetensors"

Step = Callable[[], None]
"""Called after every optimiser step and every evaluated batch."""


@dataclass(frozen=True)
class Trainer:
    """Trains points on one model and one split.

    Parameters
    ----------
    model : VisionTransformer
        Adapted and set free again for every point; its weights stay as they are.
    splits : Splits
        The images.
    settings : Settings
        What all points share.
    """

    model: VisionTransformer
    splits: Splits
    settings: Settings

    def train(self, point: Point, key: str, folder: Path, step: Step) -> Result:
        """Measure a point, and write its head and its adapter into `folder`.

        Parameters
        ----------
        point : Point
            What to train.
        key : str
            Kept in the result.
        folder : Path
            An existing folder.
        step : callable
            Called `steps` times.

        Returns
        -------
        Result
            The accuracies, and the wall time of the training alone.
        """
        settings = self.settings
        torch.manual_seed(settings.seed)
        head = new_head(self.model)
        adapter = None
        parameters = file_bytes = 0
        if point.spec is not None:
            adapter = slt.attach(self.model, point.spec, targets=TARGETS, seed=settings.seed)
        try:
            start = time.perf_counter()
            if adapter is None:
                self._train_head(head, step)
            else:
                self._train_both(adapter, head, point.rate, step)
            seconds = time.perf_counter() - start
            validation, test = (
                count_correct(self.model, head, part, settings.resolution, step)
                for part in (self.splits.validation, self.splits.test)
            )
            save_file(head.state_dict(), folder / HEAD_FILE)
            if adapter is not None:
                adapter.save(folder / ADAPTER_FILE)
                parameters = adapter.num_parameters
                file_bytes = (folder / ADAPTER_FILE).stat().st_size
        finally:
            if adapter is not None:
                adapter.detach()
        return Result(
            method=point.method,
            family=point.family,
            rank=point.rank,
            parameters=parameters,
            rate=point.rate,
            validation_accuracy=validation / len(self.splits.validation),
            test_accuracy=test / len(self.splits.test),
            test_correct=test,
            seconds=seconds,
            file_bytes=file_bytes,
            key=key,
        )

    def steps(self, point: Point) -> int:
        """How often `train` calls its `step` for this point."""
        images = len(self.splits.train)
        if point.spec is None:
            training = math.ceil(images / EVALUATION_BATCH)
        else:
            training = self.settings.epochs * self._batches_an_epoch
        return training + sum(
            math.ceil(len(part) / EVALUATION_BATCH)
            for part in (self.splits.validation, self.splits.test)
        )

    @property
    def _batches_an_epoch(self) -> int:
        return math.ceil(len(self.splits.train) / self.settings.batch_size)

    def _train_both(self, adapter: slt.Adapter, head: nn.Linear, rate: float, step: Step) -> None:
        settings, images = self.settings, self.splits.train
        factors = list(adapter.parameters())
        epochs = settings.epochs
        optimiser = torch.optim.AdamW(
            [
                {"params": factors, "lr": rate},
                {"params": list(head.parameters()), "lr": settings.head_rate},
            ],
            weight_decay=0.0,
        )
        schedule = _warm_up_then_cosine(optimiser, epochs * self._batches_an_epoch)
        for batch in _batches(images, settings.batch_size, epochs, settings.seed):
            pixels = prepare(batch.pixels, settings.resolution)
            loss = F.cross_entropy(head(self.model(pixels)), batch.labels)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(factors, LARGEST_GRADIENT)
            optimiser.step()
            schedule.step()
            step()

    def _train_head(self, head: nn.Linear, step: Step) -> None:
        settings, images = self.settings, self.splits.train
        features = torch.cat(list(_features(self.model, images, settings.resolution, step)))
        images = Images(features, images.labels)  # the model is fixed: features in pixels' place
        epochs = settings.head_only_epochs
        optimiser = torch.optim.AdamW(
            head.parameters(), lr=settings.head_only_rate, weight_decay=0.0
        )
        schedule = _warm_up_then_cosine(optimiser, epochs * self._batches_an_epoch)
        for batch in _batches(images, settings.batch_size, epochs, settings.seed):
            loss = F.cross_entropy(head(batch.pixels), batch.labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()


def new_head(model: VisionTransformer, classes: int = CLASSES) -> nn.Linear:
    """Return a linear classifier of the model's features that starts at zero."""
    head = nn.Linear(model.norm.normalized_shape[0], classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def reload(model: VisionTransformer, folder: Path) -> nn.Linear:
    """Load what `Trainer.train` wrote: the adapter onto `model`, and the head.

    Parameters
    ----------
    model : VisionTransformer
        A model without an adapter.
    folder : Path
        With ``adapter.safetensors`` and ``head.safetensors``.

    Returns
    -------
    nn.Linear
        The head.
    """
    slt.load(model, folder / ADAPTER_FILE)
    head = new_head(model)
    head.load_state_dict(load_file(folder / HEAD_FILE))
    return head


def count_correct(
    model: VisionTransformer, head: nn.Linear, images: Labelled, resolution: int, step: Step
) -> int:
    """Return how many images are classified right.

    Parameters
    ----------
    model, head : nn.Module
        With or without an adapter.
    images : Images or Labelled
        What to classify.
    resolution : int
        Side of an image, in pixels.
    step : callable
        Called after every batch.

    Returns
    -------
    int
        At most ``len(images)``.
    """
    with torch.no_grad():
        guesses = [head(part).argmax(1) for part in _features(model, images, resolution, step)]
    return int((torch.cat(guesses) == images.labels).sum())


def _features(
    model: VisionTransformer, images: Labelled, resolution: int, step: Step
) -> Iterator[Tensor]:
    for index in torch.arange(len(images)).split(EVALUATION_BATCH):
        pixels = images[index].pixels
        with torch.no_grad():  # not around the yield: it would hold in the caller too
            features = model(prepare(pixels, resolution))
        step()
        yield features


def _batches(images: Images, size: int, epochs: int, seed: int) -> Iterator[Images]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(len(images), generator=generator).split(size):
            yield images[index]


def _warm_up_then_cosine(
    optimiser: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimiser, lambda done: rate_share(done, steps))


def rate_share(done: int, steps: int) -> float:
    """Return what to multiply a rate by: a linear rise for a tenth of the steps, then a cosine."""
    warm = max(1, round(WARM_UP * steps))
    if done < warm:
        return (done + 1) / warm
    return 0.5 + 0.5 * math.cos(math.pi * (done - warm) / max(1, steps - warm))
