"""Measure an experiment: each run is kept, so that what was interrupted goes on."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import math
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import superlora
from experiments import tasks
from experiments.digest import code_digest
from experiments.experiment import Experiment, Method, experiment

Row = dict[str, Any]

HERE = Path(__file__).parent
# What a run's outcome depends on; the readers and writers of files are not part of it.
SOURCES = ("algebra", "design", "maps", "presets", "torch", "operations.py", "plan.py", "random.py")
UNUSED = ("on_disk", "files", "interop")


def source_digest(task: str) -> str:
    """Return a digest of the code that a run depends on, without its comments and docstrings."""
    package = Path(superlora.__file__).parent
    files = [HERE / "tasks" / f"{task}.py"]
    for name in (*SOURCES, *tasks.module(task).SOURCES):
        own = HERE / name if (HERE / name).exists() else package / name
        found = [own] if own.is_file() else own.rglob("*.py")
        files += [
            file for file in sorted(found) if not set(UNUSED) & set(file.relative_to(own).parts)
        ]
    return code_digest(files)


@dataclass
class Lab:
    """An experiment's task, once it is needed, and the folder of the runs that are known."""

    experiment: Experiment
    folder: Path
    source: str
    _task: tasks.Task | None = None

    def run(self, method: Method, *, rate: float, scale: float, seed: int) -> Row:
        """Train a method once, or find it trained."""
        own = self.experiment
        design = method.design
        content = {
            "source": self.source,
            "task": own.task,
            "settings": dict(own.settings),
            "design": None if design is None else design.to_dict(),
            "rate": rate,
            "scale": scale,
            "seed": seed,
        }
        text = json.dumps(content, sort_keys=True)
        file = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
        if not file.exists():
            if self._task is None:
                self._task = tasks.load(own.task, own.settings)
            found = self._task.measure(design, rate=rate, scale=scale, seed=seed)
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}.partial")
            partial.write_text(json.dumps({**content, "found": found}, indent=1) + "\n", "utf-8")
            os.replace(partial, file)
        return {
            "method": method.name,
            "family": method.family,
            "rate": rate,
            "scale": scale,
            "seed": seed,
            "source": self.source,
            **json.loads(file.read_text("utf-8"))["found"],
        }


def searched(lab: Lab, method: Method) -> Iterator[Row]:
    """Search a method's rate with the first seed, and measure the best with all seeds.

    The study needs no storage: its sampler is seeded and its trials' runs are kept, so that it
    comes to the same trials when it is made again.
    """
    import optuna

    own = lab.experiment
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.GPSampler(
            seed=0, n_startup_trials=0, deterministic_objective=True
        )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for trial in first_trials(own):
        study.enqueue_trial(trial)
    best: Row | None = None
    for _ in range(own.trials):
        trial = study.ask()
        rate = trial.suggest_float("rate", *own.rates, log=True)
        scale = trial.suggest_float("scale", *own.scales, log=True) if own.scales else 1.0
        row = lab.run(method, rate=rate, scale=scale, seed=own.seeds[0])
        study.tell(trial, row["validation"])
        yield {**row, "chosen": False}
        # Of equal ones the least rate, which moves least from what was pre-trained.
        if best is None or (row["validation"], -row["rate"]) > (best["validation"], -best["rate"]):
            best = row
    assert best is not None
    for seed in own.seeds:
        row = lab.run(method, rate=best["rate"], scale=best["scale"], seed=seed)
        yield {**row, "chosen": True}


def first_trials(own: Experiment) -> list[dict[str, float]]:
    """Return the trials that are spread evenly over the logarithms of the ranges."""
    found = []
    for place in range(own.even):
        trial = {"rate": _between(own.rates, (place + 0.5) / own.even)}
        if own.scales:
            # The second coordinate of a Kronecker lattice: no two trials share a scale.
            golden = (math.sqrt(5) - 1) / 2
            trial["scale"] = _between(own.scales, (0.5 + place * golden) % 1)
        found.append(trial)
    return found


def _between(limits: tuple[float, float], share: float) -> float:
    """Return the point at a share of a range, in logarithms."""
    low, high = (math.log(limit) for limit in limits)
    return math.exp(low + share * (high - low))


def _study(name: str, method: Method, folder: Path, source: str) -> list[Row]:
    """Measure one method in a process of its own, which keeps the task for its next one."""
    import torch

    torch.set_num_threads(1)
    if name not in _LABS:
        _LABS[name] = Lab(experiment(name), folder, source)
    return list(searched(_LABS[name], method))


_LABS: dict[str, Lab] = {}


def measure(
    name: str,
    folder: Path,
    *,
    processes: int,
    only: str = "",
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Measure an experiment's methods, several at a time, and return the rows of all runs."""
    own = experiment(name)
    source = source_digest(own.task)
    methods = [method for method in own.methods if only.lower() in method.name.lower()]
    if not methods:
        known = [method.name for method in own.methods]
        raise ValueError(f"only must be a part of one of {known}: got {only!r}")
    found: dict[str, list[Row]] = {}
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        waiting = {pool.submit(_study, name, method, folder, source): method for method in methods}
        try:
            for done in concurrent.futures.as_completed(waiting):
                method = waiting[done]
                found[method.name] = rows = done.result()
                last = [row for row in rows if row["chosen"]]
                mean = sum(row["test"] for row in last) / len(last)
                say(
                    f"[{len(found)}/{len(methods)}] {method.name}: "
                    f"{last[0]['parameters']:,} parameters, rate {last[0]['rate']:.2g}, "
                    f"{own.metric} {mean:.4f}"
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [row for method in methods for row in found[method.name]]
