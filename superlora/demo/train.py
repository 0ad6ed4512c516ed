"""Train, test, save and load a classifier: a frozen transformer, an adapter and a linear head."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import superlora.torch as slt
from superlora.demo.data import Images, Labelled, prepare
from superlora.demo.vit import VisionTransformer
from superlora.torch.files.safetensors_file import write_tensors

EVALUATION_BATCH = 250  # images
WARM_UP = 0.1  # share of the steps
LARGEST_GRADIENT = 1.0  # Euclidean norm over the factors
ADAPTER_FILE = "adapter.safetensors"
HEAD_FILE = "head.safetensors"


class Classifier(nn.Module):
    """A transformer with a linear head that starts at zero, for images of some side in pixels."""

    def __init__(self, model: VisionTransformer, classes: int, resolution: int) -> None:
        super().__init__()
        self.model, self.resolution = model, resolution
        self.head = nn.Linear(model.width, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels of uint8 to a number for each class."""
        out: Tensor = self.head(self.features(pixels))
        return out

    def features(self, pixels: Tensor) -> Tensor:
        """Map pixels of uint8 to the transformer's features."""
        out: Tensor = self.model(prepare(pixels, self.resolution))
        return out

    @torch.no_grad()
    def features_of(self, images: Images) -> Images:
        """Return images with their features in the pixels' place."""
        parts = [self.features(part) for part in images.pixels.split(EVALUATION_BATCH)]
        return Images(torch.cat(parts), images.labels)

    @torch.no_grad()
    def count_correct(self, images: Labelled) -> int:
        """Return how many images are classified right."""
        correct = 0
        for index in torch.arange(len(images)).split(EVALUATION_BATCH):
            batch = images[index]
            correct += int((self(batch.pixels).argmax(1) == batch.labels).sum())
        return correct

    def accuracy(self, images: Labelled) -> float:
        """Return the share of the images that is classified right."""
        return self.count_correct(images) / len(images)


def fit(
    classify: Callable[[Tensor], Tensor],
    head: nn.Linear,
    factors: Mapping[float, Sequence[nn.Parameter]],
    images: Images,
    epochs: int,
    head_rate: float,
    *,
    batch_size: int,
    seed: int,
    weight_decay: float = 0.0,
    before_step: Callable[[int], object] = lambda step: None,
    after_epoch: Callable[[int, float], object] = lambda epoch, loss: None,
) -> list[float]:
    """Train a head, with factors by learning rate, and return the loss of every step."""
    groups = [*factors.items(), (head_rate, list(head.parameters()))]
    optimiser = torch.optim.AdamW(
        [{"params": list(own), "lr": rate} for rate, own in groups], weight_decay=weight_decay
    )
    clipped = [factor for own in factors.values() for factor in own]
    steps = epochs * math.ceil(len(images) / batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda done: rate_share(done, steps))
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    for epoch in range(1, epochs + 1):
        first = len(losses)
        for index in torch.randperm(len(images), generator=generator).split(batch_size):
            before_step(len(losses))
            batch = images[index]
            loss = F.cross_entropy(classify(batch.pixels), batch.labels)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(clipped, LARGEST_GRADIENT)
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
        after_epoch(epoch, sum(losses[first:]) / len(losses[first:]))
    return losses


def rate_share(done: int, steps: int) -> float:
    """Return what to multiply a rate by: a linear rise for a tenth of the steps, then a cosine."""
    warm = max(1, round(WARM_UP * steps))
    if done < warm:
        return (done + 1) / warm
    return 0.5 + 0.5 * math.cos(math.pi * (done - warm) / max(1, steps - warm))


def save(classifier: Classifier, adapter: slt.Adapter, folder: Path) -> None:
    """Write the adapter and the head of a classifier into a folder."""
    adapter.save(folder / ADAPTER_FILE)
    write_tensors(folder / HEAD_FILE, dict(classifier.head.state_dict()))


def check_saved(
    model: VisionTransformer,
    classes: int,
    resolution: int,
    folder: Path,
    images: Labelled,
    count: int,
) -> None:
    """Load what `save` wrote onto a model without an adapter: it must classify as before."""
    classifier = Classifier(model, classes, resolution)
    classifier.head.load_state_dict(load_file(folder / HEAD_FILE))
    adapter = slt.load(model, folder / ADAPTER_FILE)
    try:
        found = classifier.count_correct(images)
    finally:
        adapter.detach()
    if found != count:
        raise ValueError(
            f"{folder / ADAPTER_FILE} must classify as before it was saved: expected {count} of "
            f"{len(images)} images right, got {found}"
        )
