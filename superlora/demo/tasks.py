"""`Task`: labelled images in three parts, whatever they were read from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from superlora.demo.data import CLASSES, Images, Labelled, read_digits, split
from superlora.demo.search_config import DIGITS, Config, SearchError
from superlora.demo.vtab import read_lists


@dataclass(frozen=True)
class Task:
    """What a supernet is trained, searched and tested on.

    Parameters
    ----------
    name : str
        For people and for the study's name.
    classes : int
        How many there are.
    resolution : int
        Side of an image, in pixels.
    train, validation : Images
        In memory, as they are read again and again.
    test : Labelled
        Read once.
    """

    name: str
    classes: int
    resolution: int
    train: Images
    validation: Images
    test: Labelled

    def digest(self) -> str:
        """Return a hash of what training and searching read."""
        state = hashlib.sha256(f"{self.classes} {self.resolution}".encode())
        for part in (self.train, self.validation):
            state.update(len(part).to_bytes(8, "little"))
            state.update(part.pixels.numpy().tobytes())
            state.update(part.labels.numpy().tobytes())
        return state.hexdigest()


def digits_task(file: bytes, config: Config, seed: int) -> Task:
    """Draw the parts from the digits.

    Parameters
    ----------
    file : bytes
        As `superlora.demo.data.read_digits` reads them.
    config : Config
        The sizes, and the resolution.
    seed : int
        Of the split.

    Returns
    -------
    Task
        With as many images of every class in each part.
    """
    sizes = config.digits
    parts = split(
        read_digits(file),
        train=sizes.train,
        validation=sizes.validation,
        test=sizes.test,
        seed=seed,
    )
    return Task(DIGITS, CLASSES, config.resolution, parts.train, parts.validation, parts.test)


def vtab_task(folder: Path, name: str, config: Config) -> Task:
    """Read a task of VTAB-1K.

    Parameters
    ----------
    folder : Path
        With a folder for each task.
    name : str
        One of the tasks of `config`.
    config : Config
        The tasks, and the resolution.

    Returns
    -------
    Task
        Trained on the list of 800 images and searched on that of 200.

    Raises
    ------
    ValueError
        If there is no such task, or its folder cannot be read.
    """
    lists = read_lists(folder, name, config.classes(name), config.resolution)
    return Task(
        name,
        config.classes(name),
        config.resolution,
        lists.train.read(),
        lists.validation.read(),
        lists.test,
    )


def load_task(
    config: Config, data: Path | None, name: str | None, digits: Callable[[], bytes], seed: int
) -> Task:
    """Read the images that a configuration names.

    Parameters
    ----------
    config : Config
        The configuration.
    data : Path, optional
        For VTAB-1K, the folder of the tasks' folders.
    name : str, optional
        For VTAB-1K, the task.
    digits : callable
        Returns the file of the digits; called for them alone.
    seed : int
        Of the digits' split.

    Returns
    -------
    Task
        The images.

    Raises
    ------
    SearchError
        If a folder or a task is missing, or is of no use.
    ValueError
        If there is no such task, or the images cannot be read.
    """
    if config.data == DIGITS:
        if data is not None or name is not None:
            raise SearchError("--data and --task are for vtab-1k: the digits are fetched")
        return digits_task(digits(), config, seed)
    if data is None or name is None:
        raise SearchError("--data FOLDER and --task NAME must be given for vtab-1k")
    return vtab_task(data, name, config)
