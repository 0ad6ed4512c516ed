"""Which processes work at a study, so that the trials of a killed one are given to others."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import optuna
from optuna.trial import FrozenTrial, TrialState

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

WORKER = "worker"
"""The user attribute of a trial that names who evaluates it."""

HEARTBEAT_INTERVAL = 30
"""Seconds, for a database; a worker is dead after twice as long without one."""

_WARNINGS = threading.Lock()


class Watch:
    """One worker at a study that knows nothing of others: they count as alive."""

    def __init__(self) -> None:
        self.worker = uuid.uuid4().hex

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Be known as alive; around all of a worker's trials."""
        yield

    @contextlib.contextmanager
    def evaluating(self, study: optuna.Study, number: int) -> Iterator[None]:
        """Be known as alive; around one evaluation.

        Parameters
        ----------
        study : optuna.Study
            The study.
        number : int
            The trial's number.

        Yields
        ------
        None
            Nothing.
        """
        yield

    def fail_dead(self, study: optuna.Study, running: list[FrozenTrial]) -> None:
        """Mark the trials of dead workers as failed.

        Parameters
        ----------
        study : optuna.Study
            The study.
        running : list of FrozenTrial
            Its running trials.
        """


class LockedFiles(Watch):
    """Workers that lock a file each, which the system unlocks when a process ends in any way.

    Parameters
    ----------
    folder : Path
        Where the files are; made at the first worker.

    Notes
    -----
    Machines that share the folder must share its locks too, as NFS version 4 does. On a file
    system that keeps locks to each machine they would take each other's workers for dead, and
    evaluate twice; one without any locks is refused.
    """

    # A process can lock its own locked file again: it must know its own workers by name.
    _own: set[tuple[int, str]] = set()  # noqa: RUF012  (of the process)

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Hold the lock of this worker's file."""
        own = (os.getpid(), self.worker)
        with self._made() as file:
            path = Path(file.name)
            if not _lock(file):
                raise OSError(f"{path} cannot be locked: storage must lie where files can be")
            self._own.add(own)
            try:
                yield
            finally:
                self._own.discard(own)
                # Some systems do not delete open files; a file that stays harms nothing.
                with contextlib.suppress(OSError):
                    path.unlink()
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    def _made(self) -> BinaryIO:
        while True:
            self._folder.mkdir(exist_ok=True)
            # Another worker that ends may delete the empty folder in between.
            with contextlib.suppress(FileNotFoundError):
                return open(self._folder / self.worker, "xb")

    def fail_dead(self, study: optuna.Study, running: list[FrozenTrial]) -> None:
        """Mark the trials of workers whose file is gone or not locked as failed.

        Parameters
        ----------
        study : optuna.Study
            The study.
        running : list of FrozenTrial
            Its running trials.
        """
        workers = {trial.user_attrs[WORKER] for trial in running if WORKER in trial.user_attrs}
        dead = {worker for worker in workers if not self._is_alive(worker)}
        for trial in running:
            if trial.user_attrs.get(WORKER) in dead:
                fail(study, trial.number)

    def _is_alive(self, worker: str) -> bool:
        if (os.getpid(), worker) in self._own:
            return True
        path = self._folder / worker
        try:
            with open(path, "r+b") as file:
                if not _lock(file):
                    return True
        except FileNotFoundError:
            return False
        except OSError:
            return True  # not ours to open
        with contextlib.suppress(OSError):
            path.unlink()
        return False


class Heartbeats(Watch):
    """Workers that leave the time in a database, by Optuna's heartbeat.

    Parameters
    ----------
    storage : optuna.storages.RDBStorage
        The database, with a heartbeat interval.

    Notes
    -----
    A worker is taken for dead once its last heartbeat is older than the storage's grace
    period. Where it only slept, its value is dropped when it comes back. One that dies between
    its claim and its first heartbeat leaves a running trial that nobody fails.
    """

    def __init__(self, storage: optuna.storages.RDBStorage) -> None:
        super().__init__()
        self._storage = storage

    @contextlib.contextmanager
    def evaluating(self, study: optuna.Study, number: int) -> Iterator[None]:
        """Beat from a thread of its own.

        Parameters
        ----------
        study : optuna.Study
            The study.
        number : int
            The trial's number.

        Yields
        ------
        None
            Nothing.
        """
        storage = self._storage
        study_id = storage.get_study_id_from_name(study.study_name)
        trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, number)
        storage.record_heartbeat(trial_id)
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(storage.get_heartbeat_interval()):
                # A database that is busy once must not end the beat.
                with contextlib.suppress(optuna.exceptions.StorageInternalError):
                    storage.record_heartbeat(trial_id)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def fail_dead(self, study: optuna.Study, running: list[FrozenTrial]) -> None:
        """Mark the trials without a recent heartbeat as failed.

        Parameters
        ----------
        study : optuna.Study
            The study.
        running : list of FrozenTrial
            Its running trials.
        """
        # The filters are the process's, as are other threads' searches.
        with _WARNINGS, warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(study)


def fail(study: optuna.Study, number: int) -> None:
    """Mark a trial as failed, unless another process has finished it meanwhile.

    Parameters
    ----------
    study : optuna.Study
        The study.
    number : int
        The trial's number.
    """
    tell(study, number, state=TrialState.FAIL)


def tell(study: optuna.Study, number: int, **result: Any) -> None:
    """Finish a trial, unless another process has finished it meanwhile.

    Parameters
    ----------
    study : optuna.Study
        The study.
    number : int
        The trial's number.
    **result : Any
        Its state, or its values.
    """
    # A RuntimeError if it is finished between Optuna's own check and the write.
    with contextlib.suppress(ValueError, RuntimeError):
        study.tell(number, **result)


def _lock(file: BinaryIO) -> bool:
    """Lock a file until this process closes it or ends; not inherited by its children."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
