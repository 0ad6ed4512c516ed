"""How large updates are: their norms and effective ranks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from superlora.torch.blocks import Blocks
from superlora.torch.interop.formats import blocks_in_double


class Norms(NamedTuple):
    """Of an update ΔW, scale included, with singular values σ.

    Attributes
    ----------
    spectral : float
        The largest σ.
    frobenius : float
        The root of the sum of σ².
    effective_rank : float
        ``exp(-Σ p log p)`` with ``p = σ / Σσ`` (Roy and Vetterli 2007): r for r equal ones, 0 for
        an update of zero.
    """

    spectral: float
    frobenius: float
    effective_rank: float


@torch.no_grad()
def norms_of(blocks: Blocks, name: str) -> Norms:
    """Return the norms of one update; of a stack of matrices all their singular values together."""
    numbers = singular_values(blocks, name)
    total = float(numbers.sum())
    if not total:
        return Norms(0.0, 0.0, 0.0)
    parts = numbers[numbers > 0] / total
    entropy = -float((parts * parts.log()).sum())
    return Norms(float(numbers.max()), float(numbers.norm()), math.exp(entropy))


def singular_values(blocks: Blocks, name: str) -> Tensor:
    """Return an update's singular values, without forming it where it is a thin product."""
    plan, layout = blocks.plan, blocks.plan.layout
    own, scale = blocks_in_double(blocks, name), blocks.scales[name].value
    axes = layout.axes[name]
    if axes.plain:
        thin = plan.low_rank(own, name, scale)
        if thin is not None:
            left, right = (torch.linalg.qr(each).R for each in thin)
            return _svdvals(left @ right.mT)
    delta = plan.delta(own, name, scale)
    if axes.matrices > 1:
        return _svdvals(delta.reshape(axes.matrices, axes.out, -1)).flatten()
    return _svdvals(delta.reshape(layout.shapes[name]))


def _svdvals(matrix: Tensor) -> Tensor:
    numbers: Tensor = torch.linalg.svdvals(matrix)
    return numbers
