"""`search` by one worker: what it finds, in which order, within which limits."""

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from superlora.search import Candidate, Evolution, Outcome, Space
from tests.search.spaces import MIDDLE, SMALL, count, every, separable

optuna = pytest.importorskip("optuna")

from superlora.search import EvolutionSampler, search  # noqa: E402

PARTS = ("weight", "bias")
FEW = Evolution(population=10, parents=4, mutations=4, crossovers=4)
HIDDEN = Space({f"{i}": (3, 2) for i in range(4)}, ranks=(2, 1))
TARGET = HIDDEN.indices(HIDDEN.sample(numpy.random.default_rng(7)))


def agreement(configuration):
    """How many of 20 options are those of a hidden configuration."""
    chosen = HIDDEN.indices(configuration)
    return sum(index == wanted for index, wanted in zip(chosen, TARGET, strict=True))


def listed(outcome):
    return [(trial.configuration, trial.value) for trial in outcome.trials]


def test_it_finds_the_optimum_that_random_search_does_not():
    evolution = Evolution(25, 5, 15, 10, probability=0.1)
    found = search(agreement, HIDDEN, trials=400, evolution=evolution)
    assert found.best.value == 20
    random = search(agreement, HIDDEN, trials=400, sampler="random")
    assert random.best.value < 14


def test_it_finds_the_best_of_a_small_space_by_brute_force():
    evolution = Evolution(20, 5, 10, 8)
    best = max(map(separable, every(SMALL)))
    assert SMALL.size > 60
    assert search(separable, SMALL, trials=60, evolution=evolution).best.value == best


@pytest.mark.parametrize("sampler", ["evolution", "nsga2", "random"])
@pytest.mark.parametrize("trials", [81, 500])
def test_a_whole_space_is_gone_through_once(sampler, trials):
    found = search(separable, SMALL, trials=trials, sampler=sampler, evolution=FEW)
    keys = {SMALL.key(trial.configuration) for trial in found.trials}
    assert len(keys) == len(found.trials) == SMALL.size == 81
    assert found.best.value == max(map(separable, every(SMALL)))
    for trial in found.trials:
        assert trial.value == separable(trial.configuration)
        assert trial.num_parameters == count(SMALL, trial.configuration)


@pytest.mark.parametrize("sampler", ["evolution", "nsga2", "random"])
def test_a_seed_decides_everything(sampler):
    settings = {"trials": 45, "sampler": sampler, "evolution": FEW}
    first, again, other = (search(separable, MIDDLE, **settings, seed=seed) for seed in (3, 3, 4))
    assert listed(first) == listed(again)
    assert listed(first) != listed(other)
    assert first == again


@pytest.mark.parametrize("sampler", ["evolution", "nsga2", "random"])
def test_fewer_trials_are_the_first_of_more(sampler):
    settings = {"sampler": sampler, "evolution": FEW, "seed": 2}
    more = listed(search(separable, MIDDLE, trials=45, **settings))
    assert listed(search(separable, MIDDLE, trials=23, **settings)) == more[:23]


@pytest.mark.parametrize("sampler", ["evolution", "nsga2", "random"])
@pytest.mark.parametrize("limits", [(0, 12), (40, 60), (100, None), (30, 30)])
def test_limits_hold(sampler, limits):
    found = search(separable, MIDDLE, trials=35, sampler=sampler, evolution=FEW, limits=limits)
    assert len(found.trials) == 35
    for trial in found.trials:
        assert limits[0] <= trial.num_parameters <= (limits[1] or MIDDLE.most_parameters)


def test_a_budget_decides_the_best():
    counts = {SMALL.key(c): count(SMALL, c) for c in every(SMALL)}
    best = max(separable(c) for c in every(SMALL) if counts[SMALL.key(c)] <= 12)
    legal = sum(number <= 12 for number in counts.values())
    found = search(separable, SMALL, trials=81, limits=(0, 12), evolution=FEW)
    assert found.best.value == best < max(map(separable, every(SMALL)))
    assert len(found.trials) == legal


