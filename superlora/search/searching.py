"""`search`: find the best configurations of a space, in an Optuna study."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sqlite3
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import optuna
from optuna.samplers import BaseSampler, NSGAIISampler
from optuna.storages import BaseStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from superlora.checks import check_count
from superlora.errors import some
from superlora.search.evolution import Evolution
from superlora.search.limits import Indices, Limits
from superlora.search.outcome import Candidate, Outcome
from superlora.search.sampler import EvolutionSampler, Parameters
from superlora.search.settings import differences
from superlora.search.space import Configuration, Space

FORMAT = 2  # raised whenever the same settings would give other configurations
SAMPLERS = ("evolution", "nsga2", "random")
SETTINGS = "superlora"  # the user attribute of a study that says which search it is of
HEARTBEAT = 60  # seconds; a worker's running trial without one for twice as long is tried again
Storage = str | os.PathLike[str] | BaseStorage | None  # a file, URL, storage, or none that is kept


def search(
    evaluate: Callable[[Configuration], float],
    space: Space,
    *,
    storage: Storage = None,
    name: str = "superlora",
    sampler: str | BaseSampler | None = None,
    trials: int = 1000,
    evolution: Evolution = Evolution(),  # noqa: B008  (it cannot be changed)
    limits: tuple[int, int | None] = (0, None),
    objectives: int = 1,
    first: Mapping[str, Configuration] | None = None,
    seed: int = 0,
    identity: str = "",
    progress: bool = False,
) -> Outcome:
    """Search a space for the configurations that evaluate best, in an Optuna study.

    Parameters
    ----------
    evaluate : callable
        Takes a configuration and returns a number; larger is better.
    space : Space
        The configurations.
    storage : str, path or optuna storage, optional
        Where the study is kept: a path for an SQLite file, a URL for a database, or a storage of
        Optuna's, such as a journal. All processes that name the same one work together, and a
        search goes on where it ended. By default the study ends with the call.
    name : str
        The study's name; a storage may hold several.
    sampler : {"evolution", "nsga2", "random"} or optuna.samplers.BaseSampler, optional
        By default ``"evolution"``, and ``"nsga2"`` for two objectives.
    trials : int
        How many configurations the study has in the end, those of earlier calls included. Each of
        several workers may add one more.
    evolution : Evolution
        Population and operators of ``"evolution"``; the population of ``"nsga2"``.
    limits : (int, int or None)
        The least and the largest number of parameters of a configuration.
    objectives : int
        1 for the value alone, 2 for few parameters as well.
    first : mapping of str to Configuration, optional
        Configurations to evaluate before all others, by name, as `candidates` chooses them; those
        outside the limits are left out.
    seed : int
        Of all draws, at least 0.
    identity : str
        What `evaluate` measures, such as a digest of the supernet and the data. A study of
        another identity is refused.
    progress : bool
        Show how far the search is, on standard error.

    Returns
    -------
    Outcome
        All configurations of the study and their values.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If an argument is out of its range, no configuration meets the limits, the study is
        one of other settings, or `evaluate` returns no finite number.

    Notes
    -----
    No finished trial is lost. A configuration that any worker has evaluated takes its value from
    the study, and one that another worker is evaluating is pruned. A worker that is killed costs
    its running trial: in a file or a database Optuna's heartbeat finds that it ended, after two
    minutes, and the trial is tried again. If `evaluate` raises, its trial fails and the exception
    is passed on; the next call proposes the same again.

    One worker finds the same list for the same seed, wherever it was stopped and called again.
    Several work on what is complete when they ask, and their list depends on who is faster.

    A proposal of ``"nsga2"`` or of a sampler of Optuna that is outside the limits is pruned, and
    costs no evaluation. After ``evolution.tries`` in a row that are outside or known, a new
    configuration within the limits is drawn.

    An SQLite file takes some 3 ms for each choice of a trial, which is 0.7 s for 48 layers of five
    operations. Optuna's ``JournalStorage(JournalFileBackend(path))`` takes a ninth of that; it has
    no heartbeat, so that nobody finds that a worker was killed.

    Examples
    --------
    >>> space = Space({"q": (8, 8), "v": (8, 8)}, ranks=(4,))
    >>> def evaluate(configuration):
    ...     return sum(layer["add_weight"] == 4 for layer in configuration.values())
    >>> outcome = search(evaluate, space, trials=200, limits=(0, 150))
    >>> outcome.best.value, outcome.best.num_parameters <= 150
    (2.0, True)
    """
    if not callable(evaluate):
        raise TypeError(f"evaluate must be callable: got {evaluate!r}")
    if not isinstance(space, Space):
        raise TypeError(f"space must be a Space: got {space!r}")
    if not isinstance(evolution, Evolution):
        raise TypeError(f"evolution must be an Evolution: got {evolution!r}")
    for label, text in (("name", name), ("identity", identity)):
        if not isinstance(text, str):
            raise TypeError(f"{label} must be a string: got {text!r}")
    check_count("trials", trials)
    check_count("seed", seed, least=0)
    if objectives not in (1, 2):
        raise ValueError(f"objectives must be 1 or 2: got {objectives!r}")
    if not isinstance(limits, tuple | list) or len(limits) != 2:
        raise TypeError(f"limits must be (least, most): got {limits!r}")
    checked = Limits(space, *limits)
    given = {label: space.indices(configuration) for label, configuration in (first or {}).items()}
    chosen = _checked_sampler(sampler, objectives)
    settings = {
        "format": FORMAT,
        "identity": identity,
        "space": space.to_dict(),
        "fingerprint": space.fingerprint,
        "limits": [checked.least, checked.most],
        "objectives": objectives,
        "sampler": chosen if isinstance(chosen, str) else type(chosen).__name__,
        "evolution": dataclasses.asdict(evolution),
        "seed": seed,
    }
    with _quiet():
        study = _open(storage, name, objectives, json.loads(json.dumps(settings)))
        run = _Run(evaluate, study, checked, objectives)
        run.enqueue(given)
        study.sampler = _sampler(chosen, checked, evolution, seed)
        with tqdm(total=trials, disable=not progress) as bar:
            while len(run.read()) < trials:
                if run.fruitless() >= evolution.tries and not run.enqueue_unseen(seed):
                    break
                if chosen == "nsga2":  # what was drawn before a search was stopped plays no part
                    own = numpy.random.SeedSequence((seed, run.place)).generate_state(1)[0]
                    population = max(2, evolution.population)
                    study.sampler = NSGAIISampler(population_size=population, seed=int(own))
                study.optimize(run.objective, n_trials=1)
                values = [each.values[0] for each in run.read().values()]
                bar.n = len(values)
                bar.set_postfix(best=max(values, default=None))
        return run.outcome(evolution.population)


def _checked_sampler(sampler: Any, objectives: int) -> str | BaseSampler:
    if sampler is None:
        return SAMPLERS[objectives - 1]
    if isinstance(sampler, BaseSampler) and not isinstance(sampler, EvolutionSampler):
        return sampler
    if not isinstance(sampler, str) or sampler not in SAMPLERS:
        raise ValueError(
            f"sampler must be one of {list(SAMPLERS)} or another sampler of Optuna: got {sampler!r}"
        )
    if sampler == "evolution" and objectives == 2:
        raise ValueError(
            "sampler must rank two objectives, as 'nsga2' does: got 'evolution', whose parents "
            "are the best by one"
        )
    return sampler


def _sampler(
    chosen: str | BaseSampler, limits: Limits, evolution: Evolution, seed: int
) -> BaseSampler:
    if isinstance(chosen, BaseSampler):
        return chosen
    if chosen == "random":
        evolution = dataclasses.replace(evolution, mutations=0, crossovers=0)
    return EvolutionSampler(limits.space, evolution, limits=(limits.least, limits.most), seed=seed)


@dataclass
class _Run:
    """A worker at a study: what its trials evaluate, and what all of them found so far."""

    evaluate: Callable[[Configuration], float]
    study: optuna.Study
    limits: Limits
    objectives: int

    def __post_init__(self) -> None:
        self.parameters = Parameters(self.limits.space)
        self._decoded: dict[int, Indices | None] = {}

    def read(self) -> dict[Indices, FrozenTrial]:
        """Return the first complete trial of every configuration."""
        found: dict[Indices, FrozenTrial] = {}
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            if trial.number not in self._decoded:  # what is complete stays so
                self._check(trial)
                self._decoded[trial.number] = self.parameters.decoded(trial)
            indices = self._decoded[trial.number]
            if indices is not None:
                found.setdefault(indices, trial)
        return found

    def _check(self, trial: FrozenTrial) -> None:
        """Refuse a complete trial that no search has written, as in a journal edited by hand."""
        values, label = trial.values or [], trial.user_attrs.get("label", "")
        numbers = [isinstance(v, (int, float)) and abs(v) <= sys.float_info.max for v in values]
        fixed = trial.system_attrs.get("fixed_params", {})
        wrong = {
            "values": (values, len(numbers) == self.objectives and all(numbers)),
            "label": (label, isinstance(label, str)),
            "fixed_params": (fixed, isinstance(fixed, Mapping)),
        }
        for field, (found, good) in wrong.items():
            if not good:
                raise ValueError(
                    f"storage must hold what a search has written: trial {trial.number} of study "
                    f"{self.study.study_name!r} has {field} {found!r}"
                )

    @property
    def place(self) -> int:
        """How many trials have not failed."""
        trials = self.study.get_trials(deepcopy=False)
        return sum(trial.state != TrialState.FAIL for trial in trials)

    def fruitless(self) -> int:
        """Return how many of the last finished trials evaluated nothing."""
        new = {trial.number for trial in self.read().values()}
        count = 0
        for trial in reversed(self.study.get_trials(deepcopy=False)):
            # What is to be evaluated, or is, may be new: a killed worker's trial too.
            if trial.number in new or not trial.state.is_finished():
                break
            count += trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
        return count

    def enqueue(self, first: Mapping[str, Indices]) -> None:
        """Let configurations be tried before all others; each once in a study."""
        for label, indices in first.items():
            if self.limits.hold(indices):
                self.study.enqueue_trial(
                    self.parameters.encoded(indices), {"label": label}, skip_if_exists=True
                )

    def enqueue_unseen(self, seed: int) -> bool:
        """Let a new configuration be tried; False where all within the limits are known."""
        seen = set(self.read())
        drawn = self.limits.unseen(numpy.random.default_rng((seed, self.place)), seen)
        if drawn is None:
            return False
        self.study.enqueue_trial(self.parameters.encoded(drawn))
        return True

    def objective(self, trial: optuna.Trial) -> float | tuple[float, float]:
        """Evaluate what a trial proposes."""
        indices = self.parameters.suggested(trial)
        count = self.limits.space.count(indices)
        trial.set_user_attr("parameters", count)
        if not self.limits.hold(indices) or self._is_running(indices, trial.number):
            raise optuna.TrialPruned
        known = self.read().get(indices)
        value = self._value(indices) if known is None else known.values[0]
        return value if self.objectives == 1 else (value, float(count))

    def _is_running(self, indices: Indices, number: int) -> bool:
        """Return whether another worker is evaluating a configuration."""
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        others = [each for each in running if each.number != number]
        return any(self.parameters.decoded(each) == indices for each in others)

    def _value(self, indices: Indices) -> float:
        found = self.evaluate(self.limits.space.configuration(indices))
        try:
            value = float(found)
        except (TypeError, ValueError):
            raise TypeError(f"evaluate must return a number: got {found!r}") from None
        if not math.isfinite(value):
            raise ValueError(f"evaluate must return a finite number: got {value}")
        return value

    def outcome(self, population: int) -> Outcome:
        """Return what was found so far."""
        space = self.limits.space
        found = [
            Candidate(
                index=index,
                generation=index // population,
                configuration=space.configuration(indices),
                value=trial.values[0],
                num_parameters=space.count(indices),
                label=trial.user_attrs.get("label", ""),
            )
            for index, (indices, trial) in enumerate(self.read().items())
        ]
        return Outcome(space, found)


def _open(
    storage: Storage, name: str, objectives: int, settings: Mapping[str, Any]
) -> optuna.Study:
    """Open a study, or make it; one of another search is refused and not touched."""
    directions = [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE][:objectives]
    opened = _storage(storage)
    study = optuna.create_study(
        study_name=name, storage=opened, directions=directions, load_if_exists=True
    )
    same = study.directions == directions
    if same and SETTINGS not in study.user_attrs and not study.get_trials(deepcopy=False):
        study.set_user_attr(SETTINGS, settings)
    found = study.user_attrs.get(SETTINGS)
    if found is None:
        raise ValueError(
            f"storage must hold a study of this search: study {name!r} was made by no search of "
            "superlora; choose another name"
        )
    if found != settings:
        raise ValueError(
            f"storage must hold a study of this search: study {name!r} has "
            f"{some(differences(found, settings))}"
        )
    return study


def _storage(storage: Storage) -> BaseStorage:
    """Open a storage; a file or a database has a heartbeat."""
    if storage is None:
        return optuna.storages.InMemoryStorage()
    if isinstance(storage, BaseStorage):
        return storage
    if not isinstance(storage, str | os.PathLike):
        raise TypeError(
            f"storage must be a path, a URL, an Optuna storage or None: got {storage!r}"
        )
    if not isinstance(storage, str) or "://" not in storage:
        path = Path(storage).absolute()
        _refuse_other_file(path)
        storage = f"sqlite:///{path}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return RDBStorage(
            storage,
            heartbeat_interval=HEARTBEAT,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
        )


def _refuse_other_file(path: Path) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"storage must lie in a folder that exists: got {path}")
    if path.is_dir():
        raise IsADirectoryError(f"storage must be a file: got the folder {path}")
    if not path.exists() or not path.stat().st_size:
        return
    try:
        with sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True) as database:
            names = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
    except sqlite3.DatabaseError as error:
        raise ValueError(f"storage must be an SQLite file: got {path} ({error})") from error
    if "studies" not in names:
        raise ValueError(f"storage must be an SQLite file of Optuna's: got {path}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna from printing each trial."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(verbosity, optuna.logging.ERROR))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)
