"""Many workers and killed ones: one study, nothing lost, nothing twice; others' files are safe."""

import dataclasses
import itertools
import logging
import threading
import time

import pytest

from superlora.search import Evolution, Space
from superlora.search.limits import Limits
from tests.search.search_worker import FEW, Worker, keys_in
from tests.search.spaces import MIDDLE, SMALL, separable

optuna = pytest.importorskip("optuna")

from optuna.trial import TrialState  # noqa: E402

from superlora.search import search, searching  # noqa: E402
from superlora.search.study import SharedStudy  # noqa: E402

SAMPLERS = ["evolution", "nsga2", "random"]


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
    backend = optuna.storages.journal.JournalFileBackend(str(path))
    storage = optuna.storages.JournalStorage(backend)
    return optuna.load_study(study_name="superlora", storage=storage).trials


def keys_of(outcome):
    return [MIDDLE.key(trial.configuration) for trial in outcome.trials]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_killed_search_resumes_to_the_same_list(sampler, tmp_path, start):
    path = tmp_path / "study.log"
    worker = start(path, trials=35, sampler=sampler, hang_at=17).go()
    assert worker.line() == "hanging"
    assert [trial.state for trial in trials_of(path)[15:]] == [
        TrialState.COMPLETE, TrialState.RUNNING
    ]  # fmt: skip
    worker.kill()
    calls = []

    def evaluate(configuration):
        calls.append(MIDDLE.key(configuration))
        return separable(configuration)

    options = {"trials": 35, "sampler": sampler}
    found = search(evaluate, MIDDLE, storage=path, evolution=FEW, **options)
    assert found == alone(**options)
    # What was begun is evaluated again, and nothing else.
    begun = keys_in(worker.log)
    assert (len(begun), len(calls)) == (17, 19)
    assert begun[-1] == calls[0]
    assert not set(begun[:-1]) & set(calls)
    states = [trial.state for trial in trials_of(path)]
    assert states.count(TrialState.COMPLETE) == 35
    assert states.index(TrialState.FAIL) == 16
    assert [item.name for item in tmp_path.glob("study*")] == ["study.log"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_two_processes_share_a_study(sampler, tmp_path, start):
    path = tmp_path / "study.log"
    workers = [start(path, trials=40, sampler=sampler, delay=0.02) for _ in range(2)]
    for worker in workers:
        worker.go()
    for worker in workers:
        worker.finish()
    begun = [keys_in(worker.log) for worker in workers]
    assert min(map(len, begun)) > 5
    keys = list(itertools.chain(*begun))
    assert len(keys) == len(set(keys)) == 40

    def nothing(configuration):
        raise AssertionError("all are there")

    found = search(nothing, MIDDLE, storage=path, evolution=FEW, trials=40, sampler=sampler)
    assert sorted(keys_of(found)) == sorted(keys)
    if sampler != "nsga2":
        assert found == alone(trials=40, sampler=sampler)


def test_a_live_worker_is_waited_for_and_a_killed_one_replaced(tmp_path, start):
    path = tmp_path / "study.log"
    hanging = start(path, trials=20, hang_at=3).go()
    other = start(path, trials=20)
    assert hanging.line() == "hanging"
    other.go()
    # The rest of the first generation; the second follows from all of it.
    deadline = time.monotonic() + 30
    while len(keys_in(other.log)) < 7 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)
    states = [trial.state for trial in trials_of(path)]
    assert states.count(TrialState.COMPLETE) == 9
    assert states.count(TrialState.RUNNING) == 1
    assert len(keys_in(other.log)) == 7
    lost = keys_in(hanging.log)[-1]
    hanging.kill()
    other.finish()
    assert keys_in(other.log)[7] == lost
    assert search(separable, MIDDLE, storage=path, evolution=FEW, trials=20) == alone(trials=20)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_threads_share_a_study(sampler, tmp_path):
    path = tmp_path / "study.log"
    calls, found = [], []

    def evaluate(configuration):
        calls.append(MIDDLE.key(configuration))
        time.sleep(0.005)
        return separable(configuration)

    def work():
        options = {"storage": path, "evolution": FEW, "trials": 30, "sampler": sampler}
        found.append(search(evaluate, MIDDLE, **options))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == len(set(calls)) == 30
    assert len(found) == 3
    assert found[0] == found[1] == found[2]
    if sampler != "nsga2":
        assert found[0] == alone(trials=30, sampler=sampler)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*heartbeat_interval:optuna.exceptions.ExperimentalWarning")
def test_a_killed_worker_at_a_database(tmp_path, start):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    worker = start(url, trials=20, hang_at=13, heartbeat=True).go()
    assert worker.line() == "hanging"
    storage = optuna.storages.RDBStorage(url, heartbeat_interval=1, grace_period=2)
    found = []

    def work():
        found.append(search(separable, MIDDLE, storage=storage, evolution=FEW, trials=20))

    thread = threading.Thread(target=work)
    thread.start()
    # Longer than the grace period: the worker hangs, but is alive.
    thread.join(3.5)
    assert thread.is_alive()
    states = [
        trial.state for trial in optuna.load_study(study_name="superlora", storage=url).trials
    ]
    assert TrialState.FAIL not in states
    worker.kill()
    thread.join(30)
    assert found == [alone(trials=20)]


