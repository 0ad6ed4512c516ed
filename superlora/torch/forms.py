"""`Formed`: the sum of some support tensors' changes of one weight, formed from their factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from superlora.torch.formed import Pull
from superlora.torch.sources import again

if TYPE_CHECKING:
    from superlora.torch.supports import Part


class Formed:
    """Form the sum of what some support tensors change one weight by; holds no factor.

    Parameters
    ----------
    parts : sequence of Part
        Supports that are added to the weight, or scale it.
    blocks : sequence of dict
        What each is made of.

    Attributes
    ----------
    scales : bool
        Whether one of them scales the weight, which is then the first of the factors.
    rows : int
        How many rows are best formed at once; 0 for all of them.
    """

    def __init__(self, parts: Sequence[Part], blocks: Sequence[dict[str, Tensor]]) -> None:
        self.parts = parts
        self.scales = any(part.operation == "scale_weight" for part in parts)
        # As they are, but for the tensors: what kind of mapping it is says what they are.
        self.kinds = [(again(found), tuple(found)) for found in blocks]
        rows = [part.adapter.rows_at_once(part.name) for part in parts]
        on_cpu = all(block.is_cpu for found in blocks for block in found.values())
        self.rows = min(rows) if on_cpu else 0

    def __call__(self, factors: Sequence[Tensor], rows: tuple[int, int] | None) -> Tensor:
        """Return the sum of the changes, or rows of it.

        Parameters
        ----------
        factors : sequence of torch.Tensor
            The weight, where it is scaled, and all blocks in order.
        rows : tuple of (int, int) or None
            Which.

        Returns
        -------
        torch.Tensor, (rows, input width)
            The sum.
        """
        weight, given = self._given(factors, rows)
        deltas = []
        for part, blocks in zip(self.parts, given, strict=True):
            delta = part.adapter.form(part.name, blocks, rows)
            deltas.append(_scaled(weight, delta) if part.operation == "scale_weight" else delta)
        return _sum(deltas)

    def linearized(
        self, factors: Sequence[Tensor], rows: tuple[int, int] | None, wanted: Sequence[bool]
    ) -> tuple[Tensor, Pull]:
        """Return the sum, and what takes its gradient back to the factors.

        Parameters
        ----------
        factors : sequence of torch.Tensor
            The weight, where it is scaled, and all blocks in order.
        rows : tuple of (int, int) or None
            Which rows of the sum.
        wanted : sequence of bool
            The factors whose gradients are asked for.

        Returns
        -------
        torch.Tensor, (rows, input width)
            The sum.
        callable
            Takes its gradient.
        """
        weight, given = self._given(factors, rows)
        deltas, pulls, first = [], [], int(self.scales)
        supports: list[Tensor] = []
        for part, blocks in zip(self.parts, given, strict=True):
            own = wanted[first : first + len(blocks)]
            delta, pull = part.adapter.form_linearized(part.name, blocks, rows, own)
            if part.operation == "scale_weight":
                supports.append(delta)
                delta, pull = _scaled(weight, delta), _scaled_pull(weight, pull)
            deltas.append(delta)
            pulls.append(pull)
            first += len(blocks)

        def back(gradient: Tensor) -> list[Tensor | None]:
            found = [each for pull in pulls for each in pull(gradient)]
            if not self.scales:
                return found
            assert weight is not None
            of_weight = (_sum(supports) * gradient).to(weight.dtype) if wanted[0] else None
            return [of_weight, *found]

        return _sum(deltas), back

    def _given(
        self, factors: Sequence[Tensor], rows: tuple[int, int] | None
    ) -> tuple[Tensor | None, list[dict[str, Tensor]]]:
        rest = iter(factors)
        weight = next(rest) if self.scales else None
        if weight is not None and rows is not None:
            weight = weight[slice(*rows)]
        return weight, [kind((name, next(rest)) for name in names) for kind, names in self.kinds]


def _scaled(weight: Tensor | None, delta: Tensor) -> Tensor:
    assert weight is not None
    return weight.to(delta.dtype) * delta


def _scaled_pull(weight: Tensor | None, pull: Pull) -> Pull:
    return lambda gradient: pull(_scaled(weight, gradient))


def _sum(deltas: Sequence[Tensor]) -> Tensor:
    total = deltas[0]
    for delta in deltas[1:]:
        total = total + delta
    return total
