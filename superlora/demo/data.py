"""MNIST digits as a vision transformer wants them, split once for all methods."""

from __future__ import annotations

import gzip
import hashlib
import io
from dataclasses import dataclass
from typing import Protocol

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = 10
SIDE = 28  # pixels a side of a digit
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Images:
    """Labelled images, kept as bytes until `prepare` is called on a batch.

    Parameters
    ----------
    pixels : Tensor, shape (n, 28, 28) or (n, 3, height, width), dtype uint8
        Grey values, or colours.
    labels : Tensor, shape (n,), dtype int64
        Classes from 0.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> Images:
        return Images(self.pixels[index], self.labels[index])


class Labelled(Protocol):
    """Labelled images that need not be in memory, read when they are indexed."""

    @property
    def labels(self) -> Tensor:
        """Classes from 0, shape (n,)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor) -> Images: ...


@dataclass(frozen=True)
class Splits:
    """Training, validation and test images, with no image in two of them."""

    train: Images
    validation: Images
    test: Images

    def digest(self) -> str:
        """Return a hash of every pixel and label, by part: what a result depends on."""
        state = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            state.update(len(part).to_bytes(8, "little"))
            state.update(part.pixels.numpy().tobytes())
            state.update(part.labels.numpy().tobytes())
        return state.hexdigest()


def read_digits(data: bytes) -> Images:
    """Read a gzip-compressed CSV with 784 grey values and the label in each row.

    Parameters
    ----------
    data : bytes
        The compressed file.

    Returns
    -------
    Images
        All rows, in the file's order.

    Raises
    ------
    ValueError
        If a row has another number of values.
    """
    table = numpy.loadtxt(io.BytesIO(gzip.decompress(data)), delimiter=",", ndmin=2)
    if table.shape[1] != SIDE * SIDE + 1:
        raise ValueError(
            f"data: a row must have {SIDE * SIDE} grey values and a label, got {table.shape[1]}"
        )
    pixels = table[:, :-1].astype(numpy.uint8).reshape(-1, SIDE, SIDE)
    return Images(torch.from_numpy(pixels), torch.from_numpy(table[:, -1].astype(numpy.int64)))


def split(images: Images, *, train: int, validation: int, test: int, seed: int) -> Splits:
    """Draw three disjoint parts with as many images of every class in each.

    Parameters
    ----------
    images : Images
        What to draw from.
    train, validation, test : int
        Images in each part; multiples of 10.
    seed : int
        Decides which images, and their order.

    Returns
    -------
    Splits
        The parts, each in a random order.

    Raises
    ------
    ValueError
        If a size is no positive multiple of 10, or a class has too few images.
    """
    sizes = {"train": train, "validation": validation, "test": test}
    for name, size in sizes.items():
        if size < CLASSES or size % CLASSES:
            raise ValueError(f"{name} must be a positive multiple of {CLASSES}, got {size}")
    random = numpy.random.default_rng(seed)
    labels = images.labels.numpy()
    parts: dict[str, list[numpy.ndarray]] = {name: [] for name in sizes}
    for label in range(CLASSES):
        found = random.permutation(numpy.flatnonzero(labels == label))
        needed = sum(sizes.values()) // CLASSES
        if len(found) < needed:
            raise ValueError(
                f"train + validation + test needs {needed} images of each class, "
                f"class {label} has {len(found)}"
            )
        start = 0
        for name, size in sizes.items():
            parts[name].append(found[start : start + size // CLASSES])
            start += size // CLASSES
    drawn = {
        name: images[torch.from_numpy(random.permutation(numpy.concatenate(chosen)))]
        for name, chosen in parts.items()
    }
    return Splits(**drawn)


def prepare(pixels: Tensor, resolution: int) -> Tensor:
    """Turn images into the transformer's input.

    Parameters
    ----------
    pixels : Tensor, shape (n, 28, 28) or (n, 3, height, width), dtype uint8
        Grey values, or colours.
    resolution : int
        Side of the result in pixels; bilinear interpolation.

    Returns
    -------
    Tensor, shape (n, 3, resolution, resolution), dtype float32
        Normalised as ImageNet's; three equal channels of grey values.
    """
    shown = (pixels.unsqueeze(1) if pixels.ndim == 3 else pixels).float() / 255
    size = (resolution, resolution)
    if shown.shape[-2:] != size:
        shown = F.interpolate(shown, size=size, mode="bilinear", align_corners=False)
    mean = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)
    return (shown - mean) / std
