"""Many workers and killed ones: one study, no finished trial lost; others' files are safe."""

import dataclasses
import shutil
import sqlite3
import threading
import time

import pytest

from superlora.search import Evolution, Space
from tests.search.search_worker import FEW, Worker, keys_in
from tests.search.spaces import MIDDLE, SMALL, separable

optuna = pytest.importorskip("optuna")

from optuna.trial import TrialState  # noqa: E402

from superlora.search import search, searching  # noqa: E402

SAMPLERS = [
    "evolution",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("nsga2", "random")),
]


@pytest.fixture
def start(tmp_path):
    """Start workers, which are ended with the test."""
    workers = []

    def call(storage, **options):
        workers.append(Worker(storage, tmp_path / f"{len(workers)}.txt", **options))
        return workers[-1]

    yield call
    for worker in workers:
        worker.close()


def alone(**options):
    """Search without any interruption."""
    return search(separable, MIDDLE, evolution=FEW, **options)


def trials_of(path):
    """Read the trials as Optuna's own tools do."""
    return optuna.load_study(study_name="superlora", storage=f"sqlite:///{path}").trials


def keys_of(outcome):
    return [MIDDLE.key(trial.configuration) for trial in outcome.trials]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_killed_worker_costs_its_running_trial(sampler, tmp_path, start, monkeypatch):
    path = tmp_path / "study.db"
    worker = start(path, trials=25, sampler=sampler, hang_at=13, heartbeat=1).go()
    assert worker.line() == "hanging"
    worker.kill()
    time.sleep(6)  # until the heartbeat is old, in whole seconds, also on a busy machine
    monkeypatch.setattr(searching, "HEARTBEAT", 1)
    calls = []

    def evaluate(configuration):
        calls.append(MIDDLE.key(configuration))
        return separable(configuration)

    found = search(evaluate, MIDDLE, storage=path, evolution=FEW, trials=25, sampler=sampler)
    # It is evaluated again, before anything else, and nothing else is.
    begun = keys_in(worker.log)
    assert (len(begun), len(calls)) == (13, 13)
    assert begun[-1] == calls[0]
    assert not set(begun[:-1]) & set(calls)
    states = [trial.state for trial in trials_of(path)]
    assert states.count(TrialState.FAIL) == 1
    assert len(found.trials) == 25
    if sampler != "nsga2":  # whose draws follow from the numbers of trials
        assert keys_of(found) == keys_of(alone(trials=25, sampler=sampler))
    assert [item.name for item in tmp_path.glob("study*")] == ["study.db"]


def test_a_worker_with_a_heartbeat_is_left_alone(tmp_path, start, monkeypatch):
    path = tmp_path / "study.db"
    hanging = start(path, trials=12, hang_at=3, heartbeat=1).go()
    assert hanging.line() == "hanging"
    time.sleep(3.5)
    monkeypatch.setattr(searching, "HEARTBEAT", 1)
    search(separable, MIDDLE, storage=path, evolution=FEW, trials=12)
    states = [trial.state for trial in trials_of(path)]
    assert states.count(TrialState.COMPLETE) == 12
    assert states.count(TrialState.RUNNING) == 1
    assert TrialState.FAIL not in states


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_two_processes_share_a_study(sampler, tmp_path, start):
    path = tmp_path / "study.db"
    alone(storage=path, trials=1, sampler=sampler)  # two cannot both make the file's tables
    workers = [start(path, trials=30, sampler=sampler, delay=0.02) for _ in range(2)]
    for worker in workers:
        worker.go()
    for worker in workers:
        worker.finish()
    begun = [keys_in(worker.log) for worker in workers]
    assert min(map(len, begun)) > 5
    both = set(begun[0]) & set(begun[1])
    assert len(both) <= 2  # begun at the same moment

    def nothing(configuration):
        raise AssertionError("all are there")

    found = search(nothing, MIDDLE, storage=path, evolution=FEW, trials=30, sampler=sampler)
    assert len(found.trials) in (30, 31)
    assert {key for own in begun for key in own} <= set(keys_of(found))


def test_a_value_of_another_worker_is_taken():
    storage = optuna.storages.InMemoryStorage()
    calls = []

    def evaluate(configuration):
        calls.append(configuration)
        if len(calls) == 1:
            alone(storage=storage, trials=5)
        return separable(configuration)

    search(evaluate, MIDDLE, storage=storage, evolution=FEW, trials=8)
    assert len(calls) <= 4


def test_threads_share_a_study():
    storage = optuna.storages.InMemoryStorage()
    calls, found = [], []

    def evaluate(configuration):
        calls.append(MIDDLE.key(configuration))
        time.sleep(0.005)
        return separable(configuration)

    def work():
        found.append(search(evaluate, MIDDLE, storage=storage, evolution=FEW, trials=30))

    alone(storage=storage, trials=1)
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    last = search(separable, MIDDLE, storage=storage, evolution=FEW, trials=1)
    assert 30 <= len(last.trials) <= 32
    assert set(calls) <= set(keys_of(last))


