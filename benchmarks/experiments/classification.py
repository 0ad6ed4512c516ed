"""Tasks of classification: a frozen transformer, an adapter and a linear head."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

import superlora.torch as slt
from superlora.demo.data import Splits
from superlora.demo.train import Classifier, fit

SOURCES = ("classification.py", "demo/data.py", "demo/fetch.py", "demo/train.py", "demo/vit.py")


class Diverged(Exception):
    """The loss stays above that of guessing: the training ends, and counts as it then is."""


def check_loss(classes: int) -> Callable[[int, float], None]:
    """Return what ends a training whose mean loss is above that of guessing after one epoch."""

    def check(epoch: int, loss: float) -> None:
        if epoch > 1 and not loss <= math.log(classes):
            raise Diverged

    return check


@contextmanager
def attached(
    model: nn.Module, design: Any, targets: Sequence[str], scale: float, seed: int
) -> Iterator[Any]:
    """Attach a design for as long as the context lasts; None attaches nothing."""
    if design is None:
        yield None
        return
    with warnings.catch_warnings():
        # A rank above what a weight's own size needs: the comparison shows that it is idle.
        warnings.simplefilter("ignore")
        adapter = slt.attach(model, design, targets=list(targets), seed=seed)
    try:
        adapter.scale = scale * adapter.scale
        yield adapter
    finally:
        adapter.detach()


@dataclass(frozen=True)
class Trained:
    """A classifier that was trained, with its adapter; None is the head alone."""

    classifier: Classifier
    adapter: Any
    seconds: float
    diverged: bool


@dataclass
class Classification:
    """A classifier, and the parts of each seed.

    Every design starts from the head that was trained alone, on features that are computed once.
    """

    classifier: Callable[[int], Classifier]  # of so many classes, around the one base model
    parts: Callable[[int], Splits]
    targets: Sequence[str]
    epochs: int
    batch_size: int
    head_rate: float  # beside a design
    head_alone: float  # the rate before it
    head_epochs: int = 60  # before it
    frozen_head: bool = False  # beside it
    heads: dict[tuple[int, float], dict[str, Tensor]] = field(default_factory=dict)

    def measure(
        self, design: Any, *, rate: float, scale: float, seed: int, test: bool
    ) -> dict[str, Any]:
        """Train a design, and return its size and its accuracies."""
        with self.trained(design, rate=rate, scale=scale, seed=seed) as own:
            parts, part = self.parts(seed), "test" if test else "validation"
            return {
                "parameters": 0 if own.adapter is None else own.adapter.num_parameters,
                **{part: own.classifier.accuracy(getattr(parts, part))},
                "seconds": own.seconds,
                "diverged": own.diverged,
            }

    @contextmanager
    def trained(self, design: Any, *, rate: float, scale: float, seed: int) -> Iterator[Trained]:
        """Train a design, which stays attached for as long as the context lasts."""
        parts = self.parts(seed)
        classifier = self.classifier(parts.classes)
        head = classifier.head
        start = time.perf_counter()
        head.load_state_dict(self.head(seed, rate if design is None else self.head_alone))
        diverged = False
        with attached(classifier.model, design, self.targets, scale, seed) as adapter:
            if design is not None:
                head.requires_grad_(not self.frozen_head)
                head_rate = 0.0 if self.frozen_head else self.head_rate
                factors = {rate: list(adapter.parameters())}
                try:
                    fit(
                        *(classifier, head, factors, parts.train, self.epochs, head_rate),
                        batch_size=self.batch_size,
                        seed=seed,
                        after_epoch=check_loss(parts.classes),
                    )
                except Diverged:
                    diverged = True
            yield Trained(classifier, adapter, time.perf_counter() - start, diverged)

    def head(self, seed: int, rate: float) -> dict[str, Tensor]:
        """Return the head that was trained alone with a rate, once for all designs."""
        if (seed, rate) not in self.heads:
            parts = self.parts(seed)
            classifier = self.classifier(parts.classes)
            features = classifier.features_of(parts.train)
            options = {"batch_size": self.batch_size, "seed": seed}
            head = classifier.head
            fit(head, head, {}, features, self.head_epochs, rate, **options)
            self.heads[seed, rate] = dict(head.state_dict())
        return self.heads[seed, rate]
