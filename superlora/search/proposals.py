"""Which configuration each place of a search is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy
import optuna
from optuna.samplers import BaseSampler, NSGAIISampler
from optuna.study import StudyDirection
from optuna.trial import TrialState

from superlora.search.evolution import Evolution
from superlora.search.limits import Indices, Limits
from superlora.search.outcome import by_rank
from superlora.search.parameters import Parameters
from superlora.search.study import State, quiet


@dataclass(frozen=True)
class Proposal:
    """A configuration to evaluate.

    Parameters
    ----------
    indices : tuple of int
        The configuration.
    generation : int
        Its generation.
    system_attrs : mapping
        What a sampler of Optuna noted with it.
    """

    indices: Indices
    generation: int
    system_attrs: Mapping[str, Any] = field(default_factory=dict)


class Proposals(Protocol):
    """What a search asks for configurations."""

    def needs(self, index: int) -> int:
        """Return how many candidates, from the first on, must be finished before.

        Parameters
        ----------
        index : int
            A place in the search.

        Returns
        -------
        int
            At most `index`.
        """

    def propose(self, index: int, state: State) -> Proposal | None:
        """Choose the configuration of a place.

        Parameters
        ----------
        index : int
            The place.
        state : State
            What the study holds.

        Returns
        -------
        Proposal or None
            None where there are no more configurations.
        """


class Generations:
    """Generations of evolution, or of random draws; every worker finds the same ones.

    Parameters
    ----------
    limits : Limits
        Space and limits.
    evolution : Evolution
        Population, parents and operators.
    seed : int
        Of all draws.
    selects : bool
        Whether the best have children; else all generations are random.
    """

    def __init__(self, limits: Limits, evolution: Evolution, seed: int, *, selects: bool) -> None:
        self._limits, self._evolution, self._seed = limits, evolution, seed
        self._selects = selects
        self._made: list[list[Indices]] = []

    def needs(self, index: int) -> int:
        """Return the first place of the generation, where the best have children."""
        return index - index % self._evolution.population if self._selects else 0

    def propose(self, index: int, state: State) -> Proposal | None:
        """Return a place's member of its generation.

        Parameters
        ----------
        index : int
            The place.
        state : State
            With all earlier generations finished, where the best have children.

        Returns
        -------
        Proposal or None
            None where all configurations within the limits are in earlier places.
        """
        generation, place = divmod(index, self._evolution.population)
        while len(self._made) <= generation:
            number = len(self._made)
            start = number * self._evolution.population
            best: Sequence[Indices] = ()
            if self._selects:
                finished = by_rank(state.finished[earlier] for earlier in range(start))
                best = [state.indices[item.index] for item in finished]
            seen = {indices for children in self._made for indices in children}
            children = self._evolution.generation(number, self._limits, best, seen, self._seed)
            self._made.append(children)
        children = self._made[generation]
        return Proposal(children[place], generation) if place < len(children) else None


class Asked:
    """Configurations that a sampler of Optuna is asked for.

    Parameters
    ----------
    limits : Limits
        Space and limits.
    evolution : Evolution
        With the population and the number of tries.
    seed : int
        Of the draws that replace what the sampler proposes in vain.
    directions : sequence of optuna.study.StudyDirection
        Of the study.
    sampler : optuna.samplers.BaseSampler, optional
        The sampler; NSGA-II by default.

    Notes
    -----
    The sampler is asked in a copy of the study, in memory, so that the shared study has each
    configuration in one record. A proposal outside the limits, or one that was proposed
    before, fails there and costs no evaluation; after some tries a random one takes its place.
    """

    def __init__(
        self,
        limits: Limits,
        evolution: Evolution,
        seed: int,
        directions: Sequence[StudyDirection],
        sampler: BaseSampler | None = None,
    ) -> None:
        self._limits, self._evolution, self._seed = limits, evolution, seed
        self._sampler = sampler
        self._parameters = Parameters(limits.space)
        self._copied: set[int] = set()
        self._begun: set[int] = set()
        with quiet():
            self._study = optuna.create_study(directions=list(directions))

    def needs(self, index: int) -> int:
        """Return 0: a sampler takes what there is."""
        return 0

    def propose(self, index: int, state: State) -> Proposal | None:
        """Ask the sampler, and replace what cannot be taken.

        Parameters
        ----------
        index : int
            The place.
        state : State
            What the study holds.

        Returns
        -------
        Proposal or None
            None where all configurations within the limits are in other places.
        """
        population = self._evolution.population
        for place in sorted(state.trials.keys() - self._copied):
            # NSGA-II orders the parents of a generation otherwise the first time it is asked.
            first = self._sampler is None and place % population == 0
            if first and place // population not in self._begun:
                self._set_sampler(place)
                self._ask()
            self._study.add_trial(state.trials[place])
            self._copied.add(place)
        self._set_sampler(index)
        seen = set(state.indices.values())
        generation = index // population
        notes: Mapping[str, Any] = {}
        for _ in range(self._evolution.tries):
            indices, notes = self._ask()
            if indices not in seen and self._limits.hold(indices):
                return Proposal(indices, generation, notes)
        generator = numpy.random.default_rng((self._seed, index))
        drawn = self._limits.unseen(generator, seen)
        return None if drawn is None else Proposal(drawn, generation, notes)

    def _set_sampler(self, index: int) -> None:
        self._begun.add(index // self._evolution.population)
        if self._sampler is not None:
            self._study.sampler = self._sampler
            return
        # One for each place: what a killed process had drawn already plays no part.
        seed = int(numpy.random.SeedSequence((self._seed, index)).generate_state(1)[0])
        population = max(2, self._evolution.population)
        self._study.sampler = NSGAIISampler(population_size=population, seed=seed)

    def _ask(self) -> tuple[Indices, Mapping[str, Any]]:
        asked = self._study.ask(dict(self._parameters.distributions))
        indices = self._parameters.decoded(asked.params)
        assert indices is not None  # all parameters were asked for
        notes = dict(self._study.get_trials(deepcopy=False)[asked.number].system_attrs)
        self._study.tell(asked, state=TrialState.FAIL)
        return indices, notes