def test_a_database_by_its_url(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    assert search(separable, MIDDLE, storage=url, evolution=FEW, trials=12) == alone(trials=12)
    assert search(separable, MIDDLE, storage=url, evolution=FEW, trials=15) == alone(trials=15)


def test_a_journal(tmp_path):
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.db"))
    storage = optuna.storages.JournalStorage(backend)
    found = search(separable, MIDDLE, storage=storage, evolution=FEW, trials=12)
    assert found == alone(trials=12)


def test_what_is_evaluated_first():
    first = {"largest": MIDDLE.fixed(add_weight=2), "smallest": MIDDLE.fixed()}
    found = alone(trials=12, first=first, limits=(1, None))
    assert found.trials[0].configuration == first["largest"]
    assert found.first == {"largest": found.trials[0]}
    assert alone(trials=12).first == {}


@pytest.mark.parametrize("value", [None, "much", [1.0, 2.0]])
def test_a_value_that_is_no_number_is_refused(value):
    with pytest.raises(TypeError, match="evaluate must return a number: got"):
        search(lambda configuration: value, SMALL, trials=1)


# Studies of others.


BASE = {"trials": 3, "evolution": FEW, "limits": (0, 60), "identity": "a.safetensors", "seed": 1}
WIDER = Space({**MIDDLE.layers, "blocks.3.q": (6, 4)}, ranks=(2,))
RESIZED = Space({**MIDDLE.layers, "blocks.1.q": (6, 5)}, ranks=(2,))
BARE = dataclasses.replace(MIDDLE, without_bias=("blocks.1.q",))
REORDERED = Space(dict(reversed(list(MIDDLE.layers.items()))), ranks=(2,))


@pytest.fixture(scope="module")
def base_study(tmp_path_factory):
    """Return a file with the study of a search that is over."""
    path = tmp_path_factory.mktemp("base") / "study.db"
    search(separable, storage=path, space=MIDDLE, **BASE)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"identity": "b"}, "identity 'a.safetensors' instead of 'b'"),
        ({"seed": 2}, "seed 1 instead of 2"),
        ({"limits": (0, 70)}, r"limits \[0, 60\] instead of \[0, 70\]"),
        ({"evolution": Evolution(12, 4, 4, 4)}, "population 10 instead of 12"),
        ({"sampler": "random"}, "sampler 'evolution' instead of 'random'"),
        ({"objectives": 2}, "objectives 1 instead of 2, sampler 'evolution' instead of 'nsga2'"),
        ({"space": WIDER}, "in its space no layer 'blocks.3.q'"),
        (
            {"space": RESIZED},
            r"in its space layer 'blocks.1.q' of widths \[6, 4\] instead of \[6, 5\]",
        ),
        ({"space": BARE}, r"in its space without_bias \[\] instead of \['blocks.1.q'\]"),
        ({"space": REORDERED}, "another order of layers in its space"),
        ({"space": Space(MIDDLE.layers, (2, 1))}, r"in its space ranks \[2\] instead of \[2, 1\]"),
    ],
)
def test_a_study_of_another_search_is_refused(changes, message, tmp_path, base_study):
    path = shutil.copy(base_study, tmp_path / "study.db")
    before = path.read_bytes()

    def nothing(configuration):
        raise AssertionError("nothing must be evaluated")

    with pytest.raises(
        ValueError, match=f"'superlora' has ({message}|.*, {message}|{message},.*)$"
    ):
        search(nothing, storage=path, **{"space": MIDDLE, **BASE, **changes})
    assert path.read_bytes() == before
    # Under another name it has its own study in the same file.
    again = {"space": MIDDLE, **BASE, **changes}
    assert len(search(separable, storage=path, name="other", **again).trials) == 3


def test_another_name_in_the_same_file(tmp_path):
    path = tmp_path / "study.db"
    for seed in (0, 1):
        found = search(separable, MIDDLE, storage=path, name=f"{seed}", trials=5, seed=seed)
        assert found == search(separable, MIDDLE, trials=5, seed=seed)


@pytest.mark.parametrize("directions", [["maximize"], ["minimize"]])
@pytest.mark.parametrize("trials", [0, 1])
def test_a_study_of_no_search(directions, trials):
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage, study_name="superlora", directions=directions)
    study.optimize(lambda trial: trial.suggest_float("rate", 0, 1), trials)
    if (directions, trials) == (["maximize"], 0):
        # Made, but never begun.
        assert len(search(separable, SMALL, storage=storage, trials=2).trials) == 2
        return
    with pytest.raises(ValueError, match="made by no search of superlora; choose another name"):
        search(separable, SMALL, storage=storage, trials=2)


@pytest.mark.parametrize("content", [b"weights", b'{"op_code": 0}\n', b"\x00\n"])
def test_a_file_that_is_no_database_is_left_alone(content, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"storage must be an SQLite file: got .*model\.saf"):
        search(separable, SMALL, storage=path, trials=2)
    assert path.read_bytes() == content
    assert [item.name for item in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_database_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE words (word TEXT)")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="storage must be an SQLite file of Optuna's"):
        search(separable, SMALL, storage=path, trials=2)
    assert path.read_bytes() == before


def test_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="storage must lie in a folder that exists"):
        search(separable, SMALL, storage=tmp_path / "none" / "study.db")
    with pytest.raises(IsADirectoryError, match="storage must be a file: got the folder"):
        search(separable, SMALL, storage=tmp_path)


def test_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    search(separable, SMALL, storage="study.db", trials=3)
    assert len(trials_of(tmp_path / "study.db")) == 3
