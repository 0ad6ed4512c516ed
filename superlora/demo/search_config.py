"""What a search is run on: a TOML file of the package, or one of the user's."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from superlora.checks import check_count
from superlora.search.evolution import Evolution
from superlora.search.options import KINDS, Option, check_known, checked_ranks

DIGITS, VTAB = "digits", "vtab-1k"
PACKAGED = (DIGITS, VTAB)
PATCH = 14  # pixels, the side of the transformer's


class SearchError(Exception):
    """A search can't be run; the message is one line."""


class ConfigError(ValueError):
    """A configuration file can't be used; the message is one line that names file and key."""


@dataclass(frozen=True)
class DigitSizes:
    """How many digits are in each part.

    Parameters
    ----------
    train, validation, test : int
        Multiples of 10.
    """

    train: int = 1000
    validation: int = 300
    test: int = 1500


@dataclass(frozen=True)
class SupernetSettings:
    """How a supernet is trained, its head with it.

    Parameters
    ----------
    ranks : sequence of int
        Of the space.
    epochs, batch_size : int
        Passes over the training images, and images a step.
    rate, head_rate : float
        Learning rates of the support tensors and of the head.
    weight_decay : float
        Of AdamW.
    rates : mapping of str to float
        Learning rates of the operations that have one of their own.
    options : mapping of str to sequence of str
        For some operations what they may be, in place of all that they can: of ``"rank"``, every
        rank, ``"vector"``, ``"constant"`` and ``"none"``. The others keep all.
    """

    ranks: tuple[int, ...] = (8, 4)
    epochs: int = 12
    batch_size: int = 32
    rate: float = 1e-4
    head_rate: float = 5e-3
    weight_decay: float = 0.0
    rates: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", checked_ranks(self.ranks))
        for name in ("epochs", "batch_size"):
            check_count(name, getattr(self, name))
        for name in ("rate", "head_rate", "weight_decay"):
            _check_number(name, getattr(self, name), positive=name != "weight_decay")
        for name in ("rates", "options"):
            _check_section(name, getattr(self, name))
        for operation, rate in self.rates.items():
            check_known("operations in rates", operation, KINDS)
            _check_number(f"rates.{operation}", rate, positive=True)
        for operation, kinds in self.options.items():
            check_known("operations in options", operation, KINDS)
            _check_kinds(f"options.{operation}", kinds, KINDS[operation])

    def operations(self) -> dict[str, tuple[Option, ...]] | None:
        """Return the operations of the space, as `superlora.search.Space` takes them.

        Returns
        -------
        dict of str to tuple of option, or None
            None for all of all.

        Examples
        --------
        >>> SupernetSettings(options={"add_weight": ["rank", "none"]}).operations()["add_weight"]
        (8, 4, 'none')
        """
        if not self.options:
            return None
        return {
            operation: tuple(
                option for kind in kinds for option in (self.ranks if kind == "rank" else (kind,))
            )
            for operation, kinds in {**KINDS, **self.options}.items()
        }


@dataclass(frozen=True)
class SearchSettings:
    """How much is searched.

    Parameters
    ----------
    trials : int
        Configurations to evaluate.
    population, parents, mutations, crossovers : int
        As in `superlora.search.Evolution`.
    """

    trials: int = 1000
    population: int = 50
    parents: int = 10
    mutations: int = 25
    crossovers: int = 25

    def __post_init__(self) -> None:
        check_count("trials", self.trials)
        self.evolution()  # refuses what does not fit

    def evolution(self) -> Evolution:
        """Return the operators' settings."""
        return Evolution(self.population, self.parents, self.mutations, self.crossovers)


