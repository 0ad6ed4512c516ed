"""VTAB-1K as published for fine-tuning: a folder a task, with images and lists of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy
import torch
from torch import Tensor

from superlora.demo.data import Images

LISTS = {
    "train": "train800.txt",
    "validation": "val200.txt",
    "both": "train800val200.txt",
    "test": "test.txt",
}
"""The files of a task's folder that list its parts, a line an image: its path and its class."""


class DataError(ValueError):
    """A folder can't be read; the message is one line that names the file and the line."""


@dataclass(frozen=True)
class ImageFiles:
    """Labelled images in files, decoded when they are indexed.

    Parameters
    ----------
    paths : tuple of Path
        One an image.
    labels : Tensor, shape (n,), dtype int64
        Classes from 0.
    side : int
        Pixels a side, to which images of any shape are resized.
    """

    paths: tuple[Path, ...]
    labels: Tensor
    side: int

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Tensor) -> Images:
        places = index.tolist()
        pixels = torch.empty(len(places), 3, self.side, self.side, dtype=torch.uint8)
        for row, place in enumerate(places):
            pixels[row] = read_image(self.paths[place], self.side)
        return Images(pixels, self.labels[index])

    def read(self) -> Images:
        """Return all of them in memory.

        Returns
        -------
        Images
            In the list's order.
        """
        return self[torch.arange(len(self))]


@dataclass(frozen=True)
class Lists:
    """The parts of a task.

    Parameters
    ----------
    train, validation, both, test : ImageFiles
        As listed in `LISTS`; the second is to choose settings on, and `both` are the two.
    """

    train: ImageFiles
    validation: ImageFiles
    both: ImageFiles
    test: ImageFiles


def read_image(path: Path, side: int) -> Tensor:
    """Decode an image and resize it to a square, by bicubic interpolation.

    Parameters
    ----------
    path : Path
        A file of any format that Pillow reads.
    side : int
        In pixels.

    Returns
    -------
    Tensor, shape (3, side, side), dtype uint8
        Red, green and blue.

    Raises
    ------
    DataError
        If it is no image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            square = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise DataError(f"{path} must be an image: {error}") from None
    return torch.from_numpy(numpy.array(square)).permute(2, 0, 1)


def read_list(file: Path, classes: int, side: int) -> ImageFiles:
    """Read the list of a part.

    Parameters
    ----------
    file : Path
        Lines of an image's path, relative to the list's folder, and its class; empty lines are
        passed over.
    classes : int
        How many there are.
    side : int
        Pixels a side, to which the images will be resized.

    Returns
    -------
    ImageFiles
        In the list's order.

    Raises
    ------
    DataError
        If the list or an image isn't there, or a line isn't a path and a class.
    """
    try:
        lines = file.read_text("utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"{file} must be there: it lists a part of the task") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} must be a text file: {error}") from None
    paths, labels = [], []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            path, label = _read_line(line, classes, f"{file}, line {number}")
            if not (file.parent / path).is_file():
                raise DataError(
                    f"{file}, line {number}, must name an image of the folder: there is no {path}"
                )
            paths.append(file.parent / path)
            labels.append(label)
    if not paths:
        raise DataError(f"{file} must list at least one image: got none")
    return ImageFiles(tuple(paths), torch.tensor(labels), side)


def _read_line(line: str, classes: int, place: str) -> tuple[PurePosixPath, int]:
    words = line.rsplit(maxsplit=1)  # a path may have spaces
    if len(words) != 2:
        raise DataError(f"{place}, must be a path and a class: got {line.strip()!r}")
    path = PurePosixPath(words[0].strip())
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{place}, must name a path inside the folder: got {str(path)!r}")
    # Digits alone: int() also takes signs, underscores and other scripts' digits.
    label = int(words[1]) if words[1].isascii() and words[1].isdigit() else classes
    if label >= classes:
        raise DataError(f"{place}, must end with a class from 0 to {classes - 1}: got {words[1]!r}")
    return path, label


def read_lists(folder: Path, task: str, classes: int, side: int) -> Lists:
    """Read the lists of a task.

    Parameters
    ----------
    folder : Path
        With a folder for each task.
    task : str
        Its folder's name.
    classes : int
        How many the task has.
    side : int
        Pixels a side, to which the images will be resized.

    Returns
    -------
    Lists
        The parts; no image is decoded yet.

    Raises
    ------
    DataError
        If a file isn't there or isn't as it must be, or a list repeats an image of another.
    """
    own = folder / task
    if not own.is_dir():
        raise DataError(f"{folder} must have a folder {task!r} with the task's lists: it has none")
    parts = {part: read_list(own / name, classes, side) for part, name in LISTS.items()}
    for part in ("validation", "test"):
        earlier = parts["train"] if part == "validation" else parts["both"]
        repeated = sorted(set(earlier.paths) & set(parts[part].paths))
        if repeated:
            raise DataError(
                f"{own / LISTS[part]} must share no image with the training part: got {repeated[0]}"
            )
    return Lists(**parts)
