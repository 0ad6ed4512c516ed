"""What the merge operations do to a layer's output, and to its weight and bias."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from superlora import operations
from superlora.design.supports import ADD, OF_BIAS
from superlora.torch.autograd import autocasts, without_autocast
from superlora.torch.support import Support, product, sum_output


class Base(NamedTuple):
    """A layer's weight, (output, input), and bias: what they hold now, and without any adapter."""

    weight: Tensor
    bias: Tensor | None
    own_weight: Tensor
    own_bias: Tensor | None
    merged: bool  # into what they hold now
    wrapped: bool  # whether another library's forward stands in for the layer's own


class Operations:
    """What support tensors of any operations make of a layer's inputs.

    Parameters
    ----------
    held : Base
        The layer's weight and bias.
    supports : sequence of Support
        The support tensors.
    x : torch.Tensor, (..., input width)
        Inputs.
    """

    def __init__(self, held: Base, supports: Sequence[Support], x: Tensor) -> None:
        self.held, self.x = held, x
        self.weight, self.bias = held.own_weight, held.own_bias
        # By where they act: on the inputs, on the base's outputs, as an update, on the bias.
        self.inner: list[Support] = []
        self.outer: list[Support] = []
        self.sums: list[Support] = []
        self.repeated: list[Support] = []
        self.cut: list[Support] = []  # added to some of the outputs
        self.of_bias: list[Support] = []
        for own in supports:
            if own.rows is not None:
                self.cut.append(own)
            elif own.operation in OF_BIAS:
                if own.operation != "scale_bias" or self.bias is not None:
                    self.of_bias.append(own)
            elif own.operation == "right_weight":
                self.inner.append(own)
            elif own.operation == "left_weight":
                self.outer.append(own)
            elif not own.along:
                self.sums.append(own)
            elif own.operation == ADD:
                self.repeated.append(own)
            else:
                (self.inner if own.along == "outputs" else self.outer).append(own)

    def output(self, fused: bool, base: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the layer's output."""
        held, x = self.held, self.x
        shift, of_bias = self._shift(), self._of_bias()
        weight: Tensor | None = None
        bias = held.bias
        fusing = fused and shift is None and not self.outer and not autocasts(x.device)
        if fusing and self.sums:
            weight = held.weight
            if of_bias is not None:
                bias, of_bias = of_bias if bias is None else bias + of_bias, None
        y: Tensor | None = None
        z: Tensor | None = None
        if weight is None:
            if shift is None:
                y = base(x)
            elif held.merged or held.wrapped:  # which is not to see what is done to the inputs
                y = base(x) + self._times(shift)
            else:
                y = base(x + shift)
            if fused and self.outer and shift is None and not held.merged:
                # A product without the bias would cost as much again.
                own = held.bias
                z = y if own is None else y - own.to(y.dtype)
        own_weight = self.weight
        y = sum_output(self.sums, x, weight, bias, lambda: _own(y, x, weight, bias), own_weight)
        if self.outer or self.repeated or self.cut:
            y = self._finished(y, z)
        return y if of_bias is None else y + of_bias.to(y.dtype)

    def added(self) -> Tensor:
        """Return what `output` adds to the layer's own output."""
        x = self.x
        shift, of_bias = self._shift(), self._of_bias()
        y = x.new_zeros(*x.shape[:-1], self.weight.shape[0])
        y = y if shift is None else self._times(shift)
        y = sum_output(self.sums, x, None, None, lambda: y, self.weight)
        y = self._finished(y, None)
        return y if of_bias is None else y + of_bias.to(y.dtype)

    def _finished(self, y: Tensor, z: Tensor | None) -> Tensor:
        """Add what is made of the base's outputs, and vectors that are repeated."""
        for own in self.outer:
            # Made of the base's outputs without its bias, `z` if they are known.
            z = self._times(self.x) if z is None else z
            y = y + self._product(own, z).to(y.dtype)
        for own in self.repeated:
            vector = own.vector(self.x.device)
            x = self.x.to(vector.dtype)
            # A product with v 1ᵀ, 1 vᵀ or v 1 1ᵀ, of which none is formed.
            if own.along == "outputs":
                y = y + (x * vector).sum(-1, keepdim=True).to(y.dtype)
            else:
                y = y + (x.sum(-1, keepdim=True) * vector).to(y.dtype)
        return y + self._of_rows(y) if self.cut else y

    def _of_rows(self, y: Tensor) -> Tensor:
        """Return the updates of some of the outputs, zero between them."""
        parts: list[Tensor] = []
        total, done = None, 0
        ordered = sorted((own.rows, index) for index, own in enumerate(self.cut) if own.rows)
        for (start, stop), index in ordered:
            if start < done:  # of two adapters
                total = _sum(total, self._joined(parts, y))
                parts, done = [], 0
            part = product(self.cut[index], self.x).to(y.dtype)
            parts += [y.new_zeros(*y.shape[:-1], start - done), part]
            done = stop
        total = _sum(total, self._joined(parts, y))
        assert total is not None
        return total

    def _joined(self, parts: Sequence[Tensor], y: Tensor) -> Tensor:
        width = sum(part.shape[-1] for part in parts)
        return torch.cat([*parts, y.new_zeros(*y.shape[:-1], y.shape[-1] - width)], -1)

    def _times(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.to(x.dtype))

    def _shift(self) -> Tensor | None:
        """Return what is added to the inputs of the base."""
        total = None
        for own in self.inner:
            found = self._product(own, self.x).to(self.x.dtype)
            total = found if total is None else total + found
        return total

    def _product(self, own: Support, x: Tensor) -> Tensor:
        return x * own.vector(x.device) if own.along else product(own, x)

    def _of_bias(self) -> Tensor | None:
        """Return what is added to the bias."""
        total: Tensor | None = None
        with without_autocast(self.x.device):
            for own in self.of_bias:
                support = own.form(self.x.device)
                # A cast weight would be a copy of it, and all that is made of it is a vector.
                cast = support.to(self.weight.dtype)
                found = operations.changed(own.operation, cast, self.weight, self.bias)
                found = found.to(support.dtype)
                total = found if total is None else total + found
        return total


def _own(y: Tensor | None, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if y is not None:
        return y
    assert weight is not None
    return linear(x, weight, bias)


def changed_by(
    held: Base, supports: Sequence[Support], form: Callable[[Support], Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """Return what support tensors, those of several adapters, add to a layer's weight and bias."""
    of_weight: Tensor | None = None
    of_bias: Tensor | None = None
    for own in by_adapter(supports):
        found = _changes(held, own, form)
        of_weight, of_bias = map(_sum, (of_weight, of_bias), found)
    return of_weight, of_bias


def by_adapter(supports: Sequence[Support]) -> list[list[Support]]:
    """Return the support tensors of each adapter."""
    found: dict[int, list[Support]] = {}
    for own in supports:
        found.setdefault(id(own.blocks.scope), []).append(own)
    return list(found.values())


def _sum(total: Tensor | None, found: Tensor | None) -> Tensor | None:
    return found if total is None else total if found is None else total + found


def _changes(
    held: Base, supports: Sequence[Support], form: Callable[[Support], Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    weight, bias = held.own_weight, held.own_bias
    found: dict[str, Tensor] = {}
    for own in supports:
        delta = form(own).to(weight.device)
        if own.rows is not None:
            start, stop = own.rows
            whole = delta.new_zeros(weight.shape)
            whole[start:stop] = delta
            delta = whole
        both = found.get(own.operation)
        found[own.operation] = delta if both is None else both + delta
    if found.keys() == {ADD}:
        return found[ADD], None
    wide = torch.promote_types(weight.dtype, next(iter(found.values())).dtype)
    # A copy: the last bit of a product depends on how its operands are aligned, which in a mapped
    # file is anyhow.
    return operations.changes(
        weight.to(wide, copy=True),
        None if bias is None else bias.to(wide),
        {operation: own.to(wide) for operation, own in found.items()},
    )
