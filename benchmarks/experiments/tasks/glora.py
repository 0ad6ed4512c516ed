"""GLoRA's supernet and search beside designs that are trained as they are, on few digits.

All four linear layers of every block are adapted. Every model is tested besides on digits of a kind
that it has not seen: turned, noisy, inverted, as in GLoRA's test of domain generalisation.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from smollm import cache_folder
from torch import Tensor

import superlora
from experiments.classification import SOURCES as CLASSIFICATION
from experiments.classification import Classification, Diverged, check_loss
from experiments.digest import code_digest
from experiments.tasks.digits import drawn
from superlora.demo.data import Images, Labelled, Splits, read_digits
from superlora.demo.fetch import MNIST, VIT, fetch
from superlora.demo.search import find
from superlora.demo.supernet import SUPERNET_FILE, TARGETS, Settings, Trained, fuse, train_supernet
from superlora.demo.train import Classifier
from superlora.demo.vit import VisionTransformer, load_onnx
from superlora.search import Evolution, Supernet

SOURCES = (*CLASSIFICATION, "tasks/digits.py", "demo/search.py", "demo/supernet.py", "search")

TURN = 30.0  # degrees
NOISE = 64.0  # the standard deviation, of 255
# Of the rate that is searched. B's vectors and constants move whole rows at once.
SHARES = {
    **{"scale_weight": 1.0, "add_weight": 1 / 300, "weight_to_bias": 0.1},
    **{"scale_bias": 1.0, "add_bias": 1.0},
}
RESTRICTED = {**SHARES, "add_weight": 1 / 3}
RANDOM = 10  # configurations that say how good a trained supernet is


@dataclass(frozen=True)
class Searched:
    """A supernet of these ranks, and the best configuration of at most so many parameters.

    Of `every_option`, B may be a vector or a constant too.
    """

    ranks: tuple[int, ...]
    limit: int
    epochs: int
    every_option: bool = True

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def turned(pixels: Tensor) -> Tensor:
    """Return images (n, 28, 28) turned counter-clockwise."""
    angle = math.radians(TURN)
    rows = [[math.cos(angle), math.sin(angle), 0.0], [-math.sin(angle), math.cos(angle), 0.0]]
    images = pixels.unsqueeze(1).float()
    matrix = torch.tensor(rows).expand(len(images), 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False).squeeze(1).to(torch.uint8)


def noisy(pixels: Tensor) -> Tensor:
    """Return images with normal noise, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    noise = NOISE * torch.randn(pixels.shape, generator=generator)
    return (pixels + noise).clamp(0, 255).to(torch.uint8)


def inverted(pixels: Tensor) -> Tensor:
    """Return images with black and white exchanged."""
    return 255 - pixels


SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    **{"turned": turned, "noisy": noisy, "inverted": inverted}
}


