"""Low-rank updates of many adapters, each for its rows of a batch, as two batched products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from superlora.torch.autograd import autocasts, is_traced, without_autocast
from superlora.torch.link import Link, Part
from superlora.torch.low_rank import factors, low_rank
from superlora.torch.support import Support


class Segments(NamedTuple):
    """Which rows of a batch go through which of several adapters.

    Attributes
    ----------
    rows : torch.Tensor, (count,)
        The rows in ascending order.
    adapters : torch.Tensor, (count,)
        The adapter of each.
    ordered : torch.Tensor, (adapters * most,)
        The rows by adapter, as many for each as the one with most has: its first fills the rest.
    back : torch.Tensor, (count,)
        Where each row is among these.
    """

    rows: Tensor
    adapters: Tensor
    ordered: Tensor
    back: Tensor

    @classmethod
    def of(cls, parts: Sequence[Part], device: torch.device) -> Segments:
        """Return the rows of some parts of a batch."""
        most = max(len(part.places) for part in parts)
        by_adapter, found = [], []
        for index, part in enumerate(parts):
            own = part.places
            found += [(row, index, index * most + at) for at, row in enumerate(own)]
            by_adapter += own + own[:1] * (most - len(own))
        columns = [*zip(*sorted(found), strict=True), by_adapter]
        with torch.inference_mode(False):  # else no backward pass could use them
            rows, adapters, back, ordered = (torch.tensor(own, device=device) for own in columns)
        return cls(rows, adapters, ordered, back)

    def update(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """Return what the adapters add to the outputs of ``rows``, in their order."""
        count, tokens = len(self.rows), math.prod(x.shape[1:-1])
        if not autocasts(x.device):
            x = x.to(down.dtype)
        flat = x.reshape(x.shape[0], tokens, x.shape[-1])
        # Either inputs are copied, or factors: what is less.
        if len(self.ordered) * tokens < count * down.shape[1]:
            own = flat.index_select(0, self.ordered)
            own = own.reshape(len(down), len(self.ordered) // len(down) * tokens, x.shape[-1])
            y = torch.bmm(torch.bmm(own, down.mT), up.mT)
            y = y.reshape(len(self.ordered), tokens, up.shape[1]).index_select(0, self.back)
        else:
            own = flat if count == x.shape[0] else flat.index_select(0, self.rows)
            down, up = (each.index_select(0, self.adapters) for each in (down, up))
            y = torch.bmm(torch.bmm(own, down.mT), up.mT)
        return y.reshape(count, *x.shape[1:-1], up.shape[1])


def low_rank_supports(link: Link) -> list[Support]:
    """Return a linear layer's updates if they are products of two factors; else none."""
    supports = [*link.supports]
    if is_traced() or (link.dropout.on and link.adapter.training):
        return []
    for own in supports:
        rank = own.plain and low_rank(own.blocks.plan.layout, own.name)
        # What layers share is made once for all of them.
        if not rank or own.blocks.scope.applied == "formed" or own.shared():
            return []
    return supports


def stacked(every: Sequence[Sequence[Support]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the factors of adapters, scaled, with zeros up to the largest rank.

    Parameters
    ----------
    every : sequence of sequences of Support
        The updates of each adapter.
    device : torch.device
        Where the factors are to be.

    Returns
    -------
    tuple of torch.Tensor, (adapters, rank, in) and (adapters, out, rank)
    """
    ups, downs = [], []
    with without_autocast(device):
        for supports in every:
            pairs = [factors(own) for own in supports]
            ups.append(torch.cat([up.to(device) for up, _ in pairs], 1))
            downs.append(torch.cat([down.to(device) for _, down in pairs]))
        rank = max(down.shape[0] for down in downs)
        down = torch.stack([pad(own, (0, 0, 0, rank - own.shape[0])) for own in downs])
        return down, torch.stack([pad(own, (0, rank - own.shape[1])) for own in ups])