def test_a_database_by_its_url(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    assert search(separable, MIDDLE, storage=url, evolution=FEW, trials=12) == alone(trials=12)
    assert search(separable, MIDDLE, storage=url, evolution=FEW, trials=15) == alone(trials=15)


@pytest.mark.parametrize("length", [1, 30, 1000])
def test_a_line_that_a_killed_worker_left_unfinished(length, tmp_path):
    path = tmp_path / "study.log"
    search(separable, MIDDLE, storage=path, evolution=FEW, trials=12)
    line = path.read_bytes().splitlines(keepends=True)[-3]
    assert line.startswith(b'{"op_code":')
    with open(path, "ab") as file:
        file.write(line[:length].rstrip(b"\n")[:-1] or line[:1])
    found = search(separable, MIDDLE, storage=path, evolution=FEW, trials=20)
    assert found == alone(trials=20)
    assert len(trials_of(path)) == 20


def shared(storage, **options):
    settings = {"seed": 0, **options}
    return SharedStudy(storage, "superlora", Limits(SMALL), 1, settings)


def test_of_two_claims_the_first_counts():
    storage = optuna.storages.InMemoryStorage()
    first, second = shared(storage), shared(storage)
    for study in (first, second):
        study.read()
    assert first.claim(0, 0, (0, 0, 0, 0), {}) == 0
    # The same place, then the same configuration in another place.
    assert second.claim(0, 0, (1, 1, 1, 1), {}) is None
    assert second.claim(1, 0, (0, 0, 0, 0), {}) is None
    assert second.claim(1, 0, (1, 1, 1, 1), {}) == 3
    states = [trial.state for trial in first.study.trials]
    running, failed = TrialState.RUNNING, TrialState.FAIL
    assert states == [running, failed, failed, running]
    first.tell(0, 2.0)
    assert second.claim(0, 0, (2, 2, 2, 2), {}) is None
    first.give_up(3)
    assert second.claim(1, 0, (1, 1, 1, 1), {}) == 5
    state = first.read()
    assert {index: trial.value for index, trial in state.finished.items()} == {0: 2.0}
    assert list(state.running) == [1]


def test_settings_that_another_worker_wrote_at_the_same_time():
    storage = optuna.storages.InMemoryStorage()
    study = shared(storage)
    study.study.set_user_attr("superlora", {"seed": 5})
    with pytest.raises(ValueError, match="seed 5 instead of 0"):
        study.claim(0, 0, (0, 0, 0, 0), {})
    assert study.study.trials == []


def test_the_value_of_a_worker_taken_for_dead_is_dropped():
    storage = optuna.storages.InMemoryStorage()
    calls = []

    def evaluate(configuration):
        calls.append(configuration)
        if len(calls) == 5:
            study = optuna.load_study(study_name="superlora", storage=storage)
            study.tell(4, state=TrialState.FAIL)
            return 1000.0
        return separable(configuration)

    found = search(evaluate, MIDDLE, storage=storage, evolution=FEW, trials=15)
    assert calls[4] == calls[5]
    assert found == alone(trials=15)


def test_it_says_what_it_waits_for(monkeypatch, caplog):
    storage = optuna.storages.InMemoryStorage()
    search(separable, SMALL, storage=storage, trials=1)
    study = optuna.load_study(study_name="superlora", storage=storage)
    study.add_trial(
        optuna.create_trial(
            state=TrialState.RUNNING,
            params=study.trials[0].params,
            distributions=study.trials[0].distributions,
            user_attrs={"index": 1, "generation": 0, "worker": "elsewhere"},
        )
    )

    class Waited(Exception):
        pass

    waits = []

    def sleep(seconds):
        assert 0 < seconds <= 2
        waits.append(seconds)
        if len(waits) > 40:
            raise Waited

    monkeypatch.setattr(searching.time, "sleep", sleep)
    with caplog.at_level(logging.WARNING), pytest.raises(Waited):
        search(separable, SMALL, storage=storage, trials=2)
    assert caplog.messages == ["waiting for the trials [1] of other workers"]


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
def test_a_study_of_another_search_is_refused(changes, message, tmp_path):
    path = tmp_path / "study.log"
    search(separable, storage=path, space=MIDDLE, **BASE)
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
    path = tmp_path / "study.log"
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


@pytest.mark.parametrize(
    "content", [b"weights", b"{}", b"[1]\n[2]\n", b'{"op_code": 0}\n', b"\x00\n"]
)
def test_a_file_that_is_no_journal_is_left_alone(content, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"storage must be an Optuna journal: got .*model\.saf"):
        search(separable, SMALL, storage=path, trials=2)
    assert path.read_bytes() == content
    assert [item.name for item in tmp_path.iterdir()] == ["model.safetensors"]


def test_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="storage must lie in a folder that exists"):
        search(separable, SMALL, storage=tmp_path / "none" / "study.log")
    with pytest.raises(IsADirectoryError, match="storage must be a file: got the folder"):
        search(separable, SMALL, storage=tmp_path)


def test_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    search(separable, SMALL, storage="study.log", trials=3)
    assert len(trials_of(tmp_path / "study.log")) == 3
