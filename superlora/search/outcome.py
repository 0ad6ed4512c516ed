"""`Outcome`: what a search has found, as plain records."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from superlora.checks import check_count
from superlora.search.space import Configuration, Space


@dataclass(frozen=True)
class Candidate:
    """A configuration that was evaluated.

    Parameters
    ----------
    index : int
        Its place in the search, from 0.
    generation : int
        Its generation, from 0.
    configuration : mapping
        An option for every layer and operation.
    value : float
        What evaluating it gave; larger is better.
    num_parameters : int
        How many parameters it has.
    label : str
        Its name among those that were to be evaluated first; empty for what the search proposed.
    """

    index: int
    generation: int
    configuration: Configuration
    value: float
    num_parameters: int
    label: str = ""


def by_rank(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Sort candidates by value, then fewer parameters, then who came first."""
    return sorted(candidates, key=lambda c: (-c.value, c.num_parameters, c.index))


@dataclass(frozen=True)
class Outcome:
    """The candidates of a search, those of its last generation included.

    Parameters
    ----------
    space : Space
        The configurations.
    trials : list of Candidate
        In the order of the search.

    Examples
    --------
    >>> from superlora.search import search
    >>> space = Space({"q": (8, 8)}, ranks=(4,))
    >>> outcome = search(lambda _: 0.5, space, trials=20)
    >>> outcome.best.num_parameters == min(trial.num_parameters for trial in outcome.trials)
    True
    """

    space: Space
    trials: list[Candidate]

    @property
    def best(self) -> Candidate:
        """The candidate of the largest value; of those, of the fewest parameters."""
        return self.ranked(1)[0]

    @property
    def generations(self) -> list[list[Candidate]]:
        """The candidates of each generation."""
        found: dict[int, list[Candidate]] = {}
        for trial in self.trials:
            found.setdefault(trial.generation, []).append(trial)
        return [found[generation] for generation in sorted(found)]

    @property
    def first(self) -> dict[str, Candidate]:
        """The candidates that were to be evaluated first, by name."""
        return {trial.label: trial for trial in self.trials if trial.label}

    def ranked(self, count: int) -> list[Candidate]:
        """Return the best candidates.

        Parameters
        ----------
        count : int
            How many.

        Returns
        -------
        list of Candidate
            The best first; at equal values the one with fewer parameters.

        Raises
        ------
        TypeError, ValueError
            If `count` is not a positive integer.
        """
        check_count("count", count)
        return by_rank(self.trials)[:count]

    def front(self) -> list[Candidate]:
        """Return the Pareto front: candidates that none beats in value and in parameters.

        Returns
        -------
        list of Candidate
            By number of parameters, the fewest first; ties are all there.
        """
        front: list[Candidate] = []
        for trial in sorted(self.trials, key=lambda c: (c.num_parameters, -c.value, c.index)):
            last = front[-1] if front else None
            tie = last and (last.value, last.num_parameters) == (trial.value, trial.num_parameters)
            if last is None or trial.value > last.value or tie:
                front.append(trial)
        return front
