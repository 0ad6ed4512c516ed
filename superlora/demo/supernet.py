"""Train a supernet with its head, or find the one that an earlier run trained."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import superlora
from superlora.demo.data import Splits
from superlora.demo.train import Classifier, fit
from superlora.demo.vit import VisionTransformer
from superlora.search.evolution import Evolution
from superlora.search.options import KINDS, Option, checked_operations
from superlora.search.settings import differences
from superlora.search.supernet import Supernet
from superlora.torch.files.safetensors_file import write_tensors

TARGETS = ("qkv", "proj", "fc1", "fc2")  # a block's linear layers, as GLoRA's authors adapt them
RATES = {**dict.fromkeys(KINDS, 3e-3), "add_weight": 1e-3, "weight_to_bias": 3e-4}
SUPERNET_FILE = "supernet.safetensors"
HEAD_FILE = "supernet-head.safetensors"
RECORD_FILE = "supernet.json"


@dataclass(frozen=True)
class Settings:
    """How a supernet is trained and searched; the defaults are for the digits."""

    digits: tuple[int, int, int] = (1000, 300, 1500)  # in the three parts
    resolution: int = 42  # side of an image, in pixels
    ranks: tuple[int, ...] = (8, 4)
    every_option: bool = False  # whether B may be a vector or a constant, which needs a small rate
    epochs: int = 12
    batch_size: int = 32
    rates: Mapping[str, float] = field(default_factory=RATES.copy)
    head_rate: float = 5e-3
    weight_decay: float = 0.0
    trials: int = 300
    evolution: Evolution = Evolution()  # noqa: RUF009  (it cannot be changed)

    def operations(self) -> dict[str, tuple[Option, ...]]:
        """Return the options of each operation, as `superlora.search.Space` takes them."""
        every = checked_operations(None, self.ranks)
        return every if self.every_option else {**every, "add_weight": (*self.ranks, "none")}


QUICK = Settings(
    digits=(300, 100, 500), resolution=28, trials=40, evolution=Evolution(20, 5, 10, 10)
)


@dataclass(frozen=True)
class Trained:
    """A supernet on the model of a classifier, with the loss of every step of training."""

    classifier: Classifier
    supernet: Supernet
    losses: list[float]
    folder: Path

    @property
    def digest(self) -> str:
        """A hash of the supernet's file and its head's."""
        content = [(self.folder / name).read_bytes() for name in (SUPERNET_FILE, HEAD_FILE)]
        return hashlib.sha256(b"".join(content)).hexdigest()


def fuse(base: VisionTransformer) -> VisionTransformer:
    """Return a frozen copy with query, key and value of a block in one layer."""
    weights = base.state_dict()
    for index in range(len(base.blocks)):
        for kind in ("weight", "bias"):
            names = [f"blocks.{index}.{layer}.{kind}" for layer in ("query", "key", "value")]
            joined = torch.cat([weights.pop(name) for name in names])
            weights[f"blocks.{index}.qkv.{kind}"] = joined
    model = VisionTransformer(*base.sizes, fused=True).to(base.class_token)
    model.load_state_dict(weights)
    return model.requires_grad_(False).eval()


def new_supernet(model: VisionTransformer, settings: Settings, seed: int) -> Supernet:
    """Put a supernet that is not trained on a model with one layer for query, key and value."""
    return Supernet(
        model, list(TARGETS), settings.ranks, operations=settings.operations(), seed=seed
    )


def train_supernet(
    base: VisionTransformer,
    images: Splits,
    settings: Settings,
    seed: int,
    folder: Path,
    after_epoch: Callable[[int, float], object] = lambda epoch, loss: None,
) -> Trained:
    """Train a supernet under random configurations, and keep it in a folder, or find it there."""
    record = _record(images, settings, seed)
    if (folder / RECORD_FILE).exists():
        return load_supernet(base, images, settings, seed, folder)
    classifier = Classifier(fuse(base), images.classes, settings.resolution)
    supernet = new_supernet(classifier.model, settings, seed)
    factors: dict[float, list[nn.Parameter]] = {}
    for layer in supernet.layers():
        for operation, stored in supernet.stored(layer).items():
            factors.setdefault(settings.rates[operation], []).extend(stored)
    losses = fit(
        classifier,
        classifier.head,
        factors,
        images.train,
        settings.epochs,
        settings.head_rate,
        batch_size=settings.batch_size,
        seed=seed,
        weight_decay=settings.weight_decay,
        before_step=supernet.draw,
        after_epoch=after_epoch,
    )
    supernet.use(None)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / HEAD_FILE, dict(classifier.head.state_dict()))
    supernet.save(folder / SUPERNET_FILE)
    # The record last: where it is, all is.
    (folder / RECORD_FILE).write_text(json.dumps({**record, "losses": losses}), "utf-8")
    return Trained(classifier, supernet, losses, folder)


def load_supernet(
    base: VisionTransformer, images: Splits, settings: Settings, seed: int, folder: Path
) -> Trained:
    """Load what `train_supernet` kept; it must have been trained with the same settings."""
    found = json.loads((folder / RECORD_FILE).read_text("utf-8"))
    other = differences(found, _record(images, settings, seed))
    if other:
        raise ValueError(
            f"{folder} must have a supernet of the same images and settings, or none: got one with "
            f"{', '.join(other)}"
        )
    classifier = Classifier(fuse(base), images.classes, settings.resolution)
    classifier.head.load_state_dict(load_file(folder / HEAD_FILE))
    supernet = Supernet.load(classifier.model, folder / SUPERNET_FILE)
    return Trained(classifier, supernet, found["losses"], folder)


def digest(images: Splits) -> str:
    """Return a hash of what training and searching read."""
    state = hashlib.sha256(str(images.classes).encode())
    for part in (images.train, images.validation):
        for tensor in (part.pixels, part.labels):
            state.update(f"{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return state.hexdigest()


def _record(images: Splits, settings: Settings, seed: int) -> dict[str, Any]:
    """Return all that a trained supernet depends on, as JSON values."""
    own = dataclasses.asdict(settings)
    del own["trials"], own["evolution"]
    found = {"superlora": superlora.__version__, "seed": seed, "data": digest(images), **own}
    values: dict[str, Any] = json.loads(json.dumps(found))
    return values
