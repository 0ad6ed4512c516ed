"""A U-Net that draws the digits 0 to 4 learns to draw 5 to 9 in their stead, in all its blocks.

The new digits have the labels of the old ones, 5 that of 0 and so on, so that nothing is trained
but the adapter.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from smollm import cache_folder

from experiments.classification import Diverged, attached
from experiments.flow import Course, held_out_loss, pretrain, sample, scaled, train
from experiments.judge import Judge, features_of, frechet_distance, recognised, train_judge
from experiments.trained import trained
from experiments.unet import ADAPTED, UNet
from superlora.demo.data import Images, Labelled, read_digits, split
from superlora.demo.fetch import MNIST, fetch

UNET_SOURCES = ("unet.py", "flow.py", "demo/train.py")
JUDGE_SOURCES = ("judge.py", "flow.py", "demo/train.py")
SOURCES = (
    *("unet.py", "judge.py", "flow.py", "trained.py", "classification.py"),
    *("demo/data.py", "demo/train.py"),
)
PACKAGES = ("scipy",)
OLD = 5  # digits that the U-Net is pre-trained on; as many are new
DRAWING_SEED = 1000  # of the noise that is drawn from, plus the seed


@dataclass(frozen=True)
class Parts:
    """New digits, with the labels of the old ones; no image is in two parts."""

    train: Images
    validation: Images
    test: Images


@dataclass
class Drawing:
    """A pre-trained U-Net, the judge of its drawings, and the new digits of each seed."""

    model: UNet
    judge: Judge
    parts: Callable[[int], Parts]  # of each seed
    targets: Sequence[str]
    steps: int  # of training
    batch_size: int
    drawn: int  # images of each digit, for the distance
    sampler_steps: int
    times: int = 4  # at which each image of the validation part is tried

    def measure(
        self, design: Any, *, rate: float, scale: float, seed: int, test: bool
    ) -> dict[str, Any]:
        parts = self.parts(seed)
        start = time.perf_counter()
        with attached(self.model, design, self.targets, scale, seed) as adapter:
            diverged = self._train(adapter, rate, seed)
            seconds = time.perf_counter() - start
            loss = held_out_loss(self.model, parts.validation, times=self.times, seed=seed)
            guess = guess_loss(parts.validation)
            return {
                "parameters": 0 if design is None else adapter.num_parameters,
                "validation": -min(loss, guess) if math.isfinite(loss) else -guess,
                **(self._judged(parts, seed) if test else {}),
                "seconds": seconds,
                "diverged": diverged,
            }

    def _judged(self, parts: Parts, seed: int) -> dict[str, float]:
        """Draw with what is trained, and compare with real digits."""
        drawn = self._draw(self.drawn, seed)
        real, own = (features_of(self.judge, each.pixels) for each in (parts.test, drawn))
        wanted = Images(drawn.pixels, drawn.labels + OLD)
        return {
            "test": -frechet_distance(real, own),
            "accuracy": recognised(self.judge, wanted),
        }

    def draw(self, design: Any, *, rate: float, scale: float, seed: int, each: int) -> Images:
        """Train a design, and return so many drawings for each label."""
        with attached(self.model, design, self.targets, scale, seed) as adapter:
            self._train(adapter, rate, seed)
            return self._draw(each, seed)

    def _train(self, adapter: Any, rate: float, seed: int) -> bool:
        """Train an adapter, and say whether it diverged: its loss is then above a guess."""
        if adapter is None:
            return False
        digits = self.parts(seed).train
        guess = guess_loss(digits)

        def check(step: int, loss: float) -> None:
            if not loss <= guess:
                raise Diverged

        try:
            course = Course(self.steps, self.batch_size, rate)
            train(
                self.model, list(adapter.parameters()), digits, course, seed=seed, after_step=check
            )
        except Diverged:
            return True
        return False

    def _draw(self, each: int, seed: int) -> Images:
        labels = torch.arange(OLD).repeat_interleave(each)
        options = {"side": self.model.side, "steps": self.sampler_steps}
        return Images(sample(self.model, labels, **options, seed=DRAWING_SEED + seed), labels)


def guess_loss(digits: Images) -> float:
    """Return the loss of velocities that are zero."""
    return 1 + float(scaled(digits.pixels).square().mean())


def load(
    *,
    judged: int,
    train: int,
    validation: int,
    test: int,
    pretraining: dict[str, Any],
    judging: dict[str, Any],
    model: dict[str, Any] | None = None,
    targets: Sequence[str] = ADAPTED,
    digits: Images | None = None,
    **rest: Any,
) -> Drawing:
    """Return the task; the digits are fetched and the two networks are trained once.

    Parts have their sizes in images of the ten digits; of `train` and the others one half is new.
    """
    if digits is None:
        digits = read_digits(fetch(MNIST, cache_folder()))
    side = digits.pixels.shape[-1]
    first = split(digits, train=judged, validation=10, test=len(digits) - judged - 10, seed=0)
    unjudged = first.test[torch.arange(len(first.test))]
    old = digits[digits.labels < OLD]

    unet = trained(
        "unet",
        lambda: UNet(side, OLD, **(model or {})),
        lambda made: pretrain(made, old, Course(**pretraining), seed=0),
        code=UNET_SOURCES,
        settings=[model, pretraining],
        tensors=[old.pixels, old.labels],
    )
    judge = trained(
        "judge",
        lambda: Judge(side),
        lambda made: train_judge(made, first.train, Course(**judging), seed=0),
        code=JUDGE_SOURCES,
        settings=judging,
        tensors=[first.train.pixels, first.train.labels],
    )

    @functools.cache
    def parts(seed: int) -> Parts:
        found = split(unjudged, train=train, validation=validation, test=test, seed=seed)
        return Parts(new(found.train), new(found.validation), new(found.test))

    return Drawing(unet, judge, parts, tuple(targets), **rest)


def new(digits: Labelled) -> Images:
    """Return the new ones among digits, with the labels of the old ones."""
    chosen = digits[torch.nonzero(digits.labels >= OLD).flatten()]
    return Images(chosen.pixels, chosen.labels - OLD)
