"""How far a search is: a bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Collection, Iterator

from superlora.search.outcome import Candidate, by_rank

Report = Callable[[Collection[Candidate], int], None]
"""Takes the candidates that are finished, and how many there will be."""


@contextlib.contextmanager
def reporting(shown: bool, step: int) -> Iterator[Report]:
    """Show how far a search is, on standard error.

    Parameters
    ----------
    shown : bool
        Whether at all.
    step : int
        Candidates between two lines, where there is no terminal.

    Yields
    ------
    callable
        To be called whenever there is something new.
    """
    if not shown:
        yield lambda finished, total: None
    elif sys.stderr.isatty() and importlib.util.find_spec("rich") is not None:
        with _bar() as report:
            yield report
    else:
        yield _lines(step)


def _text(finished: Collection[Candidate], total: int) -> str:
    text = f"{len(finished)} of {total} configurations"
    if finished:
        best = by_rank(finished)[0]
        text += f", best {best.value:.6g} with {best.num_parameters} parameters"
    return text


def _lines(step: int) -> Report:
    last = -step

    def report(finished: Collection[Candidate], total: int) -> None:
        nonlocal last
        if len(finished) - last >= step or len(finished) == total != last:
            last = len(finished)
            print(_text(finished, total), file=sys.stderr, flush=True)

    return report


@contextlib.contextmanager
def _bar() -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("")

        def report(finished: Collection[Candidate], total: int) -> None:
            text = _text(finished, total)
            progress.update(task, completed=len(finished), total=total, description=text)

        yield report
