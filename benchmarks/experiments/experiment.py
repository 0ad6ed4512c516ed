"""An experiment as data: the task, the methods, the search that every method gets, the seeds."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Design = Any
"""A `superlora.Spec`, a `superlora.Supports`, or None for the head alone."""

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""Learning rates half a decade apart, from that of dense updates to that of the smallest."""

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Method:
    """A point of the comparison: the same family at other sizes is a curve."""

    family: str
    size: str  # what tells it from the others of its family, as "r4"; may be empty
    design: Design

    @property
    def name(self) -> str:
        return f"{self.family} {self.size}".strip()


def family(
    name: str, size: str, make: Callable[..., Design], /, **values: Iterable[Any]
) -> list[Method]:
    """Return a method for each combination of values, which the size is formatted with."""
    found = []
    for own in itertools.product(*values.values()):
        chosen = dict(zip(values, own, strict=True))
        found.append(Method(name, size.format(**chosen), make(**chosen)))
    return found


@dataclass(frozen=True)
class Experiment:
    """What is compared, on which task, with which search.

    Every method is trained with every rate and scale, and the seed of the choice; with rates
    beyond them where the best is at an end. Those that are best on the validation part are then
    measured with the seeds. Where there are seeds to confirm with, the two best are trained with
    these too, and the mean decides.
    """

    title: str
    task: str  # a module of tasks/
    settings: Mapping[str, Any]  # keyword arguments of its `load`
    methods: Sequence[Method]
    rates: tuple[float, ...] = RATES
    scales: tuple[float, ...] = (1.0,)  # of the update
    choice: int = 100  # the seed of the choice, which is none of the seeds
    confirm: tuple[int, ...] = ()  # more of its seeds, for the two best
    seeds: tuple[int, ...] = (0, 1, 2)
    metric: str = "test accuracy"  # of which more is better
    percent: bool = True  # how it is shown
    reference: str = "LoRA"  # the family that the others are compared with
    shown: tuple[str, ...] = ("LoRA",)  # families with a colour of their own

    def __post_init__(self) -> None:
        names = [method.name for method in self.methods]
        if len(set(names)) != len(names):
            raise ValueError(f"methods must have different names: got {names}")
        for seed in (self.choice, *self.confirm):
            if seed in self.seeds or [self.choice, *self.confirm].count(seed) > 1:
                raise ValueError(
                    f"choice and confirm must be different, and none of the seeds {self.seeds}: "
                    f"got {self.choice} and {self.confirm}"
                )

    @property
    def trials(self) -> int:
        """How many runs a method's choice has at first."""
        return len(self.rates) * len(self.scales)


def names() -> list[str]:
    """Return the names of all experiments."""
    return sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "__init__")


def experiment(name: str) -> Experiment:
    """Return an experiment by its name."""
    if name not in names():
        raise ValueError(f"experiment must be one of {names()}: got {name!r}")
    found: Experiment = importlib.import_module(f"experiments.configs.{name}").EXPERIMENT
    return found
