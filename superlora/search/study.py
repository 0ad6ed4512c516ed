"""The Optuna study that workers share: who evaluates what, and what came out."""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from superlora.errors import some
from superlora.search.limits import Indices, Limits
from superlora.search.outcome import Candidate
from superlora.search.parameters import Parameters
from superlora.search.settings import differences
from superlora.search.space import Configuration
from superlora.search.storages import Storage, open_storage
from superlora.search.workers import WORKER, fail, tell

SETTINGS = "superlora"
"""The user attribute of a study that says which search it is of."""

INDEX, GENERATION, CLAIM, PARAMETERS = "index", "generation", "claim", "parameters"
"""The user attributes of a trial, beside the worker."""

_VERBOSITY = threading.Lock()

LIVE = (TrialState.COMPLETE, TrialState.RUNNING)


@dataclass(frozen=True)
class State:
    """What a study holds at one moment.

    Parameters
    ----------
    finished : dict of int to Candidate
        By index.
    running : dict of int to FrozenTrial
        By index; none that is finished.
    indices : dict of int to tuple of int
        The configuration of each of both, by index.
    values : dict of tuple of int to list of float
        Of every complete trial, also those that no search has made.
    trials : dict of int to FrozenTrial
        The complete trials of `finished`, by index.
    """

    finished: dict[int, Candidate] = field(default_factory=dict)
    running: dict[int, FrozenTrial] = field(default_factory=dict)
    indices: dict[int, Indices] = field(default_factory=dict)
    values: dict[Indices, list[float]] = field(default_factory=dict)
    trials: dict[int, FrozenTrial] = field(default_factory=dict)

    def copy(self) -> State:
        """Return a copy that can be added to.

        Returns
        -------
        State
            The same, in dicts of its own.
        """
        return State(*(dict(getattr(self, item.name)) for item in fields(self)))


