"""`Dropout`: what an adapter leaves out of its updates in training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import dropout

# As `attach` and files call them.
NAMES = ("dropout", "rank_dropout", "module_dropout")


class Dropout:
    """Probabilities with which entries of inputs, rows of updates, or whole updates are left out.

    Parameters
    ----------
    values : mapping of str to float
        By the names of `NAMES`, each in [0, 1).

    Attributes
    ----------
    on : bool
        Whether any is more than zero.
    check : callable or None
        Raises where an adapter cannot have this dropout.
    """

    def __init__(self, values: Mapping[str, float] | None = None) -> None:
        self._values = dict.fromkeys(NAMES, 0.0)
        self.on = False
        self.check: Callable[[Dropout], None] | None = None
        for name, value in (values or {}).items():
            self[name] = value

    def __getitem__(self, name: str) -> float:
        return self._values[name]

    def __setitem__(self, name: str, value: float) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number: got {value!r}")
        if not (math.isfinite(value) and 0 <= value < 1):
            raise ValueError(f"{name} must be in [0, 1): got {value!r}")
        before = self._values[name]
        self._values[name] = float(value)
        self.on = any(self._values.values())
        if self.check is not None:
            try:
                self.check(self)
            except ValueError:
                self._values[name] = before
                self.on = any(self._values.values())
                raise

    @property
    def values(self) -> dict[str, float]:
        """Those that are more than zero."""
        return {name: value for name, value in self._values.items() if value}

    def update(self, x: Tensor, make: Callable[[Tensor], Tensor], axis: int) -> Tensor:
        """Return what an update adds to an output; the axis of ΔW's rows counts from the end."""
        # Rows and whole updates are not scaled to keep their expectation, as in PEFT and LyCORIS.
        entries, rows, whole = (self._values[name] for name in NAMES)
        y = make(dropout(x, entries) if entries else x)
        if rows:
            kept = torch.rand(y.shape[axis], device=y.device) > rows
            y = y * kept.view(-1, *[1] * (-1 - axis))
        return y * (torch.rand((), device=y.device) > whole) if whole else y