def test_no_configuration_meets_the_budget(tmp_path):
    path = tmp_path / "study.db"
    space = Space({"q": (3, 2)}, (2,), {"add_weight": (2, "vector")})
    with pytest.raises(ValueError, match="at least 3, the least possible number of parameters"):
        search(separable, space, storage=path, limits=(0, 2))
    assert list(tmp_path.iterdir()) == []


def test_the_last_generation_is_ranked():
    seen = []

    def late(configuration):
        # Only the very last one is good.
        seen.append(configuration)
        return float(len(seen) == 30)

    found = search(late, MIDDLE, trials=30, evolution=FEW)
    assert found.best.configuration == seen[-1]
    assert found.best.generation == 2
    assert found.ranked(3)[0] == found.best


def test_generations_and_ranks():
    found = search(separable, MIDDLE, trials=34, evolution=FEW)
    assert [len(generation) for generation in found.generations] == [10, 10, 10, 4]
    assert [trial for generation in found.generations for trial in generation] == found.trials
    assert [trial.index for trial in found.trials] == list(range(34))
    ranked = found.ranked(100)
    assert len(ranked) == 34
    assert [t.value for t in ranked] == sorted((t.value for t in found.trials), reverse=True)
    assert found.ranked(5) == ranked[:5]
    with pytest.raises(ValueError, match="count must be at least 1"):
        found.ranked(0)


def test_ties_go_to_fewer_parameters():
    found = search(lambda _: 1.0, MIDDLE, trials=20, evolution=FEW)
    assert found.best.num_parameters == min(trial.num_parameters for trial in found.trials)


@pytest.mark.parametrize("generation", [0, 3])
def test_parents_are_the_best_of_all_generations(generation):
    """Good candidates of the first one have children in the last, and those of the one before."""
    seen, good = [], range(20 * generation, 20 * generation + 2)

    def evaluate(configuration):
        seen.append(HIDDEN.indices(configuration))
        return float(len(seen) - 1 in good)

    evolution = Evolution(population=20, parents=2, mutations=20, crossovers=0, probability=0.05)
    found = search(evaluate, HIDDEN, trials=100, evolution=evolution)
    parents = [seen[index] for index in good]
    for child in (HIDDEN.indices(trial.configuration) for trial in found.generations[-1]):
        assert min(sum(c != p for c, p in zip(child, q, strict=True)) for q in parents) < 7


# Two objectives.


def front_by_brute_force(pairs):
    """Return which points no other beats: value upwards, parameters downwards."""
    return sorted(
        pair
        for pair in pairs
        if not any(other[0] >= pair[0] and other[1] <= pair[1] and other != pair for other in pairs)
    )


def points(candidates):
    return sorted((trial.value, trial.num_parameters) for trial in candidates)


def test_the_front_of_a_whole_space():
    expected = [(separable(c), count(SMALL, c)) for c in every(SMALL)]
    found = search(separable, SMALL, trials=81, objectives=2, evolution=FEW)
    assert points(found.front()) == front_by_brute_force(expected)
    assert len(found.front()) > 3


def volume(outcome):
    """Return the area that a front dominates, up to no value and all parameters."""
    front = outcome.front()
    bounds = [*(trial.num_parameters for trial in front[1:]), MIDDLE.most_parameters]
    return sum(
        trial.value * (bound - trial.num_parameters)
        for trial, bound in zip(front, bounds, strict=True)
    )


def test_two_objectives_find_a_better_front_than_random_search():
    options = {"trials": 160, "objectives": 2, "evolution": Evolution(20, 5, 10, 10)}
    found, random = (
        [search(separable, MIDDLE, sampler=sampler, seed=seed, **options) for seed in range(2)]
        for sampler in ("nsga2", "random")
    )
    assert min(map(volume, found)) > max(map(volume, random))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
@settings(max_examples=200)
def test_fronts_with_ties(pairs):
    trials = [Candidate(i, 0, {}, float(v), n) for i, (v, n) in enumerate(pairs)]
    front = Outcome(SMALL, trials).front()
    assert points(front) == front_by_brute_force([(float(v), n) for v, n in pairs])
    assert [trial.num_parameters for trial in front] == sorted(t.num_parameters for t in front)


