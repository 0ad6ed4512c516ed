"""Read a folder of images in three parts: a folder for each class, or VTAB-1K's lists."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor

from superlora.demo.data import Images, Splits

LISTS = ("train800.txt", "val200.txt", "test.txt")  # of VTAB-1K: a line an image, path and class


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
    lists = [folder / name for name in LISTS]
    parts = [_read_list(file) for file in lists] if lists[0].exists() else _draw(folder, seed)
    if not all(parts):
        raise ValueError(f"{folder} must have images in all parts: got {[*map(len, parts)]}")
    twice = (parts[0].keys() & parts[1]) | ((parts[0] | parts[1]).keys() & parts[2])
    if twice:
        raise ValueError(f"{folder} must have each image in one part: got {min(twice)} in two")
    files = [ImageFiles(list(own), torch.tensor([*own.values()]), side) for own in parts]
    train, validation = (own[torch.arange(len(own))] for own in files[:2])
    classes = 1 + max(max(own.values()) for own in parts)
    return Splits(train, validation, files[2], classes, folder.resolve().name)


def _read_list(file: Path) -> dict[Path, int]:
    labels = {}
    for number, line in enumerate(file.read_text("utf-8").strip().splitlines(), start=1):
        name, _, label = line.strip().rpartition(" ")  # a name may have spaces
        path = file.parent / name
        if not (label.isascii() and label.isdigit() and path.is_file()) or ".." in path.parts:
            rule = "must be the path of an image in the folder and its class from 0"
            raise ValueError(f"{file}, line {number}, {rule}: got {line!r}")
        labels[path] = int(label)
    return labels


def _draw(folder: Path, seed: int) -> list[dict[Path, int]]:
    """Draw three fifths, a fifth and a fifth of the images of each class, which has a folder."""
    generator = numpy.random.default_rng(seed)
    parts: list[dict[Path, int]] = [{}, {}, {}]
    for label, own in enumerate(sorted(path for path in folder.iterdir() if path.is_dir())):
        images = sorted(path for path in own.iterdir() if path.is_file())
        for place, chosen in enumerate(generator.permutation(len(images)).tolist()):
            parts[max(0, 5 * place // len(images) - 2)][images[chosen]] = label
    return parts


def _read_image(path: Path, side: int) -> Tensor:
    try:
        with Image.open(path) as image:
            square = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    except OSError as error:
        raise ValueError(f"{path} must be an image: {error}") from None
    return torch.from_numpy(numpy.array(square)).permute(2, 0, 1)
