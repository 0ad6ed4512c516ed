"""What the tasks' training loops share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

import superlora.torch as slt


class Diverged(Exception):
    """The loss is about that of guessing: the training is stopped, and counts as it then is."""


def check_loss(classes: int) -> Callable[[int, float], None]:
    """Return what ends a training whose second epoch, or a later one, has not learned anything.

    Its mean loss is then above nine tenths of the loss of guessing, or no number.
    """

    def check(epoch: int, loss: float) -> None:
        if epoch >= 2 and not loss <= 0.9 * math.log(classes):
            raise Diverged

    return check


@contextmanager
def attached(
    model: nn.Module, design: Any, targets: Sequence[str], scale: float, seed: int
) -> Iterator[Any]:
    """Attach a design for as long as the context lasts; None attaches nothing."""
    if design is None:
        yield None
        return
    with warnings.catch_warnings():
        # A rank above what a weight's own size needs: the comparison shows that it is idle.
        warnings.simplefilter("ignore")
        adapter = slt.attach(model, design, targets=list(targets), seed=seed)
    try:
        adapter.scale = scale * adapter.scale
        yield adapter
    finally:
        adapter.detach()