def test_optuna_finds_the_same_front(tmp_path):
    path = tmp_path / "study.db"
    found = search(separable, SMALL, storage=path, trials=25, objectives=2, evolution=FEW)
    study = load(path)
    # A configuration that was proposed twice is there twice.
    assert points(found.front()) == sorted({tuple(trial.values) for trial in study.best_trials})


# The study.


def load(path, name="superlora"):
    """Open a study as Optuna's own tools do."""
    return optuna.load_study(study_name=name, storage=f"sqlite:///{path}")


def test_the_file_is_a_plain_study(tmp_path):
    path = tmp_path / "study.db"
    found = search(separable, SMALL, storage=path, trials=20, evolution=FEW, limits=(0, 30))
    study = load(path)
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
    assert study.best_value == found.best.value
    assert [trial.value for trial in study.trials] == [trial.value for trial in found.trials]
    assert {trial.state for trial in study.trials} == {optuna.trial.TrialState.COMPLETE}
    for trial, ours in zip(study.trials, found.trials, strict=True):
        assert set(trial.params) == {f"{layer}/add_{part}" for layer in "qv" for part in PARTS}
        assert trial.params["q/add_weight"] == ours.configuration["q"]["add_weight"]
        distribution = trial.distributions["q/add_weight"]
        assert distribution == optuna.distributions.CategoricalDistribution((2, 1, "none"))
        assert trial.user_attrs["parameters"] == ours.num_parameters
        assert trial.datetime_complete >= trial.datetime_start
    assert study.user_attrs["superlora"]["space"] == SMALL.to_dict()
    assert [item.name for item in tmp_path.iterdir()] == ["study.db"]


def test_a_finished_search_is_read_and_extended(tmp_path):
    path = tmp_path / "study.db"
    options = {"evolution": FEW, "seed": 5}
    whole = search(separable, MIDDLE, trials=24, **options)
    calls = []

    def counted(configuration):
        calls.append(MIDDLE.key(configuration))
        return separable(configuration)

    search(counted, MIDDLE, storage=path, trials=13, **options)
    assert len(calls) == 13
    assert search(counted, MIDDLE, storage=path, trials=13, **options).trials == whole.trials[:13]
    assert len(calls) == 13
    assert search(counted, MIDDLE, storage=path, trials=24, **options) == whole
    assert len(calls) == len(set(calls)) == 24


@pytest.mark.parametrize(
    ("sampler", "objectives"),
    [("evolution", 1), ("nsga2", 1), ("nsga2", 2), ("random", 1), ("random", 2)],
)
def test_where_a_search_stops_changes_nothing(sampler, objectives):
    options = {"sampler": sampler, "objectives": objectives, "evolution": FEW, "seed": 5}
    whole = search(separable, MIDDLE, trials=54, **options)
    storage = optuna.storages.InMemoryStorage()
    for trials in (7, 15, 20, 33, 34, 54):
        found = search(separable, MIDDLE, storage=storage, trials=trials, **options)
    assert found == whole


def test_a_value_in_the_study_is_not_evaluated_again(tmp_path):
    storage = optuna.storages.InMemoryStorage()
    options = {"storage": storage, "evolution": FEW}
    first = search(separable, SMALL, trials=1, **options)
    study = optuna.load_study(study_name="superlora", storage=storage)
    known = {}
    for configuration in list(every(SMALL))[::2]:
        if configuration != first.best.configuration:
            params = {
                f"{layer}/{operation}": option
                for layer, row in configuration.items()
                for operation, option in row.items()
            }
            known[SMALL.key(configuration)] = 100.0 + len(known)
            distributions = study.trials[0].distributions
            study.add_trial(
                optuna.create_trial(
                    params=params, distributions=distributions, value=99.0 + len(known)
                )
            )

    def fresh(configuration):
        assert SMALL.key(configuration) not in known
        return separable(configuration)

    found = search(fresh, SMALL, trials=81, **options)
    assert len(found.trials) == 81
    values = {SMALL.key(trial.configuration): trial.value for trial in found.trials}
    assert {key: values[key] for key in known} == known


