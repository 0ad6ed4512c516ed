"""Read a folder of images in three parts: a folder for each class, or VTAB-1K's lists."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

from superlora.demo.data import Images, Splits

LISTS = ("train800.txt", "val200.txt", "test.txt")
"""Of VTAB-1K: a line an image, its path in the folder, a space and its class from 0."""

Labels = dict[Path, int]


@dataclass(frozen=True)
class ImageFiles:
    """Labelled images in files, decoded and resized to squares when they are indexed."""

    paths: list[Path]
    labels: Tensor
    side: int

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Tensor) -> Images:
        pixels = [_read_image(self.paths[place], self.side) for place in index.tolist()]
        return Images(torch.stack(pixels), self.labels[index])


def read_folder(folder: Path, side: int, seed: int) -> Splits:
    """Return the images of a folder; those of the test part are read when they are indexed."""
    if not folder.is_dir():
        raise ValueError(f"--data must be a folder of images: got {folder}")
    if (folder / LISTS[0]).exists():
        parts = [_read_list(folder / name) for name in LISTS]
    else:
        parts = _draw(folder, numpy.random.default_rng(seed))
    train, validation, test = parts
    twice = {*(train.keys() & validation), *((train | validation).keys() & test)}
    if twice:
        raise ValueError(f"{folder} must have each image in one part: got {min(twice)} in two")
    files = [ImageFiles(list(own), torch.tensor(list(own.values())), side) for own in parts]
    in_memory = [own[torch.arange(len(own))] for own in files[:2]]
    classes = 1 + max(max(own.values()) for own in parts)
    return Splits(in_memory[0], in_memory[1], files[2], classes, folder.resolve().name)


def _read_list(file: Path) -> Labels:
    found: Labels = {}
    for number, line in enumerate(file.read_text("utf-8").strip().splitlines(), start=1):
        name, _, label = line.strip().rpartition(" ")  # a name may have spaces
        path = file.parent / name
        if (
            not name
            or not label.isascii()
            or not label.isdecimal()
            or ".." in path.parts
            or not path.is_file()
        ):
            raise ValueError(
                f"{file}, line {number}, must be the path of an image in the folder and its class "
                f"from 0: got {line!r}"
            )
        found[path] = int(label)
    if not found:
        raise ValueError(f"{file} must list at least one image: got none")
    return found


def _draw(folder: Path, generator: numpy.random.Generator) -> list[Labels]:
    """Draw three fifths, a fifth and a fifth of the images of every class."""
    parts: list[Labels] = [{}, {}, {}]
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    if len(classes) < 2:
        raise ValueError(
            f"{folder} must have a folder for each of 2 classes or more: got {classes}"
        )
    for label, own in enumerate(classes):
        images = sorted(path for path in own.iterdir() if path.is_file())
        if len(images) < 5:
            raise ValueError(f"{own} must have at least 5 images: got {len(images)}")
        for place, chosen in enumerate(generator.permutation(len(images)).tolist()):
            parts[max(0, 5 * place // len(images) - 2)][images[chosen]] = label
    return parts


def _read_image(path: Path, side: int) -> Tensor:
    from PIL import Image

    try:
        with Image.open(path) as image:
            square = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    except OSError as error:
        raise ValueError(f"{path} must be an image: {error}") from None
    return torch.from_numpy(numpy.array(square)).permute(2, 0, 1)
