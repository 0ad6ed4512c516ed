"""What the demo measures: its settings, its points, and a cache with one folder a point."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from superlora import Spec, maps, presets

FORMAT = 1
"""Raised whenever the code changes what a point would come out as."""


@dataclass(frozen=True)
class Settings:
    """What all points of a run share.

    Parameters
    ----------
    train, validation, test : int
        Images in each part.
    resolution : int
        Side of an image, in pixels.
    epochs : int
        Passes over the training images, for every point with an adapter.
    batch_size : int
        Images a step.
    head_rate : float
        Learning rate of the linear head beside an adapter.
    head_only_epochs, head_only_rate : int, float
        The same where the head alone is trained; its features are computed once.
    seed : int
        Of the split, the order of the images and the adapters' start.
    """

    train: int = 1000
    validation: int = 500
    test: int = 1500
    resolution: int = 84
    epochs: int = 4
    batch_size: int = 32
    head_rate: float = 1e-3
    head_only_epochs: int = 60
    head_only_rate: float = 3e-3
    seed: int = 0


FULL = Settings()
QUICK = Settings(train=500, validation=200, test=800, resolution=56)


@dataclass(frozen=True)
class Point:
    """One row of the table.

    Parameters
    ----------
    family : str
        The method, without its rank.
    rank : int or None
        None where there is none to choose.
    spec : Spec or None
        The adapter of the query and value weights; None trains the head alone.
    rate : float
        Learning rate of the adapter, chosen on the validation part.
    """

    family: str
    rank: int | None
    spec: Spec | None
    rate: float

    @property
    def method(self) -> str:
        """Name of the row."""
        return self.family if self.rank is None else f"{self.family} r{self.rank}"


HEAD = "head only"
DENSE = "dense"
LORA = "LoRA"
PLANAR = "SuperLoRA 2-D, one group"
FASTFOOD = "2-D + fastfood, one group"
ONE_HOT = "2-D + one-hot, one group"
SEPARABLE = "2-D + separable, one group"
LORTA = "LoRTA 3-D, one group"


RATES = {
    LORA: 5e-3,
    PLANAR: 1e-2,
    FASTFOOD: 2e-2,
    ONE_HOT: 2e-2,
    SEPARABLE: 2e-2,
    LORTA: 2e-2,
    DENSE: 5e-4,
}
"""Learning rates that none of the few others tried beat on the validation part (56 px, seed 0)."""


def suite(*, quick: bool) -> list[Point]:
    """Return the points of a run, in the order in which they are measured."""
    lora_ranks, planar_ranks, lorta_ranks = (
        ((1, 4), (1, 4), (8,)) if quick else ((1, 4), (1, 4, 8), (5, 8, 16))
    )
    specs: list[tuple[str, int | None, Spec]] = []
    specs += [(LORA, rank, presets.lora(rank=rank)) for rank in lora_ranks]
    specs += [
        (PLANAR, rank, Spec(rank=rank, order=2, groups=1, fold="balanced")) for rank in planar_ranks
    ]
    if not quick:
        projected = Spec(rank=8, order=2, groups=1, fold="balanced", ratio=0.1, map=maps.Fastfood())
        specs.append((FASTFOOD, 8, projected))
        specs.append((ONE_HOT, 8, projected.replace(map=maps.OneHot())))
        specs.append((SEPARABLE, 8, projected.replace(map=maps.Separable())))
    specs += [(LORTA, rank, presets.lorta(rank=rank, order=3, groups=1)) for rank in lorta_ranks]
    if not quick:
        specs.append((DENSE, None, presets.dense()))
    head = Point(HEAD, None, None, 0.0)
    return [head, *(Point(family, rank, spec, RATES[family]) for family, rank, spec in specs)]


@dataclass(frozen=True)
class Result:
    """What was measured at a point.

    Parameters
    ----------
    method, family : str
        The row's name, with and without its rank.
    rank : int or None
        As in the point.
    parameters : int
        Trained numbers of the adapter; the head's are not counted, all points have them.
    rate : float
        Learning rate of the adapter.
    validation_accuracy, test_accuracy : float
        Shares of images classified right.
    test_correct : int
        The same, as a number of images.
    seconds : float
        Wall time of the training alone, when it was done.
    file_bytes : int
        Size of the adapter's file; 0 without an adapter.
    key : str
        Name of the point's folder in the cache.
    cached : bool
        Whether this run found the point there.
    """

    method: str
    family: str
    rank: int | None
    parameters: int
    rate: float
    validation_accuracy: float
    test_accuracy: float
    test_correct: int
    seconds: float
    file_bytes: int
    key: str
    cached: bool = False


def key_of(point: Point, settings: Settings, surroundings: Mapping[str, Any]) -> str:
    """Return a hash of everything that determines a point.

    Parameters
    ----------
    point : Point
        The method.
    settings : Settings
        What all points share.
    surroundings : mapping
        The rest, as JSON values: digests of model and data, versions, threads.

    Returns
    -------
    str
        20 hexadecimal digits.
    """
    content = {
        "format": FORMAT,
        "spec": None if point.spec is None else point.spec.to_dict(),
        "rate": point.rate,
        "settings": dataclasses.asdict(settings),
        "surroundings": dict(surroundings),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


Train = Callable[[Point, str, Path], Result]
"""Measures the point with this key and leaves its files in this folder."""


@dataclass(frozen=True)
class Cache:
    """Measured points: one folder each, with ``point.json`` and the trained files.

    Parameters
    ----------
    directory : Path
        Made at the first point.
    """

    directory: Path

    def folder(self, key: str) -> Path:
        """Where the files of a point are, if it was measured."""
        return self.directory / key

    def find(self, key: str) -> Result | None:
        """Return the result with this key, or None where there is none that can be read."""
        try:
            values = json.loads((self.folder(key) / "point.json").read_text("utf-8"))
            return Result(**{**values, "cached": True})
        except (OSError, ValueError, TypeError):
            return None

    def measure(self, point: Point, key: str, train: Train) -> Result:
        """Train a point, and keep it under `key` once all its files are written.

        Parameters
        ----------
        point : Point
            What to train.
        key : str
            From `key_of`.
        train : callable
            Given the point, the key and an empty folder.

        Returns
        -------
        Result
            What `train` returned.
        """
        # A folder is filled under another name, so that a killed run leaves no half point.
        partial = self.folder(f"{key}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        result = train(point, key, partial)
        (partial / "point.json").write_text(json.dumps(dataclasses.asdict(result)), "utf-8")
        shutil.rmtree(self.folder(key), ignore_errors=True)
        os.replace(partial, self.folder(key))
        return result


def measure_all(
    points: Iterable[Point],
    keys: Iterable[str],
    cache: Cache,
    train: Train,
    *,
    fresh: bool = False,
) -> Iterable[Result]:
    """Measure every point that isn't in the cache, one after the other.

    Parameters
    ----------
    points, keys : iterable
        As many keys as points.
    cache : Cache
        Read, and filled.
    train : callable
        As in `Cache.measure`.
    fresh : bool
        Measure the cached ones too.

    Yields
    ------
    Result
        In the order of `points`, each as soon as it is there.
    """
    for point, key in zip(points, keys, strict=True):
        found = None if fresh else cache.find(key)
        yield found if found is not None else cache.measure(point, key, train)
