"""The evolutionary operators, by their statistics; and as a sampler in a plain Optuna study."""

import numpy
import pytest

from superlora.search import Evolution, Space
from superlora.search.limits import Limits
from tests.search.spaces import MIDDLE, SMALL, every, separable

optuna = pytest.importorskip("optuna")

from superlora.search import EvolutionSampler  # noqa: E402

WIDE = Space({f"{i}": (3, 2) for i in range(40)}, ranks=(1,))
SIZES = [len(costs) for costs in WIDE.costs]


def sampled(seed, space=WIDE):
    return space.indices(space.sample(numpy.random.default_rng(seed)))


def test_mutation_draws_each_option_anew_with_its_probability():
    generator = numpy.random.default_rng(0)
    evolution = Evolution(probability=0.3)
    parent = sampled(1)
    children = numpy.array([evolution.mutated(parent, SIZES, generator) for _ in range(2000)])
    changed = children != numpy.array(parent)
    # What is drawn anew may be the same again.
    expected = 0.3 * (1 - 1 / numpy.array(SIZES))
    assert abs(changed.mean() - expected.mean()) < 0.005
    assert numpy.all(abs(changed.mean(axis=0) - expected) < 0.06)
    for place in range(10):
        new = children[changed[:, place], place]
        for option in set(range(SIZES[place])) - {parent[place]}:
            assert abs((new == option).mean() - 1 / (SIZES[place] - 1)) < 0.12


def test_crossover_takes_each_option_from_either_parent():
    generator = numpy.random.default_rng(0)
    first, second = sampled(1), sampled(2)
    children = numpy.array([Evolution().crossed(first, second, generator) for _ in range(2000)])
    assert numpy.all((children == first) | (children == second))
    differ = numpy.array(first) != numpy.array(second)
    share = (children == first)[:, differ].mean(axis=0)
    assert numpy.all(abs(share - 0.5) < 0.06)


def test_children_are_of_the_best_ten():
    ranked = [sampled(seed) for seed in range(60)]
    evolution = Evolution(probability=1e-9, mutations=0, crossovers=50)
    children = evolution.generation(1, Limits(WIDE), ranked, set(ranked), 0)
    parents = set()
    for child in children:
        pairs = [
            (a, b)
            for a in range(60)
            for b in range(a)
            if all(c in (x, y) for c, x, y in zip(child, ranked[a], ranked[b], strict=True))
        ]
        assert len(pairs) == 1, "no crossover, or one of equal parents"
        parents |= set(pairs[0])
    assert parents == set(range(10))


def test_a_generation_has_its_mutations_crossovers_and_random_ones():
    ranked = [sampled(seed) for seed in range(10)]
    evolution = Evolution(population=60, mutations=25, crossovers=25, probability=0.05)
    children = evolution.generation(1, Limits(WIDE), ranked, set(ranked), 0)
    assert len(set(children)) == 60

    def distance(child):
        return min(sum(c != p for c, p in zip(child, parent, strict=True)) for parent in ranked)

    # Unrelated ones differ in most of the 200 places.
    distances = [distance(child) for child in children]
    assert max(distances[:25]) < 30
    assert all(30 < d < 100 for d in distances[25:50])
    assert min(distances[50:]) > 100


class Counting(Evolution):
    """Evolution that counts how often a child is made."""

    def mutated(self, parent, sizes, generator):
        CALLS.append("mutation")
        return super().mutated(parent, sizes, generator)

    def crossed(self, first, second, generator):
        CALLS.append("crossover")
        return super().crossed(first, second, generator)


CALLS = []


def test_at_most_ten_tries_then_random_ones():
    CALLS.clear()
    everything = [SMALL.indices(configuration) for configuration in every(SMALL)]
    evolution = Counting(population=6, mutations=3, crossovers=2)
    # All are seen but four, which no parent is close to: tries are in vain, or nearly all.
    seen = set(everything[:-4])
    children = evolution.generation(1, Limits(SMALL), everything[:2], seen, 0)
    assert sorted(children) == sorted(everything[-4:])
    assert CALLS.count("crossover") == 20
    assert 3 <= CALLS.count("mutation") <= 30
    CALLS.clear()
    assert evolution.generation(1, Limits(SMALL), everything[:2], set(everything), 0) == []
    assert (CALLS.count("mutation"), CALLS.count("crossover")) == (30, 20)