@dataclass
class Digits(Classification):
    """Designs as in `Classification`; a `Searched` is trained as a supernet, and then searched."""

    base: VisionTransformer = field(kw_only=True)
    resolution: int = field(kw_only=True)
    trials: int = field(kw_only=True)
    folder: Path = field(kw_only=True)  # of the supernets that are trained

    def measure(
        self, design: Any, *, rate: float, scale: float, seed: int, test: bool
    ) -> dict[str, Any]:
        if isinstance(design, Searched):
            return self.searched(design, rate, seed, test)
        with self.trained(design, rate=rate, scale=scale, seed=seed) as own:
            parts = self.parts(seed)
            return {
                "parameters": 0 if own.adapter is None else own.adapter.num_parameters,
                "validation": own.classifier.accuracy(parts.validation),
                **(tested(own.classifier, parts.test) if test else {}),
                "seconds": own.seconds,
                "diverged": own.diverged,
            }

    def searched(self, design: Searched, rate: float, seed: int, test: bool) -> dict[str, Any]:
        """Train a supernet, or find it trained, and search it under the limit."""
        parts = self.parts(seed)
        shares = SHARES if design.every_option else RESTRICTED
        settings = Settings(
            digits=(len(parts.train), len(parts.validation), len(parts.test)),
            resolution=self.resolution,
            ranks=design.ranks,
            every_option=design.every_option,
            epochs=design.epochs,
            batch_size=self.batch_size,
            rates={operation: share * rate for operation, share in shares.items()},
            head_rate=self.head_rate,
            trials=self.trials,
            evolution=Evolution(population=20, parents=6, mutations=10, crossovers=10),
        )
        try:
            trained, seconds = self.supernet(settings, parts, seed)
        except Diverged:
            guess = 1 / parts.classes
            scores = dict.fromkeys(("test", *(f"test_{name}" for name in SHIFTS)), guess)
            return {
                **{"parameters": design.limit, "validation": guess, **(scores if test else {})},
                **{"seconds": 0.0, "diverged": True},
            }
        mean = self.random_accuracy(trained, parts.validation, seed)
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            options = {"storage": Path(scratch) / "study.db", "seed": seed}
            outcome = find(parts, trained, settings, design.limit, **options)
            search_seconds = time.perf_counter() - start
            # Those that have a name are within the limit; there may be none.
            named = sorted(outcome.first.values(), key=lambda own: (-own.value, own.num_parameters))
            found: dict[str, Any] = {}
            for name, own in zip(("", "candidate_"), [outcome.best, *named[:1]], strict=False):
                if test:
                    with self.extracted(trained, own.configuration, parts.classes) as classifier:
                        scores = tested(classifier, parts.test)
                    found |= {f"{name}{key}": value for key, value in scores.items()}
                found |= {f"{name}parameters": own.num_parameters, f"{name}validation": own.value}
                found |= {f"{name}label": own.label}
        first = [trial.value for trial in outcome.generations[0]]
        return {
            **found,
            "seconds": seconds,
            "search_seconds": search_seconds,
            "first_generation_mean": sum(first) / len(first),
            "random_mean": mean,
            "epoch_losses": [round(float(own), 4) for own in means(trained.losses, design.epochs)],
            "diverged": False,
            "configuration": outcome.best.configuration,
        }

    def supernet(self, settings: Settings, parts: Splits, seed: int) -> tuple[Trained, float]:
        """Return a trained supernet, which is kept for other limits, and its training's seconds."""
        content = {**asdict(settings), "trials": None, "evolution": None, "seed": seed}
        name = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]
        start = time.perf_counter()
        check = check_loss(parts.classes)

        def check_later(epoch: int, loss: float) -> None:
            # Its head starts at zero and its rates warm up: the first epochs are about a guess.
            if epoch > 10:
                check(epoch, loss)

        trained = train_supernet(self.base, parts, settings, seed, self.folder / name, check_later)
        file = self.folder / name / "seconds.json"
        if not file.exists():
            file.write_text(json.dumps(time.perf_counter() - start), "utf-8")
        return trained, json.loads(file.read_text("utf-8"))

    def random_accuracy(self, trained: Trained, images: Images, seed: int) -> float:
        """Return the mean accuracy of random configurations of a supernet."""
        generator = numpy.random.default_rng(seed)
        found = []
        for _ in range(RANDOM):
            with trained.supernet.using(trained.supernet.space.sample(generator)):
                trained.supernet.merge()
                found.append(trained.classifier.accuracy(images))
        return sum(found) / len(found)

    @contextlib.contextmanager
    def extracted(self, trained: Trained, configuration: Any, classes: int) -> Iterator[Classifier]:
        """Put the adapter of a configuration on another model, for as long as the context lasts."""
        model = fuse(self.base)
        classifier = Classifier(model, classes, self.resolution)
        classifier.head.load_state_dict(trained.classifier.head.state_dict())
        adapter = Supernet.load(model, trained.folder / SUPERNET_FILE).extract(configuration)
        yield classifier
        adapter.detach()


def means(losses: list[float], parts: int) -> Any:
    """Return the mean losses of so many equal parts of a training."""
    return numpy.array(losses).reshape(parts, -1).mean(1)


def tested(classifier: Classifier, images: Labelled) -> dict[str, float]:
    """Return the accuracies on the test part, as it is and by each shift."""
    whole = images[torch.arange(len(images))]
    found = {"test": classifier.accuracy(whole)}
    for name, shift in SHIFTS.items():
        moved = Images(shift(whole.pixels), whole.labels)
        found[f"test_{name}"] = classifier.accuracy(moved)
    return found


def load(
    *,
    train: int,
    validation: int,
    test: int,
    resolution: int,
    trials: int,
    folder: Path,
    **training: Any,
) -> Digits:
    """Return the task; the model and the digits are fetched once."""
    cache = cache_folder()
    base = load_onnx(fetch(VIT, cache))
    fused = fuse(base)
    digits = read_digits(fetch(MNIST, cache))

    @functools.cache
    def parts(seed: int) -> Splits:
        return drawn(digits, (train, validation, test), seed)

    return Digits(
        *(lambda classes: Classifier(fused, classes, resolution), parts, TARGETS),
        **training,
        base=base,
        resolution=resolution,
        trials=trials,
        folder=folder / "supernets" / code_digest(Path(superlora.__file__).parent.rglob("*.py")),
    )