@dataclass(frozen=True)
class Config:
    """All settings of a search.

    Parameters
    ----------
    data : {"digits", "vtab-1k"}
        Where the images come from.
    resolution : int
        Side of an image, in pixels.
    digits : DigitSizes
        For ``"digits"``.
    supernet : SupernetSettings
        The training.
    search : SearchSettings
        The search.
    tasks : mapping of str to mapping of str to int
        For ``"vtab-1k"``: by group, the tasks' folders with their numbers of classes.
    """

    data: str
    resolution: int = 56
    digits: DigitSizes = field(default_factory=DigitSizes)
    supernet: SupernetSettings = field(default_factory=SupernetSettings)
    search: SearchSettings = field(default_factory=SearchSettings)
    tasks: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.data not in PACKAGED:
            raise ValueError(f"data must be one of {list(PACKAGED)}: got {self.data!r}")
        if check_count("resolution", self.resolution, least=PATCH) % PATCH:
            raise ValueError(f"resolution must be a multiple of {PATCH}: got {self.resolution}")
        _check_section("tasks", self.tasks)
        for group, tasks in self.tasks.items():
            _check_section(f"tasks.{group}", tasks)
            for name, classes in tasks.items():
                check_count(f"tasks.{group}.{name}", classes, least=2)

    def classes(self, task: str) -> int:
        """Return the number of classes of a task.

        Parameters
        ----------
        task : str
            A folder's name.

        Returns
        -------
        int
            At least 2.

        Raises
        ------
        ValueError
            If there is no such task.

        Examples
        --------
        >>> load_config("vtab-1k").classes("svhn")
        10
        """
        known = {name: count for tasks in self.tasks.values() for name, count in tasks.items()}
        if task not in known:
            raise ValueError(f"task must be one of {list(known)}: got {task!r}")
        return known[task]


def load_config(name: str, *, quick: bool = False) -> Config:
    """Read a configuration file.

    Parameters
    ----------
    name : str
        One of the package's, ``"digits"`` or ``"vtab-1k"``, or the path of a TOML file.
    quick : bool
        Whether its section ``quick`` holds, over the others.

    Returns
    -------
    Config
        Checked.

    Raises
    ------
    ConfigError
        If the file is none, or has a key or a value that does not fit.

    Examples
    --------
    >>> load_config("digits").supernet.ranks
    (8, 4)
    """
    try:
        if name in PACKAGED:
            text = (resources.files("superlora.demo") / "configs" / f"{name}.toml").read_text()
        else:
            text = Path(name).read_text("utf-8")
        values = tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(
            f"config must be one of {list(PACKAGED)} or a TOML file: got {name!r}"
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{name} must be a TOML file: {error}") from None
    changes = values.pop("quick", {})
    if quick:
        if not isinstance(changes, Mapping):
            raise ConfigError(f"{name}: quick must be a section: got {changes!r}")
        if not changes:
            raise ConfigError(
                f"{name} must have a section quick: it is asked for its smaller sizes"
            )
        values = _merged(values, changes)
    if "data" not in values:
        raise ConfigError(f"{name} must say which data: expected one of {list(PACKAGED)}, got none")
    try:
        config: Config = _made(Config, values, "")
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: {error}") from None
    return config


_SECTIONS = {"digits": DigitSizes, "supernet": SupernetSettings, "search": SearchSettings}


def _made(kind: type[Any], values: Any, place: str) -> Any:
    _check_section(place, values)
    known = [field.name for field in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            raise ValueError(f"{place or 'the file'} must have keys of {known}: got {key!r}")
    return kind(
        **{
            key: _made(_SECTIONS[key], value, key) if kind is Config and key in _SECTIONS else value
            for key, value in values.items()
        }
    )


def _merged(values: Mapping[str, Any], changes: Any) -> dict[str, Any]:
    found = dict(values)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = _merged(found[key], value) if both else value
    return found


def _check_section(name: str, value: object) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a section: got {value!r}")


def _check_kinds(name: str, kinds: object, allowed: Sequence[str]) -> None:
    if not isinstance(kinds, list | tuple) or not kinds:
        raise TypeError(f"{name} must be a list, not empty: got {kinds!r}")
    for kind in kinds:
        if kind not in allowed:
            raise ValueError(f"{name} must be of {list(allowed)}: got {kind!r}")
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"{name} must be distinct: got {list(kinds)}")


def _check_number(name: str, value: object, *, positive: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number: got {value!r}")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        rule = "positive" if positive else "at least 0"
        raise ValueError(f"{name} must be {rule}: got {value!r}")