class SharedStudy:
    """A study that many workers share.

    Parameters
    ----------
    storage : str, path, optuna storage or None
        As in `open_storage`.
    name : str
        The study's name in the storage.
    limits : Limits
        Space and limits.
    objectives : int
        1 for the value, 2 for the number of parameters as well.
    settings : mapping
        JSON values; a study of others is refused.

    Raises
    ------
    ValueError
        If the study is of another search, or of none.
    """

    def __init__(
        self,
        storage: Storage,
        name: str,
        limits: Limits,
        objectives: int,
        settings: Mapping[str, Any],
    ) -> None:
        self._limits, self._settings = limits, dict(settings)
        self._parameters = Parameters(limits.space)
        opened, self.watch = open_storage(storage)
        self.directions = [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE][:objectives]
        self.study = self._open(opened, name)
        self._settled = 0
        self._finished = State()
        empty = SETTINGS not in self.study.user_attrs and not self.study.get_trials(deepcopy=False)
        if empty and self.study.directions == self.directions:
            self.study.set_user_attr(SETTINGS, self._settings)
        self._refuse_another()

    def _open(self, storage: BaseStorage, name: str) -> optuna.Study:
        sampler = optuna.samplers.RandomSampler()  # never asked
        with quiet():
            # Another search's study is not even touched by this.
            with contextlib.suppress(KeyError):
                return optuna.load_study(study_name=name, storage=storage, sampler=sampler)
            return optuna.create_study(
                study_name=name,
                storage=storage,
                sampler=sampler,
                directions=self.directions,
                load_if_exists=True,
            )

    def _refuse_another(self) -> None:
        found = self.study.user_attrs.get(SETTINGS)
        if found is None:
            raise ValueError(
                f"storage must hold a study of this search: study {self.study.study_name!r} was "
                "made by no search of superlora; choose another name"
            )
        if found != self._settings:
            raise ValueError(
                f"storage must hold a study of this search: study {self.study.study_name!r} has "
                f"{some(differences(found, self._settings))}"
            )

    def read(self) -> State:
        """Read the study, after the trials of dead workers are marked as failed.

        Returns
        -------
        State
            What it holds now.
        """
        trials = self.study.get_trials(deepcopy=False)
        running = [trial for trial in trials[self._settled :] if trial.state == TrialState.RUNNING]
        if running:
            self.watch.fail_dead(self.study, running)
            trials = self.study.get_trials(deepcopy=False)
        # What is finished stays so: it is looked at once.
        while self._settled < len(trials) and trials[self._settled].state.is_finished():
            self._add(self._finished, trials[self._settled])
            self._settled += 1
        state = self._finished.copy()
        for trial in trials[self._settled :]:
            self._add(state, trial)
        return state

    def _add(self, state: State, trial: FrozenTrial) -> None:
        indices = self._parameters.decoded(trial.params) if trial.state in LIVE else None
        if indices is None:
            return
        index = trial.user_attrs.get(INDEX)
        if trial.state == TrialState.COMPLETE:
            state.values.setdefault(indices, trial.values)
        # Of two that claim the same, the first has it.
        if index is None or index in state.indices:
            return
        state.indices[index] = indices
        if trial.state == TrialState.RUNNING:
            state.running[index] = trial
            return
        state.trials[index] = trial
        state.finished[index] = Candidate(
            index=index,
            generation=trial.user_attrs[GENERATION],
            configuration=self._limits.space.configuration(indices),
            value=trial.values[0],
            num_parameters=self._limits.space.count(indices),
        )

    def claim(
        self, index: int, generation: int, indices: Indices, system_attrs: Mapping[str, Any]
    ) -> int | None:
        """Say that this worker evaluates a configuration, unless another was first.

        Parameters
        ----------
        index, generation : int
            The candidate's place.
        indices : tuple of int
            Its configuration.
        system_attrs : mapping
            What an Optuna sampler notes about its trial.

        Returns
        -------
        int or None
            The trial's number; None where another worker was first.
        """
        self._refuse_another()
        claim = uuid.uuid4().hex
        count = self._limits.space.count(indices)
        # One record: whoever sees the trial sees its configuration, and its number is the order.
        trial = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=self._parameters.encoded(indices),
            distributions=dict(self._parameters.distributions),
            user_attrs={
                INDEX: index,
                GENERATION: generation,
                WORKER: self.watch.worker,
                CLAIM: claim,
                PARAMETERS: count,
            },
            system_attrs={
                **system_attrs,
                "constraints": [self._limits.least - count, count - self._limits.high],
            },
        )
        self.study.add_trial(trial)
        lost = False
        # Since the study was read last.
        for other in self.study.get_trials(deepcopy=False)[self._settled :]:
            if other.user_attrs.get(CLAIM) == claim:
                break
            if INDEX in other.user_attrs and other.state in LIVE:
                same_place = other.user_attrs[INDEX] == index
                same = self._parameters.decoded(other.params) == indices
                lost = lost or same_place or same
        if lost:
            self.give_up(other.number)
            return None
        return other.number

    def give_up(self, number: int) -> None:
        """Mark a trial of this worker as failed.

        Parameters
        ----------
        number : int
            The trial's number.
        """
        fail(self.study, number)

    def configuration(self, indices: Indices) -> Configuration:
        """Return a configuration for `evaluate`.

        Parameters
        ----------
        indices : tuple of int
            The configuration.

        Returns
        -------
        dict
            An option for every layer and operation; a new one each time.
        """
        return self._limits.space.configuration(indices)

    def tell(self, number: int, value: float) -> None:
        """Note the value of a trial, unless this worker was taken for dead.

        Parameters
        ----------
        number : int
            The trial's number.
        value : float
            What evaluating it gave.
        """
        trial = self.study.get_trials(deepcopy=False)[number]
        values = [value, float(trial.user_attrs[PARAMETERS])][: len(self.directions)]
        tell(self.study, number, values=values)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Optuna from printing that it made a study."""
    # The verbosity is the process's: another thread must not take ours for the user's.
    with _VERBOSITY:
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(max(verbosity, optuna.logging.WARNING))
        try:
            yield
        finally:
            optuna.logging.set_verbosity(verbosity)
