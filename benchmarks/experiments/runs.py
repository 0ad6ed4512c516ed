"""Measure an experiment: each run is kept, so that what was interrupted goes on."""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import superlora
from experiments import tasks
from experiments.digest import code_digest
from experiments.experiment import Experiment, Method, experiment

Row = dict[str, Any]

HERE = Path(__file__).parent
# What a run's outcome depends on; the readers and writers of files are not part of it.
SOURCES = (
    *("algebra", "design", "maps", "presets", "torch"),
    *("_backend.py", "operations.py", "plan.py", "random.py"),
)
BEYOND = 3  # rates that are tried at most beyond the ends
UNUSED = ("on_disk", "files", "interop")


def source_digest(task: str) -> str:
    """Return a digest of the code that a run depends on, without its comments and docstrings."""
    package = Path(superlora.__file__).parent
    files = [HERE / "tasks" / f"{task}.py"]
    for name in (*SOURCES, *tasks.module(task).SOURCES):
        own = HERE / name if (HERE / name).exists() else package / name
        found = sorted(own.rglob("*.py")) if own.is_dir() else [own]
        files += [file for file in found if not set(UNUSED) & set(file.relative_to(own).parts)]
    return code_digest(files)


@dataclass
class Lab:
    """An experiment's task, once it is needed, and the folder of the runs that are known."""

    experiment: Experiment
    folder: Path
    source: str

    def run(self, method: Method, *, rate: float, scale: float, seed: int, test: bool) -> Row:
        """Train a method once, or find it trained; the test part is read where it is asked for."""
        own = self.experiment
        design = method.design
        content = {
            **{"source": self.source, "releases": releases(own.task)},
            **{"task": own.task, "settings": dict(own.settings)},
            "design": None if design is None else design.to_dict(),
            **{"rate": rate, "scale": scale, "seed": seed, "test": test},
        }
        text = json.dumps(content, sort_keys=True)
        file = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
        if not file.exists():
            found = self.task.measure(design, rate=rate, scale=scale, seed=seed, test=test)
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}.partial")
            partial.write_text(json.dumps({**content, "found": found}, indent=1) + "\n", "utf-8")
            os.replace(partial, file)
        return {
            **{"method": method.name, "family": method.family},
            **{"rate": rate, "scale": scale, "seed": seed, "chosen": test, "source": self.source},
            **json.loads(file.read_text("utf-8"))["found"],
        }

    @functools.cached_property
    def task(self) -> tasks.Task:
        """The model and the data, which are not loaded where all runs are known."""
        return tasks.load(self.experiment.task, self.experiment.settings, self.folder)


def releases(task: str) -> dict[str, str]:
    """Return what a run depends on besides the code here, and the folders that a task reads."""
    names = ("torch", "numpy", *getattr(tasks.module(task), "PACKAGES", ()))
    found = {name: metadata.version(name) for name in names}
    folders = {name: own for name, own in os.environ.items() if name in tasks.FOLDERS}
    return {**found, "python": platform.python_version(), **folders}


def searched(lab: Lab, method: Method) -> list[Row]:
    """Choose a method's rate and scale by the validation part, then measure it with all seeds.

    Where the rate at an end is above all others, the next one beyond that end is tried too. The
    study needs no storage: its trials' runs are kept, and it comes to them again.
    """
    import optuna

    own = lab.experiment
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = {"rate": list(own.rates), "scale": list(own.scales)}
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.GridSampler(space, seed=0)
    )
    rows: list[Row] = []

    def validation(trial: Any) -> float:
        chosen = {key: trial.suggest_categorical(key, values) for key, values in space.items()}
        rows.append(lab.run(method, **chosen, seed=own.choice, test=False))
        return float(rows[-1]["validation"])

    study.optimize(validation, n_trials=own.trials)
    best = _best(rows)
    for _ in range(BEYOND):
        rate = beyond(sorted({row["rate"] for row in rows}), best["rate"])
        if rate is None or [row["validation"] for row in rows].count(best["validation"]) > 1:
            break
        rows.append(lab.run(method, rate=rate, scale=best["scale"], seed=own.choice, test=False))
        best = _best(rows)
    if own.confirm:
        finalists = sorted(rows, key=_goodness, reverse=True)[:2]
        means = []
        for row in finalists:
            setting = {key: row[key] for key in space}
            more = [lab.run(method, **setting, seed=seed, test=False) for seed in own.confirm]
            rows += more
            mean = sum(each["validation"] for each in (row, *more)) / (1 + len(more))
            means.append({**row, "validation": mean})
        best = _best(means)
    chosen = {key: best[key] for key in space}
    return [*rows, *(lab.run(method, **chosen, seed=seed, test=True) for seed in own.seeds)]


def _best(rows: list[Row]) -> Row:
    """Return the best trial; of equal ones that of the least rate, which moves least."""
    return max(rows, key=_goodness)


def _goodness(row: Row) -> tuple[float, float, float]:
    return row["validation"], -row["rate"], -row["scale"]


def beyond(rates: Sequence[float], best: float) -> float | None:
    """Return the rate beyond the end of a ladder that the best one is at, or None."""
    if len(rates) < 3 or best not in (rates[0], rates[-1]):
        return None
    # The steps go on in the turn that they have: .01, .03, .1, and then .3.
    if best == rates[-1]:
        return float(f"{rates[-2] * rates[-1] / rates[-3]:.2g}")
    return float(f"{rates[1] * rates[0] / rates[2]:.2g}")


def _study(job: tuple[str, Method, Path, str]) -> list[Row]:
    """Measure one method in a process of its own, which keeps the task for its next one."""
    import torch

    name, method, folder, source = job
    torch.set_num_threads(1)
    if name not in _LABS:
        _LABS[name] = Lab(experiment(name), folder, source)
    return searched(_LABS[name], method)


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
    jobs = [(name, method, folder, source) for method in methods]
    # Leaving the context ends the workers, whatever they do: a run that is kept is whole.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for rows in pool.imap_unordered(_study, jobs):
            found[rows[0]["method"]] = rows
            last = [row for row in rows if row["chosen"]]
            mean = sum(row["test"] for row in last) / len(last)
            say(
                f"[{len(found)}/{len(methods)}] {last[0]['method']}: "
                f"{last[0]['parameters']:,} parameters, rate {last[0]['rate']:.2g}, "
                f"{own.metric} {mean:.4f}"
            )
    return [row for method in methods for row in found[method.name]]