def test_a_sampler_of_optuna():
    sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=5)
    found = search(separable, MIDDLE, trials=40, sampler=sampler, limits=(0, 60))
    assert len({MIDDLE.key(trial.configuration) for trial in found.trials}) == 40
    assert all(trial.num_parameters <= 60 for trial in found.trials)
    random = search(separable, MIDDLE, trials=40, sampler="random", limits=(0, 60))
    mean = [numpy.mean([trial.value for trial in o.trials[-20:]]) for o in (found, random)]
    assert mean[0] > mean[1] + 1


def test_evaluate_may_change_its_configuration():
    def evaluate(configuration):
        value = separable(configuration)
        configuration.clear()
        return value

    assert search(evaluate, SMALL, trials=10) == search(separable, SMALL, trials=10)


def test_an_exception_is_passed_on_and_evaluated_again(tmp_path):
    path = tmp_path / "study.db"
    calls = []

    def fails_once(configuration):
        calls.append(configuration)
        if len(calls) == 7:
            raise RuntimeError("out of memory")
        return separable(configuration)

    options = {"storage": path, "trials": 15, "evolution": FEW}
    with pytest.raises(RuntimeError, match="out of memory"):
        search(fails_once, MIDDLE, **options)
    assert load(path).trials[-1].state == optuna.trial.TrialState.FAIL
    found = search(fails_once, MIDDLE, **options)
    assert calls[6] == calls[7]
    assert found == search(separable, MIDDLE, trials=15, evolution=FEW)


def test_optuna_prints_nothing_and_keeps_its_verbosity(capfd, tmp_path):
    before = optuna.logging.get_verbosity()
    search(separable, SMALL, storage=tmp_path / "a", trials=5, objectives=2)
    assert optuna.logging.get_verbosity() == before
    assert capfd.readouterr() == ("", "")


def test_progress_is_shown(capfd):
    found = search(separable, MIDDLE, trials=25, evolution=FEW, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "25/25" in err
    assert f"best={found.best.value:.3g}"[:8] in err


# Bad input.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"trials": 0}, ValueError, "trials must be at least 1: got 0"),
        ({"trials": 1.0}, TypeError, "trials must be an integer"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"objectives": 3}, ValueError, "objectives must be 1 or 2: got 3"),
        ({"sampler": "tpe"}, ValueError, r"sampler must be one of .*'nsga2'.*got 'tpe'"),
        ({"sampler": 1}, ValueError, "another sampler of Optuna: got 1"),
        ({"sampler": EvolutionSampler(SMALL)}, ValueError, "another sampler of Optuna: got"),
        ({"sampler": "evolution", "objectives": 2}, ValueError, "must rank two objectives"),
        ({"limits": 5}, TypeError, r"limits must be \(least, most\): got 5"),
        ({"limits": (0, -1)}, ValueError, r"limits\[1\] must be at least 0"),
        ({"evolution": 50}, TypeError, "evolution must be an Evolution: got 50"),
        ({"name": 1}, TypeError, "name must be a string: got 1"),
        ({"identity": None}, TypeError, "identity must be a string: got None"),
        ({"storage": 1}, TypeError, "storage must be a path, a URL, an Optuna storage or None"),
        ({"space": {"q": (3, 2)}}, TypeError, "space must be a Space"),
        ({"evaluate": 1.0}, TypeError, "evaluate must be callable: got 1.0"),
    ],
)
def test_bad_arguments(options, error, message):
    def evaluate(configuration):
        raise AssertionError("nothing must be evaluated")

    with pytest.raises(error, match=message):
        search(**{"evaluate": evaluate, "space": SMALL, **options})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_finite_number(value):
    with pytest.raises(ValueError, match=f"evaluate must return a finite number: got {value}"):
        search(lambda _: value, SMALL, trials=5)
