"""What the GLoRA experiment measures: its settings, its methods, and one folder a point."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

import superlora as sl
import superlora.torch as slt
from superlora.checks import check_count
from superlora.demo.data import Splits
from superlora.demo.search import find, keep
from superlora.demo.supernet import (
    TARGETS,
    Settings,
    Trained,
    digest,
    fuse,
    new_supernet,
    train_supernet,
)
from superlora.demo.train import Classifier, fit
from superlora.demo.vit import VisionTransformer
from superlora.search import Evolution, Space
from superlora.search.options import KINDS

FORMAT = 5  # raised whenever the code changes what a point would come out as
Row = dict[str, Any]
HEAD = "head only"


@dataclass(frozen=True)
class Method:
    """A baseline: what is attached to the linear layers, and its learning rate."""

    name: str
    design: Any  # a Spec, or one for each operation; None for the head alone
    rate: float  # of the head, where it is alone
    long: bool = False  # as many steps as a supernet


@dataclass(frozen=True)
class Setup:
    """The sizes of one form of the experiment."""

    digits: tuple[int, int, int]  # in the three parts
    resolution: int
    epochs: int  # of the baselines
    supernet_epochs: int
    batch_size: int
    head_rate: float
    supernets: Mapping[str, Settings]  # by what the table calls the space
    limits: tuple[int, ...]
    seeds: tuple[int, ...]
    trials: int
    evolution: Evolution
    methods: tuple[Method, ...]

    def settings(self, name: str) -> Settings:
        """Return the settings of one space."""
        return dataclasses.replace(
            self.supernets[name],
            digits=self.digits,
            resolution=self.resolution,
            epochs=self.supernet_epochs,
            batch_size=self.batch_size,
            head_rate=self.head_rate,
            trials=self.trials,
            evolution=self.evolution,
        )

    def steps(self, epochs: int) -> int:
        """Return the optimiser steps of so many epochs."""
        return epochs * -(-self.digits[0] // self.batch_size)


def methods(layers: int, width: int) -> tuple[Method, ...]:
    """Return the baselines, for so many square pieces of the weights in FacT's stack.

    The rates were chosen on the validation images of the quick form's first seed, among a few.
    """
    stack = (layers, width, width)  # a wide or tall weight is several pieces, by rows
    return (
        Method(HEAD, None, 1e-2),
        Method("BitFit", sl.bitfit(), 2e-3),
        Method("SSF", sl.ssf(), 2e-3),
        Method("FacT-TT r16", sl.fact_tt(rank=16, fold=stack), 2e-3),
        Method("LoRA r2", sl.lora(rank=2), 3e-3),
        Method("LoRA r4", sl.lora(rank=4), 3e-3),
        Method("LoRA r4, a supernet's steps", sl.lora(rank=4), 3e-3, long=True),
        Method("RepAdapter r4", sl.repadapter(rank=4), 3e-3),
        Method("GLoRA r4 everywhere, no search", sl.glora(rank=4), 1.5e-3),
        Method("dense", sl.dense(), 3e-5),
    )


RESTRICTED = "{4, 2}, B of ranks or none"


def supernets(*names: str) -> dict[str, Settings]:
    """Return the spaces by name; but for the last, the operations have all their options.

    The rates were chosen as those of the methods, by random configurations.
    """
    # A vector or a constant of B moves whole rows at once: B's rate must be small where they are.
    free = dict(zip(KINDS, (3e-3, 1e-5, 3e-4, 3e-3, 3e-3), strict=True))
    restricted = {**free, "add_weight": 1e-3}
    every = {
        "{2}": Settings(ranks=(2,), rates=free, every_option=True),
        "{4, 2}": Settings(ranks=(4, 2), rates=free, every_option=True),
        "{8, 4}": Settings(ranks=(8, 4), rates=free, every_option=True),
        RESTRICTED: Settings(ranks=(4, 2), rates=restricted),
    }
    return {name: every[name] for name in names}


FULL = Setup(
    digits=(400, 200, 1500),
    resolution=42,
    epochs=8,
    batch_size=32,
    head_rate=5e-3,
    supernet_epochs=30,
    supernets=supernets("{2}", "{4, 2}", "{8, 4}", RESTRICTED),
    limits=(150_000, 300_000),  # those of LoRA of rank 2 and 4, about
    seeds=(0, 1, 2),
    trials=40,
    evolution=Evolution(population=10, parents=4, mutations=5, crossovers=5),
    methods=methods(144, 384),
)
QUICK = dataclasses.replace(
    FULL,
    digits=(200, 100, 500),
    resolution=28,
    epochs=4,
    supernet_epochs=12,
    supernets=supernets("{4, 2}", RESTRICTED),
    limits=(300_000,),
    seeds=(0, 1),
    trials=30,
    evolution=Evolution(population=10, parents=4, mutations=5, crossovers=5),
)


@dataclass(frozen=True)
class Lab:
    """What all points share: the model, the images of a seed, and where points are kept."""

    base: VisionTransformer
    images: Callable[[int], Splits]
    setup: Setup
    folder: Path
    surroundings: Mapping[str, Any]
    say: Callable[[str], None] = print

    def point(self, content: Mapping[str, Any], measure: Callable[[Path], Row]) -> Row:
        """Return a point that an earlier run measured, or measure it, in a folder of its own."""
        whole = {"format": FORMAT, **self.surroundings, **content}
        text = json.dumps(whole, sort_keys=True, default=_plain)
        folder = self.folder / hashlib.sha256(text.encode()).hexdigest()[:20]
        file = folder / "point.json"
        try:
            found: Row = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError):
            folder.mkdir(parents=True, exist_ok=True)
            found = measure(folder)
            partial = folder / "point.json.partial"
            partial.write_text(json.dumps(found) + "\n", "utf-8")
            os.replace(partial, file)
        return found


def _plain(value: Any) -> Any:
    return value.to_dict() if hasattr(value, "to_dict") else dataclasses.asdict(value)


def baseline(lab: Lab, method: Method, seed: int) -> Row:
    """Train a method of fixed form, or find it measured."""
    setup, images = lab.setup, lab.images(seed)
    training = {
        "epochs": setup.supernet_epochs if method.long else setup.epochs,
        "head_rate": method.rate if method.design is None else setup.head_rate,
        "batch_size": setup.batch_size,
        "seed": seed,
    }

    def measure(folder: Path) -> Row:
        model = fuse(lab.base)
        classifier = Classifier(model, images.classes, setup.resolution)
        factors, parameters = {}, 0
        if method.design is not None:
            adapter = slt.attach(model, method.design, targets=list(TARGETS), seed=seed)
            factors, parameters = {method.rate: list(adapter.parameters())}, adapter.num_parameters
        start = time.perf_counter()
        fit(classifier, classifier.head, factors, images.train, **training)
        seconds = time.perf_counter() - start
        return {
            "parameters": parameters,
            "validation": classifier.accuracy(images.validation),
            "test": classifier.accuracy(images.test),
            "seconds": seconds,
        }

    content = {
        "design": method.design,
        "training": training | {"rate": method.rate},
        "resolution": setup.resolution,
        "data": [digest(images), len(images.test)],
    }
    found = {"method": method.name, "seed": seed, "rate": method.rate}
    return {**found, **lab.point(content, measure)}


def supernet(lab: Lab, name: str, seed: int) -> tuple[Row, Trained]:
    """Train a supernet, or find it trained."""
    images, settings = lab.images(seed), lab.setup.settings(name)
    training = {**dataclasses.asdict(settings), "trials": None, "evolution": None}
    content = {"supernet": training, "seed": seed, "data": [digest(images), len(images.test)]}
    made: list[Trained] = []

    def measure(folder: Path) -> Row:
        start = time.perf_counter()
        made.append(train_supernet(lab.base, images, settings, seed, folder))
        return {"seconds": time.perf_counter() - start, "folder": folder.name}

    row = lab.point(content, measure)
    if not made:  # the folder has it
        made.append(train_supernet(lab.base, images, settings, seed, lab.folder / row["folder"]))
    return row, made[0]


def random_accuracy(lab: Lab, trained: Trained, seed: int, count: int) -> list[float]:
    """Return the validation accuracies of random configurations of a supernet."""
    validation = lab.images(seed).validation
    generator = numpy.random.default_rng(seed)
    found = []
    for _ in range(count):
        with trained.supernet.using(trained.supernet.space.sample(generator)):
            trained.supernet.merge()
            found.append(trained.classifier.accuracy(validation))
    return found


def searched(lab: Lab, name: str, limit: int, seed: int) -> Row:
    """Search a supernet within a limit, or find it searched."""
    images, settings = lab.images(seed), lab.setup.settings(name)
    of_supernet, trained = supernet(lab, name, seed)

    def measure(own: Path) -> Row:
        start = time.perf_counter()
        outcome = find(images, trained, settings, limit, storage=own / "study.db", seed=seed)
        seconds = time.perf_counter() - start
        best = outcome.best
        first = [trial.value for trial in outcome.generations[0]]
        return {
            "parameters": best.num_parameters,
            "validation": best.value,
            "test": keep(lab.base, images, trained, best.configuration, own),
            "seconds": of_supernet["seconds"],
            "search_seconds": seconds,
            "evaluated": len(outcome.trials),
            "first_generation_best": max(first),
            "first_generation_mean": statistics.fmean(first),
            "configuration": best.configuration,
        }

    content = {
        "searched": trained.folder.name,
        "limit": limit,
        "trials": settings.trials,
        "evolution": settings.evolution,
    }
    found = {"method": f"GLoRA {name}, at most {limit:,}", "seed": seed, "space": name}
    ranks = list(settings.ranks)
    return {**found, "ranks": ranks, "limit": limit, **lab.point(content, measure)}


def all_points(lab: Lab) -> list[Row]:
    """Measure everything, the cheap first; what an earlier run measured is found."""
    setup = lab.setup
    for limit in setup.limits:
        check_count("limit", limit)
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        lab.say(
            f"seed {row['seed']}  {row['method']:40} {row['parameters']:>12,} "
            f"{row['validation']:8.2%} {row['test']:8.2%} {row['seconds']:7.1f} s"
            + (f" + {row['search_seconds']:.1f} s" if "search_seconds" in row else "")
        )

    for seed in setup.seeds:
        for method in setup.methods:
            add(baseline(lab, method, seed))
        for name in setup.supernets:
            for limit in setup.limits:
                add(searched(lab, name, limit, seed))
    return rows


def summary(rows: Iterable[Row]) -> list[Row]:
    """Return one row a method: means, and standard deviations over the seeds."""
    by_method: dict[str, list[Row]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    found = []
    for method, own in by_method.items():
        line: Row = {"method": method, "seeds": len(own)}
        for field in ("parameters", "validation", "test", "seconds", "search_seconds"):
            values = [row[field] for row in own if field in row]
            if values:
                line[field] = statistics.fmean(values)
                line[f"{field}_std"] = statistics.stdev(values) if len(values) > 1 else None
        found.append(line)
    return found


def space(lab: Lab, name: str) -> Space:
    """Return a space on the lab's model."""
    return new_supernet(fuse(lab.base), lab.setup.supernets[name], 0).space