def test_tries_end_with_the_first_that_can_be_taken():
    CALLS.clear()
    ranked = [sampled(seed) for seed in range(10)]
    Counting().generation(1, Limits(WIDE), ranked, set(ranked), 0)
    assert (CALLS.count("mutation"), CALLS.count("crossover")) == (25, 25)


def test_children_are_within_limits_and_new():
    limits = Limits(WIDE, 100, 300)
    ranked = [limits.draw(numpy.random.default_rng(seed)) for seed in range(20)]
    children = Evolution().generation(1, limits, ranked, set(ranked), 0)
    assert len(set(children)) == 50
    assert not set(children) & set(ranked)
    assert all(limits.hold(child) for child in children)


def test_a_generation_follows_from_its_arguments():
    ranked = [sampled(seed) for seed in range(20)]
    made = {
        tuple(Evolution().generation(index, Limits(WIDE), ranked, set(ranked), seed))
        for index, seed in [(1, 0), (1, 0), (2, 0), (1, 1)]
    }
    assert len(made) == 3


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"population": 49}, ValueError, r"mutations \+ crossovers: expected 50 or more, got 49"),
        ({"parents": 0}, ValueError, "parents must be at least 1: got 0"),
        ({"tries": 1.5}, TypeError, "tries must be an integer"),
        ({"mutations": -1}, ValueError, "mutations must be at least 0"),
        ({"probability": 0}, ValueError, r"probability must be in \(0, 1\]: got 0"),
        ({"probability": float("nan")}, ValueError, "got nan"),
        ({"probability": "0.2"}, ValueError, "got '0.2'"),
    ],
)
def test_no_evolution(fields, error, message):
    with pytest.raises(error, match=message):
        Evolution(**fields)


def optimized(trials, sampler=None, direction="maximize"):
    """Run a plain Optuna study with the sampler."""
    sampler = sampler or EvolutionSampler(MIDDLE, Evolution(20, 5, 10, 10), seed=1)
    study = optuna.create_study(direction=direction, sampler=sampler)

    def objective(trial):
        configuration = {layer: {} for layer in MIDDLE.layers}
        for layer, operation in MIDDLE.categoricals:
            options = MIDDLE.options(layer, operation)
            chosen = trial.suggest_categorical(f"{layer}/{operation}", options)
            configuration[layer][operation] = chosen
        value = separable(configuration)
        return value if direction == "maximize" else -value

    study.optimize(objective, trials)
    return study


@pytest.fixture(autouse=True)
def _quiet():
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(verbosity)


def test_the_sampler_serves_a_plain_study():
    study = optimized(200)
    params = [tuple(trial.params.values()) for trial in study.trials]
    assert len(set(params)) == 200
    values = [trial.value for trial in study.trials]
    assert numpy.mean(values[-20:]) > numpy.mean(values[:20]) + 3
    minimized = optimized(200, direction="minimize")
    assert [tuple(trial.params.values()) for trial in minimized.trials] == params


def test_the_sampler_keeps_its_limits():
    sampler = EvolutionSampler(MIDDLE, Evolution(20, 5, 10, 10), limits=(10, 60))
    study = optimized(60, sampler)
    for trial in study.trials:
        configuration = {layer: {} for layer in MIDDLE.layers}
        for layer, operation in MIDDLE.categoricals:
            configuration[layer][operation] = trial.params[f"{layer}/{operation}"]
        assert 10 <= MIDDLE.num_parameters(configuration) <= 60


def test_the_sampler_refuses_what_it_cannot_do():
    study = optuna.create_study(directions=["maximize"] * 2, sampler=EvolutionSampler(SMALL))
    with pytest.raises(ValueError, match="study must have one objective: got 2"):
        study.ask().suggest_categorical("q/add_weight", (2, 1, "none"))
    study = optuna.create_study(sampler=EvolutionSampler(SMALL))
    with pytest.raises(ValueError, match=r"parameters must be of the space.*'rate'"):
        study.ask().suggest_float("rate", 0, 1)
