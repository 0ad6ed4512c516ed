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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from filelock import FileLock
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
from superlora.demo.train import WARM_UP, Classifier
from superlora.demo.vit import VisionTransformer, load_onnx
from superlora.search import Evolution, Supernet
from superlora.search.outcome import Candidate

SOURCES = (*CLASSIFICATION, "tasks/digits.py", "demo/search.py", "demo/supernet.py", "search")

TURN = 30.0  # degrees
NOISE = 64.0  # the standard deviation, of 255
# Of the rate that is searched. B's vectors and constants move whole rows at once.
SHARES = {
    **{"scale_weight": 1.0, "add_weight": 1 / 300, "weight_to_bias": 0.1},
    **{"scale_bias": 1.0, "add_bias": 1.0},
}
RANDOM = 5  # configurations of the first generation, which no search chose
PACKAGES = ("optuna", "scipy")


@dataclass(frozen=True)
class Searched:
    """A supernet of these ranks, and the best configuration of at most so many parameters."""

    ranks: tuple[int, ...]
    limit: int
    epochs: int

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
        settings = Settings(
            digits=(len(parts.train), len(parts.validation), len(parts.test)),
            resolution=self.resolution,
            ranks=design.ranks,
            every_option=True,
            epochs=design.epochs,
            batch_size=self.batch_size,
            rates={operation: share * rate for operation, share in SHARES.items()},
            head_rate=self.head_rate,
            trials=self.trials,
            evolution=Evolution(population=20, parents=6, mutations=10, crossovers=10),
        )
        trained, seconds = self.supernet(settings, parts, seed)
        if trained is None:
            guess = 1 / parts.classes
            scores = dict.fromkeys(("test", *(f"test_{name}" for name in SHIFTS)), guess)
            return {
                **{"parameters": design.limit, "validation": guess, **(scores if test else {})},
                **{"seconds": seconds, "searched": True, "diverged": True},
            }
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
        if test:
            drawn = [own for own in outcome.generations[0] if not own.label][:RANDOM]
            found["random_test"] = self.mean_accuracy(trained, drawn, parts.test)
        return {
            **found,
            "seconds": seconds,
            "search_seconds": search_seconds,
            "searched": True,
            "epoch_losses": [round(float(own), 4) for own in means(trained.losses, design.epochs)],
            "diverged": False,
            "configuration": outcome.best.configuration,
        }

    def supernet(
        self, settings: Settings, parts: Splits, seed: int
    ) -> tuple[Trained | None, float]:
        """Return a trained supernet, or None where it diverged, and its training's seconds.

        It is kept for other limits; a process that needs it meanwhile waits.
        """
        content = {**asdict(settings), "trials": None, "evolution": None, "seed": seed}
        content["torch"] = torch.__version__
        name = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        check = check_loss(parts.classes)

        def check_later(epoch: int, loss: float) -> None:
            # Its head starts at zero and its rates warm up: the first epochs are about a guess.
            if epoch > 2 and epoch > 2 * WARM_UP * settings.epochs:
                check(epoch, loss)

        with FileLock(folder / "lock"):
            record = folder / "training.json"
            kept = json.loads(record.read_text("utf-8")) if record.exists() else {}
            if kept.get("diverged"):
                return None, kept["seconds"]
            start = time.perf_counter()
            trained = None
            with contextlib.suppress(Diverged):
                trained = train_supernet(self.base, parts, settings, seed, folder, check_later)
            if not kept:
                seconds = time.perf_counter() - start
                kept = {"seconds": seconds, "diverged": trained is None}
                record.write_text(json.dumps(kept), "utf-8")
            return trained, kept["seconds"]

    def mean_accuracy(
        self, trained: Trained, candidates: Sequence[Candidate], images: Labelled
    ) -> float:
        """Return the mean accuracy of configurations of a supernet."""
        whole = images[torch.arange(len(images))]
        found = []
        for own in candidates:
            with trained.supernet.using(own.configuration):
                trained.supernet.merge()
                found.append(trained.classifier.accuracy(whole))
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

    code = code_digest(sorted(Path(superlora.__file__).parent.rglob("*.py")))
    return Digits(
        *(lambda classes: Classifier(fused, classes, resolution), parts, TARGETS),
        **training,
        base=base,
        resolution=resolution,
        trials=trials,
        folder=folder / "supernets" / code,
    )
