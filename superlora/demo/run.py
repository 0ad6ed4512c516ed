"""The demo from end to end: fetch, train or find, report, reload."""

from __future__ import annotations

import dataclasses
import functools
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

import superlora
from superlora.demo import report
from superlora.demo.data import Splits, read_digits, split
from superlora.demo.fetch import MNIST, VIT, Wheel, fetch, read_member
from superlora.demo.points import (
    FULL,
    QUICK,
    Cache,
    Point,
    Result,
    Settings,
    key_of,
    measure_all,
    suite,
)
from superlora.demo.train import ADAPTER_FILE, HEAD_FILE, Trainer, count_correct, reload
from superlora.demo.vit import load_onnx

WHEELS = (VIT, MNIST)


class NoPointError(Exception):
    """No point of the run has a name like the one asked for."""


class ReloadError(Exception):
    """The saved adapter doesn't give the accuracy that was measured before saving."""


def run(
    *,
    quick: bool,
    seed: int,
    cache: Path,
    output: Path,
    fresh: bool = False,
    threads: int | None = None,
    only: str = "",
    console: Console | None = None,
) -> list[Result]:
    """Run the demo.

    Parameters
    ----------
    quick : bool
        Fewer images, pixels and methods.
    seed : int
        Of the split, the order of the images and the adapters' start.
    cache : Path
        Folder of the wheels and the measured points.
    output : Path
        Folder of the results; made if it isn't there.
    fresh : bool
        Measure again what the cache has.
    threads : int, optional
        Of torch; by default torch decides.
    only : str
        A part of the names of the points to measure; all by default.
    console : Console, optional
        Where to show progress and the table.

    Returns
    -------
    list of Result
        One for each point.

    Raises
    ------
    NoPointError
        If no point's name has the part asked for.
    FetchError
        If model or data can't be had.
    ReloadError
        If a reloaded adapter has another accuracy than the trained one.
    """
    console = console or Console()
    points = [point for point in suite(quick=quick) if only.lower() in point.method.lower()]
    if not points:
        raise NoPointError(
            f"only must be a part of one of {[p.method for p in suite(quick=quick)]}: got {only!r}"
        )
    settings = dataclasses.replace(QUICK if quick else FULL, seed=seed)
    if threads is not None:
        torch.set_num_threads(threads)
    model_file, digits_file = (fetched(wheel, cache, console) for wheel in WHEELS)
    sizes = {name: getattr(settings, name) for name in ("train", "validation", "test")}
    splits = split(read_digits(digits_file), **sizes, seed=seed)
    surroundings = _surroundings(splits)
    keys = [key_of(point, settings, surroundings) for point in points]
    trainer = Trainer(load_onnx(model_file), splits, settings)
    points_cache = Cache(cache / "points")
    results = _measure(trainer, points, keys, points_cache, fresh, console)

    best = report.best_small(results)
    comparisons = report.reaches(results)
    console.print(report.table(results, settings, best))
    for comparison in comparisons:
        console.print(comparison.sentence(), highlight=False, soft_wrap=True)
    output.mkdir(parents=True, exist_ok=True)
    reloaded = None
    if best is not None:
        for name in (ADAPTER_FILE, HEAD_FILE):
            shutil.copyfile(points_cache.folder(best.key) / name, output / name)
        reloaded = _reload(model_file, output, splits, settings, console)
    report.write_csv(results, output / "results.csv")
    report.plot(results, settings, output / "accuracy.png")
    content = {
        "settings": dataclasses.asdict(settings),
        "surroundings": surroundings,
        "sources": [dataclasses.asdict(wheel) for wheel in WHEELS],
        "results": [dataclasses.asdict(item) for item in results],
        "best_small": None if best is None else best.method,
        "reaches": [item.to_dict() for item in comparisons],
        "reloaded_test_correct": reloaded,
    }
    report.write_json(content, output / "results.json")
    console.print(f"Results are in {output}", highlight=False, soft_wrap=True)
    if best is not None and reloaded != best.test_correct:
        raise ReloadError(
            f"{best.method} classified {best.test_correct} test images right before it was saved, "
            f"and {reloaded} after {output / ADAPTER_FILE} was loaded"
        )
    return results


def fetched(wheel: Wheel, cache: Path, console: Console | None = None) -> bytes:
    """Return the file of a wheel that the demo reads, fetched where the cache has it not.

    Parameters
    ----------
    wheel : Wheel
        Of the package index.
    cache : Path
        Folder of the wheels.
    console : Console, optional
        Where to show progress.

    Returns
    -------
    bytes
        The file.
    """
    console = console or Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bars:
        task = bars.add_task(f"fetching {wheel}", total=wheel.size)
        path = fetch(wheel, cache, progress=lambda done: bars.update(task, completed=done))
    console.print(f"{wheel.contents}: {wheel}, {wheel.licence}", highlight=False)
    return read_member(path, wheel.member)


def _measure(
    trainer: Trainer,
    points: list[Point],
    keys: list[str],
    cache: Cache,
    fresh: bool,
    console: Console,
) -> list[Result]:
    results = []
    with _point_bars(console, len(points)) as (bars, all_points, one_point):

        def train(point: Point, key: str, folder: Path) -> Result:
            bars.reset(one_point, description=point.method, total=trainer.steps(point))
            advance = functools.partial(bars.advance, one_point)
            return trainer.train(point, key, folder, advance)

        for result in measure_all(points, keys, cache, train, fresh=fresh):
            results.append(result)
            bars.advance(all_points)
            how = "from the cache" if result.cached else f"{result.seconds:.1f} s"
            console.print(f"  {result.method}: {result.test_accuracy:.2%}, {how}", highlight=False)
    return results


@contextmanager
def _point_bars(console: Console, points: int) -> Iterator[tuple[Progress, TaskID, TaskID]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bars:
        yield bars, bars.add_task("points", total=points), bars.add_task("", total=None)


def _surroundings(splits: Splits) -> dict[str, Any]:
    """Return what a point depends on besides its settings."""
    return {
        "model_sha256": VIT.sha256,
        "data_digest": splits.digest(),
        "superlora": superlora.__version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def _reload(
    model_file: bytes, folder: Path, splits: Splits, settings: Settings, console: Console
) -> int:
    """Load the written files onto a new model and count again."""
    model = load_onnx(model_file)
    head = reload(model, folder)
    with console.status("reloading the best small adapter into a new model"):
        correct = count_correct(model, head, splits.test, settings.resolution, lambda: None)
    console.print(
        f"{folder / ADAPTER_FILE} in a new model: {correct / len(splits.test):.2%}",
        highlight=False,
        soft_wrap=True,
    )
    return correct
