"""`EvolutionSampler`: GLoRA's evolutionary search as a sampler of Optuna."""

from __future__ import annotations

from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from superlora.search.evolution import Evolution
from superlora.search.limits import Indices, Limits
from superlora.search.parameters import Parameters
from superlora.search.space import Space


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
    `superlora.search.search` adds to it that workers wait for each other's generations and
    claim what they evaluate. In a study of your own every trial must suggest all parameters.
    A trial's place is the number of earlier
    trials that have not failed, and its parents are the best complete trials of the
    generations before.

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
        self._kept: dict[tuple[Any, ...], list[Indices]] = {}

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the distributions of all parameters; Optuna calls this.

        Parameters
        ----------
        study : optuna.Study
            The study.
        trial : FrozenTrial
            The trial.

        Returns
        -------
        dict of str to BaseDistribution
            One for each layer and operation.
        """
        # A parameter with one option is not sampled, but counts.
        return dict(self._parameters.distributions)

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        """Choose a trial's parameters; Optuna calls this.

        Parameters
        ----------
        study : optuna.Study
            The study.
        trial : FrozenTrial
            The trial.
        search_space : dict of str to BaseDistribution
            The distributions.

        Returns
        -------
        dict of str to int or str
            One option for each layer and operation.

        Raises
        ------
        ValueError
            If the study has several objectives.
        RuntimeError
            If all configurations within the limits were tried.
        """
        if len(study.directions) != 1:
            raise ValueError(
                f"study must have one objective: got {len(study.directions)}; use 'nsga2' for two"
            )
        sign = -1 if study.directions[0] == StudyDirection.MAXIMIZE else 1
        trials = study.get_trials(deepcopy=False)[: trial.number]
        earlier = [other for other in trials if other.state != TrialState.FAIL]
        generation, place = divmod(len(earlier), self.evolution.population)
        before = earlier[: generation * self.evolution.population]
        finished = [other for other in before if other.state == TrialState.COMPLETE]
        finished.sort(key=lambda other: (sign * other.values[0], other.number))
        best = tuple(filter(None, map(self._indices, finished)))[: self.evolution.parents]
        children = self._generation(
            generation, best, frozenset(filter(None, map(self._indices, before)))
        )
        if place >= len(children):
            raise RuntimeError("all configurations within the limits have been tried")
        return self._parameters.encoded(children[place])

    def _generation(
        self, index: int, best: tuple[Indices, ...], seen: frozenset[Indices]
    ) -> list[Indices]:
        key = (index, best, seen)
        if key not in self._kept:
            self._kept = {key: self.evolution.generation(index, self.limits, best, seen, self.seed)}
        return self._kept[key]

    def _indices(self, trial: FrozenTrial) -> Indices | None:
        return self._parameters.decoded(trial.params)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Refuse a parameter that is not of the space; Optuna calls this.

        Parameters
        ----------
        study : optuna.Study
            The study.
        trial : FrozenTrial
            The trial.
        param_name : str
            The parameter.
        param_distribution : BaseDistribution
            Its distribution.

        Raises
        ------
        ValueError
            Always.
        """
        raise ValueError(
            f"parameters must be of the space, 'layer/operation': got {param_name!r} with "
            f"{param_distribution}"
        )
