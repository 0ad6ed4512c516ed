"""`EvolutionSampler`: GLoRA's evolutionary search as a sampler of Optuna."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from superlora.search.evolution import Evolution
from superlora.search.limits import Indices, Limits
from superlora.search.space import Space


class Parameters:
    """A space as the parameters of a study: one categorical for each layer and operation.

    Attributes
    ----------
    distributions : dict of str to CategoricalDistribution
        By name, ``"layer/operation"``, in the order of indices.
    """

    def __init__(self, space: Space) -> None:
        shared = functools.cache(CategoricalDistribution)  # by all of equal options
        self.distributions: dict[str, CategoricalDistribution] = {
            f"{layer}/{operation}": shared(space.options(layer, operation))
            for layer, operation in space.categoricals
        }

    def encoded(self, indices: Iterable[int]) -> dict[str, Any]:
        """Return a configuration as values of the parameters."""
        pairs = zip(self.distributions.items(), indices, strict=True)
        return {name: own.choices[index] for (name, own), index in pairs}

    def decoded(self, trial: FrozenTrial) -> Indices | None:
        """Return a trial's configuration; None where it has no value for a parameter yet."""
        values: Mapping[str, Any] = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        try:
            return tuple(own.choices.index(values[n]) for n, own in self.distributions.items())
        except (KeyError, ValueError):
            return None

    def suggested(self, trial: optuna.Trial) -> Indices:
        """Ask a trial for all parameters."""
        return tuple(
            own.choices.index(trial.suggest_categorical(name, own.choices))
            for name, own in self.distributions.items()
        )


class EvolutionSampler(BaseSampler):
    """GLoRA's evolutionary search as a sampler for any Optuna study of one objective.

    Parameters
    ----------
    space : Space
        The configurations; the study's parameters are ``"layer/operation"``.
    evolution : Evolution
        Population, parents and operators.
    limits : (int, int or None)
        The least and the largest number of parameters.
    seed : int
        With the study's trials it decides all draws; the sampler has no other state.

    Raises
    ------
    TypeError, ValueError
        If no configuration meets the limits, or the seed is negative.

    Notes
    -----
    A generation has as many trials as the population, those that failed left out. Its parents are
    the best complete trials before it; each of its trials takes the first child that no other trial
    has. Workers do not wait for each other: what is not complete when a trial is asked for is no
    parent. Where all configurations within the limits were tried, one of them is repeated.

    Examples
    --------
    >>> import optuna
    >>> space = Space({"q": (8, 8)}, ranks=(4,))
    >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
    >>> study = optuna.create_study(direction="maximize", sampler=EvolutionSampler(space))
    >>> def objective(trial):
    ...     chosen = [
    ...         trial.suggest_categorical(f"{layer}/{operation}", space.options(layer, operation))
    ...         for layer, operation in space.categoricals
    ...     ]
    ...     return float("vector" in chosen)
    >>> study.optimize(objective, n_trials=20)
    >>> study.best_value
    1.0
    """

    def __init__(
        self,
        space: Space,
        evolution: Evolution = Evolution(),  # noqa: B008  (it cannot be changed)
        *,
        limits: tuple[int, int | None] = (0, None),
        seed: int = 0,
    ) -> None:
        self.evolution = evolution
        self.limits = Limits(space, *limits)
        self.seed = seed
        self._parameters = Parameters(space)
        # A generation that was made, and what it follows from.
        self._kept: tuple[Any, list[Indices]] | None = None

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the distributions of all parameters; Optuna calls this."""
        # A parameter with one option is not sampled, but counts.
        return dict(self._parameters.distributions)

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        """Choose a trial's parameters; Optuna calls this."""
        if len(study.directions) != 1 and self.evolution.mutations + self.evolution.crossovers:
            raise ValueError(
                f"study must have one objective: got {len(study.directions)}; use 'nsga2' for two"
            )
        trials = study.get_trials(deepcopy=False)
        others = [each for each in trials if each.number != trial.number]
        others = [each for each in others if each.state != TrialState.FAIL]
        index = sum(each.number < trial.number for each in others) // self.evolution.population
        before = others[: index * self.evolution.population]
        sign = -1 if study.directions[0] == StudyDirection.MAXIMIZE else 1
        decoded = [self._parameters.decoded(each) for each in others]
        seen = frozenset(filter(None, decoded[: len(before)]))
        complete = [
            (sign * each.values[0], self.limits.space.count(own), each.number, own)
            for each, own in zip(before, decoded, strict=False)
            if each.state == TrialState.COMPLETE and own is not None
        ]
        best = tuple(own for *_, own in sorted(complete)[: self.evolution.parents])
        if self._kept is None or self._kept[0] != (index, best, seen):
            made = self.evolution.generation(index, self.limits, best, seen, self.seed)
            self._kept = ((index, best, seen), made)
        children = self._kept[1]
        taken = set(filter(None, decoded))
        free = [child for child in children if child not in taken]
        # Other workers may be about to take the first ones.
        asked = sum(
            own is None and each.state == TrialState.RUNNING and each.number < trial.number
            for each, own in zip(others, decoded, strict=True)
        )
        if free:
            return self._parameters.encoded(free[asked % len(free)])
        generator = numpy.random.default_rng((self.seed, index, trial.number))
        drawn = self.limits.unseen(generator, taken) or self.limits.draw(generator)
        return self._parameters.encoded(drawn or sorted(taken)[0])

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Refuse a parameter that is not of the space; Optuna calls this."""
        raise ValueError(
            f"parameters must be of the space, 'layer/operation': got {param_name!r} with "
            f"{param_distribution}"
        )
