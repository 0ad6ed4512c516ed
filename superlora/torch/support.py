"""`Support`: one support tensor of an adapter, and how a layer applies it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from superlora.algebra.form import joint_entries
from superlora.design.ways import FORMED
from superlora.supports import ADD
from superlora.torch.autograd import autocasts, is_traced, without_autocast
from superlora.torch.operands import Given, Operands, formed_operands
from superlora.torch.update import (
    FactoredWay,
    FormedWay,
    MultipliedWay,
    Scale,
    Way,
    apply_way,
)

if TYPE_CHECKING:
    from superlora.torch.blocks import Blocks

# Entries of an update that are formed at once: few enough for a core's cache.
_CHUNK = 1 << 18


class Support:
    """One support tensor of an adapter: what is prepared for it, and where its blocks are.

    Parameters
    ----------
    adapter : Blocks
        Whose it is.
    name : str
        Its name in the adapter's plan.

    Attributes
    ----------
    operation : str
        The merge operation.
    along : str
        What its vector is repeated along; empty where it is no repeated vector.
    scale, number : float and torch.Tensor
        The number in front of it, and the same for compiled code.
    """

    def __init__(self, adapter: Blocks, name: str) -> None:
        layout = adapter.plan.layout
        self.adapter, self.name = adapter, name
        layer = layout.layer_of[name]
        self.operation = next(op for op, own in layout.supports[layer].items() if own == name)
        self.shape = layout.shapes[name]
        group = layout.grouping.pieces[name][0].group
        of_weight = self.operation in (ADD, "scale_weight")
        self.along = layout.maps[group].repeated() if of_weight else ""
        self.scale: float = 1.0
        self.number = torch.empty(0)
        self.application = layout.application(name)
        self.formed = formed_operands(layout, name)
        self.way: Way | None = None
        if layout.multiplies(name):
            self.way = MultipliedWay(layout, name)
        elif self.application.factored is not None:
            self.way = FactoredWay(layout, name, self.application.factored)
        for operands in (self.formed, *(self.way.operands if self.way else ())):
            operands.bind(adapter)
        copied = self.application.forming.multiplications <= math.prod(self.shape)
        mixed = self.formed.first and self.formed.rows is None
        # How many rows are best formed at once; 0 for all of them.
        self.rows = 0 if copied or mixed else max(1, _CHUNK // self.shape[1])

    @property
    def plain(self) -> bool:
        """Whether it is an update of the weight, and no repeated vector."""
        return self.operation == ADD and not self.along

    def is_formed(self, tokens: int, fused: bool) -> bool:
        """Return whether the support is best formed for so many inputs."""
        applied = self.adapter.applied
        if self.way is None or applied == FORMED:
            return True
        if applied != "auto" or is_traced():  # no compiler is to see a number of tokens compared
            return False
        bound = self.application.bounds[torch.is_grad_enabled(), fused]
        return bound is not None and tokens >= bound

    def factored(
        self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """Return the product with the support, not formed, and with the layer's weight if given.

        Parameters
        ----------
        x : torch.Tensor, (tokens, input width)
            Inputs.
        weight, bias : torch.Tensor, optional
            The layer's own, of the support's dtype.

        Returns
        -------
        torch.Tensor, (tokens, output width)
            Of the factors' dtype, or that of automatic mixed precision.
        """
        assert self.way is not None
        (operands,) = self.way.operands
        given = operands.given(self.adapter, x.device)
        tensors: Sequence[Tensor] = given.tensors
        if weight is None:
            dtype = tensors[0].dtype
            if autocasts(x.device):
                dtype = torch.get_autocast_dtype(x.device.type)
                tensors = [tensor.to(dtype) for tensor in tensors]
                given = given._replace(carried=False)
            x = x.to(dtype)
        scale = self.number if torch.compiler.is_compiling() else self.scale
        y, handed = apply_way(
            self.way, x, weight, bias, tensors, given.starts, given.carried, scale
        )
        if handed:
            self._hand_on(operands, handed)
        return y

    def _hand_on(self, operands: Operands, handed: Sequence[Tensor]) -> None:
        for each, tensor in zip(operands.shared, handed, strict=True):
            if each.several:
                self.adapter.scope.put(each.key, tensor)

    def form(self, device: torch.device) -> Tensor:
        """Return the support tensor itself, the scale multiplied in."""
        given = self.formed.given(self.adapter, device)
        scale = self.number if torch.compiler.is_compiling() else self.scale
        way = FormedWay([self.formed], [False], [scale], 0)
        with without_autocast(device):
            return way.delta(given.tensors, given.starts, device)

    def vector(self, device: torch.device) -> Tensor:
        """Return the vector that is repeated, the scale multiplied in."""
        layout = self.adapter.plan.layout
        group = layout.grouping.pieces[self.name][0].group
        names = layout.blocks_of_joint(group)
        tensors, make = self.adapter.inputs_of(names)
        with without_autocast(device):
            given = dict(zip(names, make(tensors), strict=True))
            entries: Tensor = joint_entries(layout, given, group)
            scale = self.number if torch.compiler.is_compiling() else self.scale
            return (entries * scale).to(device)


def formed_product(
    supports: Sequence[Support],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
) -> Tensor:
    """Multiply inputs by the sum of formed supports, and of the weight if it is given.

    Parameters
    ----------
    supports : sequence of Support
        At least one; some may scale the weight.
    x : torch.Tensor, (tokens, input width)
        Inputs.
    weight : torch.Tensor, (output width, input width), or None
        What the supports are added to.
    bias : torch.Tensor, (output width,), or None
        What is added to the outputs.
    base : torch.Tensor, (output width, input width), or None
        The weight that is scaled.

    Returns
    -------
    torch.Tensor, (tokens, output width)
        The outputs.
    """
    givens = [support.formed.given(support.adapter, x.device) for support in supports]
    scaling = [support.operation == "scale_weight" for support in supports]
    compiled = torch.compiler.is_compiling()
    scales: list[Scale] = [s.number if compiled else s.scale for s in supports]
    rows = min(support.rows for support in supports)
    way = FormedWay([support.formed for support in supports], scaling, scales, rows)
    tensors = joined_tensors(supports, givens)
    if any(scaling):
        assert base is not None
        tensors.append(base)
    starts = tuple(start for given in givens for start in given.starts)
    carried = any(given.carried for given in givens)
    y, handed = apply_way(way, x, weight, bias, tensors, starts, carried, 1.0)
    first = 0
    for support, given in zip(supports, givens, strict=True) if handed else ():
        count = len(support.formed.shared)
        if given.carried:
            support._hand_on(support.formed, handed[first : first + count])
        first += count
    return y


def joined_tensors(supports: Sequence[Support], givens: Sequence[Given]) -> list[Tensor]:
    """Return the tensors of several supports: what layers share of all of them, then blocks."""
    counts = [len(support.formed.shared) for support in supports]
    pairs = list(zip(givens, counts, strict=True))
    shared = [tensor for given, count in pairs for tensor in given.tensors[:count]]
    return shared + [tensor for given, count in pairs for tensor in given.tensors[count:]]
