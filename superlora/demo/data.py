"""Labelled images in three parts, and the MNIST digits among them."""

from __future__ import annotations

import gzip
import io
from dataclasses import dataclass
from typing import Protocol

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Images:
    """Labelled images: pixels (n, 28, 28) or (n, 3, height, width) of uint8, labels (n,)."""

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
    test: Labelled
    classes: int = 10
    name: str = "digits"


def read_digits(data: bytes) -> Images:
    """Read a gzip-compressed CSV with 784 grey values and the label in each row."""
    table = numpy.loadtxt(io.BytesIO(gzip.decompress(data)), delimiter=",", ndmin=2)
    pixels = table[:, :-1].astype(numpy.uint8).reshape(-1, 28, 28)
    return Images(torch.from_numpy(pixels), torch.from_numpy(table[:, -1].astype(numpy.int64)))


def split(images: Images, *, train: int, validation: int, test: int, seed: int) -> Splits:
    """Draw three disjoint parts of the digits, with as many images of every class in each."""
    sizes = {"train": train, "validation": validation, "test": test}
    for name, size in sizes.items():
        if size < 10 or size % 10:
            raise ValueError(f"{name} must be a positive multiple of 10: got {size}")
    random = numpy.random.default_rng(seed)
    places = [numpy.flatnonzero(images.labels.numpy() == label) for label in range(10)]
    ends = numpy.cumsum([*sizes.values()]) // 10
    drawn = [numpy.split(random.permutation(own), ends) for own in places]
    *parts, _ = (numpy.concatenate(own) for own in zip(*drawn, strict=True))
    orders = [torch.from_numpy(random.permutation(own)) for own in parts]
    return Splits(images[orders[0]], images[orders[1]], images[orders[2]])


def prepare(pixels: Tensor, resolution: int) -> Tensor:
    """Return the transformer's input (n, 3, resolution, resolution), normalised as ImageNet's."""
    shown = (pixels.unsqueeze(1) if pixels.ndim == 3 else pixels).float() / 255
    if shown.shape[-2:] != (resolution, resolution):
        shown = F.interpolate(shown, resolution, mode="bilinear", align_corners=False)
    mean = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)
    return (shown - mean) / std
