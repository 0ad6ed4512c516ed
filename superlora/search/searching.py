"""`search`: find the best configurations of a space, by many processes and across restarts."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection

from superlora.checks import check_count
from superlora.search.evolution import Evolution
from superlora.search.limits import Limits
from superlora.search.outcome import Outcome
from superlora.search.progress import Report, reporting
from superlora.search.proposals import Asked, Generations, Proposal, Proposals
from superlora.search.samplers import EvolutionSampler
from superlora.search.space import Configuration, Space
from superlora.search.storages import Storage
from superlora.search.study import SharedStudy, State

FORMAT = 1
"""Raised whenever the same settings would give other configurations."""

SAMPLERS = ("evolution", "nsga2", "random")

_logger = logging.getLogger(__name__)


def search(
    evaluate: Callable[[Configuration], float],
    space: Space,
    *,
    storage: Storage = None,
    name: str = "superlora",
    sampler: str | BaseSampler | None = None,
    trials: int = 1000,
    evolution: Evolution = Evolution(),  # noqa: B008  (it cannot be changed)
    limits: tuple[int, int | None] = (0, None),
    objectives: int = 1,
    seed: int = 0,
    identity: str = "",
    progress: bool = False,
) -> Outcome:
    """Search a space for the configurations that evaluate best, in an Optuna study.

    Parameters
    ----------
    evaluate : callable
        Takes a configuration and returns a number; larger is better.
    space : Space
        The configurations.
    storage : str, path or optuna storage, optional
        Where the study is kept: a path for a journal, a URL for a database, or a storage of
        Optuna's. All processes that name the same one work together, and a search goes on
        where it ended. By default the study ends with the call.
    name : str
        The study's name; a storage may hold several.
    sampler : {"evolution", "nsga2", "random"} or optuna.samplers.BaseSampler, optional
        By default ``"evolution"``, and ``"nsga2"`` for two objectives.
    trials : int
        How many configurations the study has in the end, those of earlier calls included.
    evolution : Evolution
        Population and operators of ``"evolution"``; the population of ``"nsga2"``.
    limits : (int, int or None)
        The least and the largest number of parameters of a configuration.
    objectives : int
        1 for the value alone, 2 for few parameters as well.
    seed : int
        Of all draws, at least 0.
    identity : str
        What `evaluate` measures, such as a digest of the supernet and the data. A study of
        another identity is refused.
    progress : bool
        Show how far the search is, on standard error.

    Returns
    -------
    Outcome
        All configurations of the study and their values.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If an argument is out of its range, no configuration meets the limits, the study is
        one of other settings, or `evaluate` returns no finite number.

    Notes
    -----
    A configuration is evaluated once: workers claim it by adding the running trial with all
    parameters to the study, and of two that claim the same the first has it. A complete trial
    that you added to the study yourself counts as evaluated.

    With ``"evolution"`` and ``"random"`` each place of the search has a configuration that
    follows from the seed and the values of earlier generations alone. So one worker, several,
    and workers that were killed and started again all find the same list; at the end of a
    generation they wait for each other. With ``"nsga2"`` this holds for one worker. Other
    samplers are asked as they are, in a copy of the study.

    Limits hold for all samplers: what ``"nsga2"`` or a sampler of Optuna proposes outside
    them is asked for again, at most ``evolution.tries`` times, and then drawn at random, so
    that no evaluation is spent on it. The study has them as Optuna's constraints too.

    The trials of a dead worker are marked as failed and evaluated again. With a journal a
    worker is dead when the lock of its file in ``<storage>.workers`` is free, which takes a
    file system with locks; with a database when its heartbeat is a minute old. With a storage
    of your own it is Optuna's heartbeat that decides where the storage has one; else all
    running trials count as alive. If `evaluate` raises, its trial fails and the exception is
    passed on; the next call evaluates it again.

    Examples
    --------
    >>> space = Space({"q": (8, 8), "v": (8, 8)}, ranks=(4,))
    >>> def evaluate(configuration):
    ...     return sum(layer["add_weight"] == 4 for layer in configuration.values())
    >>> outcome = search(evaluate, space, trials=200, limits=(0, 150))
    >>> outcome.best.value, outcome.best.num_parameters <= 150
    (2.0, True)
    """
    if not callable(evaluate):
        raise TypeError(f"evaluate must be callable: got {evaluate!r}")
    if not isinstance(space, Space):
        raise TypeError(f"space must be a Space: got {space!r}")
    if not isinstance(evolution, Evolution):
        raise TypeError(f"evolution must be an Evolution: got {evolution!r}")
    for label, text in (("name", name), ("identity", identity)):
        if not isinstance(text, str):
            raise TypeError(f"{label} must be a string: got {text!r}")
    check_count("trials", trials)
    check_count("seed", seed, least=0)
    if objectives not in (1, 2):
        raise ValueError(f"objectives must be 1 or 2: got {objectives!r}")
    checked = Limits(space, *_pair(limits))
    chosen = _checked_sampler(sampler, objectives)
    settings = {
        "format": FORMAT,
        "identity": identity,
        "space": space.to_dict(),
        "fingerprint": space.fingerprint,
        "limits": [checked.least, checked.most],
        "objectives": objectives,
        "sampler": chosen if isinstance(chosen, str) else type(chosen).__name__,
        "evolution": dataclasses.asdict(evolution),
        "seed": seed,
    }
    shared = SharedStudy(storage, name, checked, objectives, json.loads(json.dumps(settings)))
    proposals = _proposals(chosen, checked, evolution, seed, shared.directions)
    with shared.watch.working(), reporting(progress, evolution.population) as report:
        state = _run(evaluate, shared, proposals, trials, report)
    return Outcome(space, [state.finished[index] for index in sorted(state.finished)])


def _pair(limits: Any) -> tuple[Any, Any]:
    if not isinstance(limits, tuple | list) or len(limits) != 2:
        raise TypeError(f"limits must be (least, most): got {limits!r}")
    return limits[0], limits[1]


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"evaluate must return a number: got {value!r}") from None


def _checked_sampler(sampler: Any, objectives: int) -> str | BaseSampler:
    if sampler is None:
        return SAMPLERS[objectives - 1]
    if isinstance(sampler, BaseSampler) and not isinstance(sampler, EvolutionSampler):
        return sampler
    if not isinstance(sampler, str) or sampler not in SAMPLERS:
        raise ValueError(
            f"sampler must be one of {list(SAMPLERS)} or another sampler of Optuna: got {sampler!r}"
        )
    if sampler == "evolution" and objectives == 2:
        raise ValueError(
            "sampler must rank two objectives, as 'nsga2' does: got 'evolution', whose parents "
            "are the best by one"
        )
    return sampler


def _proposals(
    sampler: str | BaseSampler,
    limits: Limits,
    evolution: Evolution,
    seed: int,
    directions: list[StudyDirection],
) -> Proposals:
    if sampler in ("evolution", "random"):
        return Generations(limits, evolution, seed, selects=sampler == "evolution")
    own = sampler if isinstance(sampler, BaseSampler) else None
    return Asked(limits, evolution, seed, directions, own)


def _run(
    evaluate: Callable[[Configuration], float],
    shared: SharedStudy,
    proposals: Proposals,
    total: int,
    report: Report,
) -> State:
    generator = numpy.random.default_rng()
    prefix = waiting = 0
    while True:
        state = shared.read()
        report(state.finished.values(), total)
        while prefix in state.finished:
            prefix += 1
        if prefix >= total:
            return state
        places = _open_places(proposals, state, prefix, total)
        # Beside others a random place, so that not all claim the same one.
        index = next(places, None)
        if index is not None and state.running:
            index = int(generator.choice([index, *places]))
        if index is None:
            waiting += 1
            _wait(waiting, state)
            continue
        waiting = 0
        proposal = proposals.propose(index, state)
        if proposal is None:
            total = min(total, index)
            continue
        _evaluate(evaluate, shared, index, proposal, state)


def _open_places(proposals: Proposals, state: State, prefix: int, total: int) -> Iterator[int]:
    for index in range(prefix, total):
        if proposals.needs(index) > prefix:
            return
        if index not in state.indices:
            yield index


def _wait(times: int, state: State) -> None:
    time.sleep(min(0.02 * 2 ** min(times, 7), 2.0))
    if times == 30:
        numbers = sorted(trial.number for trial in state.running.values())
        _logger.warning("waiting for the trials %s of other workers", numbers)


def _evaluate(
    evaluate: Callable[[Configuration], float],
    shared: SharedStudy,
    index: int,
    proposal: Proposal,
    state: State,
) -> None:
    number = shared.claim(index, proposal.generation, proposal.indices, proposal.system_attrs)
    if number is None:
        return
    known = state.values.get(proposal.indices)
    if known is not None:
        shared.tell(number, known[0])
        return
    configuration = shared.configuration(proposal.indices)
    try:
        with shared.watch.evaluating(shared.study, number):
            value = _number(evaluate(configuration))
        if not math.isfinite(value):
            raise ValueError(
                f"evaluate must return a finite number: got {value} for configuration {index}"
            )
    except BaseException:
        shared.give_up(number)
        raise
    shared.tell(number, value)
