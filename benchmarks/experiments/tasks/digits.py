"""The demo's ViT-S/14 on few handwritten digits: query and value weights of all blocks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from smollm import cache_folder

from experiments.training import Diverged, attached, check_loss
from superlora.demo.data import Images, Splits, read_digits, split
from superlora.demo.fetch import MNIST, VIT, fetch
from superlora.demo.train import Classifier, fit
from superlora.demo.vit import VisionTransformer, load_onnx

SOURCES = ("demo/data.py", "demo/train.py", "demo/vit.py")


@dataclass
class Digits:
    """The classifier and the parts of each seed."""

    base: VisionTransformer
    digits: Images
    sizes: dict[str, int]
    resolution: int
    epochs: int
    batch_size: int
    head_rate: float
    head_epochs: int  # of the head alone, on features that are computed once
    frozen_head: bool
    targets: tuple[str, ...]
    splits: dict[int, Splits] = field(default_factory=dict)

    def parts(self, seed: int) -> Splits:
        if seed not in self.splits:
            self.splits[seed] = split(self.digits, **self.sizes, seed=seed)
        return self.splits[seed]

    def measure(self, design: Any, *, rate: float, scale: float, seed: int) -> dict[str, Any]:
        parts = self.parts(seed)
        classifier = Classifier(self.base, parts.classes, self.resolution)
        head = classifier.head
        start = time.perf_counter()
        shared: dict[str, Any] = {"batch_size": self.batch_size, "seed": seed}
        if design is None or self.frozen_head:
            features = classifier.features_of(parts.train)
            head_rate = rate if design is None else self.head_rate
            fit(head, head, {}, features, self.head_epochs, head_rate, **shared)
        losses: list[float] = []
        diverged = False
        with attached(self.base, design, self.targets, scale, seed) as adapter:
            if design is not None:
                head.requires_grad_(not self.frozen_head)
                head_rate = 0.0 if self.frozen_head else self.head_rate
                factors = {rate: list(adapter.parameters())}
                try:
                    losses = fit(
                        *(classifier, head, factors, parts.train, self.epochs, head_rate),
                        **shared,
                        after_epoch=check_loss(parts.classes),
                    )
                except Diverged:
                    diverged = True
            seconds = time.perf_counter() - start
            return {
                "parameters": 0 if design is None else adapter.num_parameters,
                "validation": classifier.accuracy(parts.validation),
                "test": classifier.accuracy(parts.test),
                "seconds": seconds,
                "loss": losses[-1] if losses else None,
                "diverged": diverged,
            }


def load(
    *,
    train: int,
    validation: int,
    test: int,
    resolution: int,
    epochs: int,
    batch_size: int,
    head_rate: float,
    head_epochs: int = 60,
    frozen_head: bool = False,
    targets: Sequence[str] = ("query", "value"),
) -> Digits:
    """Return the task; the model and the digits are fetched once."""
    cache = cache_folder()
    return Digits(
        load_onnx(fetch(VIT, cache)),
        read_digits(fetch(MNIST, cache)),
        {"train": train, "validation": validation, "test": test},
        resolution,
        epochs,
        batch_size,
        head_rate,
        head_epochs,
        frozen_head,
        tuple(targets),
    )
