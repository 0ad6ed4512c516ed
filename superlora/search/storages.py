"""Where a study is kept, and what can tell there which workers are alive."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages.journal import (
    JournalFileBackend,
    JournalFileOpenLock,
    JournalFileSymlinkLock,
    JournalStorage,
)

from superlora.search.workers import HEARTBEAT_INTERVAL, Heartbeats, LockedFiles, Watch

Storage = str | os.PathLike[str] | BaseStorage | None
"""A journal's path, a database's URL, a storage of Optuna's, or None for this process alone."""

START = b'{"op_code":'
"""What every line of Optuna's journal begins with."""


def open_storage(storage: Storage) -> tuple[BaseStorage, Watch]:
    """Open a storage, and whatever can tell which of its workers are alive.

    Parameters
    ----------
    storage : str, path, optuna storage or None
        A journal's path, a database's URL, a storage, or None for this process alone.

    Returns
    -------
    optuna.storages.BaseStorage
        The storage.
    Watch
        Of this worker.

    Raises
    ------
    TypeError
        If it is nothing of these.
    ValueError
        If the file is no journal.
    FileNotFoundError
        If the journal's folder does not exist.
    IsADirectoryError
        If the path is one of a folder.
    """
    if storage is None:
        return optuna.storages.InMemoryStorage(), Watch()
    if isinstance(storage, str) and "://" in storage:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            storage = RDBStorage(storage, heartbeat_interval=HEARTBEAT_INTERVAL)
    if isinstance(storage, RDBStorage) and storage.get_heartbeat_interval() is not None:
        return storage, Heartbeats(storage)
    if isinstance(storage, BaseStorage):
        return storage, Watch()
    if not isinstance(storage, str | os.PathLike):
        raise TypeError(
            f"storage must be a path, a URL, an Optuna storage or None: got {storage!r}"
        )
    # The lock is a link to the file: a relative one would lead nowhere.
    path = Path(storage).absolute()
    if not path.parent.is_dir():
        raise FileNotFoundError(f"storage must lie in a folder that exists: got {path}")
    _refuse_other_file(path)
    try:
        journal = JournalStorage(JournalFileBackend(str(path), lock_obj=_TrimmingLock(path)))
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"storage must be an Optuna journal: got {path} ({error})") from error
    return journal, LockedFiles(path.with_name(f"{path.name}.workers"))


def _refuse_other_file(path: Path) -> None:
    # Before anything is written, or cut off.
    if path.is_dir():
        raise IsADirectoryError(f"storage must be a file: got the folder {path}")
    if path.exists():
        with open(path, "rb") as file:
            start = file.read(len(START))
        if not START.startswith(start):
            raise ValueError(f"storage must be an Optuna journal: got {path}")


class _TrimmingLock(JournalFileOpenLock):
    """The journal's lock; a line that a killed process left unfinished is cut off before writing.

    Without that the next line would be joined to it, and the journal could not be read any more.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # A link may be made on any version of NFS, but not by every user of Windows.
        kind = JournalFileOpenLock if os.name == "nt" else JournalFileSymlinkLock
        self._lock: JournalFileOpenLock | JournalFileSymlinkLock = kind(str(path))

    def acquire(self) -> bool:
        acquired = self._lock.acquire()
        try:
            self._trim()
        except BaseException:
            self._lock.release()
            raise
        return acquired

    def release(self) -> None:
        self._lock.release()

    def _trim(self) -> None:
        with open(self._path, "r+b") as file:
            size = end = file.seek(0, os.SEEK_END)
            while end:
                start = max(0, end - 65536)
                file.seek(start)
                found = file.read(end - start).rfind(b"\n")
                end = start + found + 1
                if found >= 0:
                    break
            if end < size:
                file.truncate(end)
