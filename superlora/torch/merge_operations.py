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
        self.of_bias: list[Support] = []
        for own in supports:
            if own.operation in OF_BIAS:
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
        if self.outer or self.repeated:
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
        return y

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


@torch.no_grad()
def merged_changes(held: Base, supports: Sequence[Support]) -> tuple[Tensor | None, Tensor | None]:
    """Return what merging support tensors adds to a layer's weight and bias."""
    weight, bias = held.own_weight, held.own_bias
    found = {own.operation: own.delta().to(weight.device) for own in supports}
    if not found:
        return None, None
    if found.keys() == {ADD}:
        return found[ADD], None
    wide = torch.promote_types(weight.dtype, next(iter(found.values())).dtype)
    return operations.changes(
        weight.to(wide),
        None if bias is None else bias.to(wide),
        {operation: own.to(wide) for operation, own in found.items()},
    )
