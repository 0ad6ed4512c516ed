"""What the merge operations do to a layer's output, and to its weight and bias."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from superlora import operations
from superlora.costs import FORMED
from superlora.maps import Broadcast
from superlora.operations import OF_BIAS
from superlora.reconstruct import joint_entries
from superlora.supports import ADD, OPERATIONS
from superlora.torch.formed import without_autocast
from superlora.torch.layers import bias_of, weight_of

if TYPE_CHECKING:
    from superlora.torch.adapter import Adapter
    from superlora.torch.site import Site


@dataclass(frozen=True, eq=False)
class Part:
    """One support tensor of one adapter in a layer.

    Attributes
    ----------
    adapter : Adapter
        Whose it is.
    operation : str
        What it does.
    name : str
        Its name in the adapter's plan.
    group : int
        The first group that it lies in.
    along : str
        What its vector is repeated along; empty where it is no repeated vector.
    """

    adapter: Adapter
    operation: str
    name: str
    group: int
    along: str

    @classmethod
    def of(cls, adapter: Adapter, operation: str, name: str) -> Part:
        """Return an adapter's support tensor of a name."""
        layout = adapter.plan.layout
        group = layout.grouping.pieces[name][0].group
        fixed = layout.maps[group]
        of_weight = operation in (ADD, "scale_weight")
        along = fixed.along if of_weight and isinstance(fixed, Broadcast) else ""
        return cls(adapter, operation, name, group, along)

    @property
    def plain(self) -> bool:
        """Whether it is an update of the weight, and no repeated vector."""
        return self.operation == ADD and not self.along

    def form(self, device: torch.device) -> Tensor:
        """Return the support tensor itself."""
        return self.adapter.form(self.name, self.adapter.blocks(self.name, device))

    def vector(self, device: torch.device) -> Tensor:
        """Return the vector that is repeated."""
        blocks = self.adapter.blocks(self.name, device)
        with without_autocast(device):
            found: Tensor = joint_entries(self.adapter.plan.layout, blocks, self.group)[0]
        return found


def site_parts(adapter: Adapter, layer: str) -> tuple[Part, ...]:
    """Return an adapter's support tensors in a layer, in the order of the operations.

    Parameters
    ----------
    adapter : Adapter
        The adapter.
    layer : str
        The layer's name in its plan.

    Returns
    -------
    tuple of Part
        One for each operation.
    """
    own = adapter.plan.layout.supports[layer]
    return tuple(Part.of(adapter, op, own[op]) for op in OPERATIONS if op in own)


class Supported:
    """What support tensors of any operations make of a layer's inputs.

    Parameters
    ----------
    site : Site
        The layer's.
    parts : sequence of Part
        The support tensors.
    x : torch.Tensor, (..., input width)
        Inputs.
    """

    def __init__(self, site: Site, parts: Sequence[Part], x: Tensor) -> None:
        self.site, self.x = site, x
        self.weight, own = site.own_weight, site.own_bias
        # By where they act: on the inputs, on the outputs, as an update, on the bias.
        scaling = [p for p in parts if p.operation == "scale_weight"]
        adding = [p for p in parts if p.operation == ADD]
        self.inner = [p for p in parts if p.operation == "right_weight"]
        self.inner += [p for p in scaling if p.along == "outputs"]
        self.outer = [p for p in parts if p.operation == "left_weight"]
        self.outer += [p for p in scaling if p.along in ("all", "inputs")]
        self.sums = [p for p in adding + scaling if not p.along]
        self.repeated = [p for p in adding if p.along]
        self.of_bias = [
            p
            for p in parts
            if p.operation in OF_BIAS and not (p.operation == "scale_bias" and own is None)
        ]

    def output(self, fused: bool, base: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the layer's whole output.

        Parameters
        ----------
        fused : bool
            Whether the layer's own forward is a product with the weight and nothing else, and
            one product can take the place of several.
        base : callable
            That forward.

        Returns
        -------
        torch.Tensor, (..., output width)
            The output.
        """
        site, x = self.site, self.x
        shift, bias = self._shift(), self._bias()
        formed, rest = site.divided(self.sums, x, fused)
        if fused and formed and shift is None and not self.outer:
            total = bias_of(site.module)
            total = total if bias is None else bias if total is None else total + bias
            return self._with(site.formed(formed, x, weight_of(site.module), total), rest)
        z = None
        if shift is None:
            y = base(x)
        elif site.merged or site.wrapped:  # which is not to see what is done to the inputs
            y = base(x) + self._times(shift)
        else:
            y = base(x + shift)
        if fused and self.outer and shift is None and not site.merged:
            # A product without the bias would cost as much again; y is the layer's own to the bit.
            own = bias_of(site.module)
            z = y if own is None else y - own.to(y.dtype)
        if formed:
            y = y + site.formed(formed, x, None, None).to(y.dtype)
        y = self._with(self._outside(y, z), rest)
        return y if bias is None else y + bias.to(y.dtype)

    def added(self) -> Tensor:
        """Return the support tensors' part of the output.

        Returns
        -------
        torch.Tensor, (..., output width)
            What `output` adds to the layer's own.
        """
        site, x = self.site, self.x
        shift, bias = self._shift(), self._bias()
        y = x.new_zeros(*x.shape[:-1], self.weight.shape[0])
        y = y if shift is None else self._times(shift)
        formed, rest = site.divided(self.sums, x, fused=False)
        if formed:
            y = y + site.formed(formed, x, None, None).to(y.dtype)
        y = self._with(self._outside(y, None), rest)
        return y if bias is None else y + bias.to(y.dtype)

    def _times(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype))

    def _with(self, y: Tensor, rest: Sequence[tuple[Part, str]]) -> Tensor:
        for part, way in rest:
            y = y + part.adapter.update(part.name, self.x, way).to(y.dtype)
        for part in self.repeated:
            vector = part.vector(self.x.device)
            x = self.x.to(vector.dtype)
            # A product with v 1ᵀ, 1 vᵀ or v 1 1ᵀ, of which none is formed.
            if part.along == "outputs":
                y = y + (x * vector).sum(-1, keepdim=True).to(y.dtype)
            else:
                y = y + (x.sum(-1, keepdim=True) * vector).to(y.dtype)
        return y

    def _shift(self) -> Tensor | None:
        """Return what is added to the inputs of the base."""
        total = None
        for part in self.inner:
            own = self.x * part.vector(self.x.device) if part.along else self._product(part, self.x)
            own = own.to(self.x.dtype)
            total = own if total is None else total + own
        return total

    def _outside(self, y: Tensor, z: Tensor | None) -> Tensor:
        """Add what is made of the base's outputs without its bias, `z` if they are known."""
        for part in self.outer:
            z = self._times(self.x) if z is None else z
            own = z * part.vector(z.device) if part.along else self._product(part, z)
            y = y + own.to(y.dtype)
        return y

    def _product(self, part: Part, x: Tensor) -> Tensor:
        way = part.adapter.way(part.name, x, fused=False)
        if way == FORMED:
            return self.site.formed([part], x, None, None)
        return part.adapter.update(part.name, x, way)

    def _bias(self) -> Tensor | None:
        """Return what is added to the bias."""
        total, own = None, self.site.own_bias
        with without_autocast(self.x.device):
            for part in self.of_bias:
                support = part.form(self.x.device)
                # A cast weight would be a copy of it, and all that is made of it is a vector.
                found = operations.change(
                    part.operation, support.to(self.weight.dtype), self.weight, own
                ).to(support.dtype)
                total = found if total is None else total + found
        return total


@torch.no_grad()
def site_changes(site: Site, parts: Sequence[Part]) -> tuple[Tensor | None, Tensor | None]:
    """Return what merging support tensors adds to a layer's weight and bias.

    Parameters
    ----------
    site : Site
        The layer's.
    parts : sequence of Part
        The support tensors of one adapter.

    Returns
    -------
    torch.Tensor, (output width, input width), or None
        None where no operation changes the weight.
    torch.Tensor, (output width,), or None
        None where no operation changes the bias.
    """
    weight, bias = site.own_weight, site.own_bias
    supports = {part.operation: part.adapter.delta(part.name) for part in parts}
    found = {operation: own.to(weight.device) for operation, own in supports.items()}
    if found.keys() == {ADD}:
        return found[ADD], None
    wide = torch.promote_types(weight.dtype, next(iter(found.values())).dtype)
    return operations.changes(
        weight.to(wide),
        None if bias is None else bias.to(wide),
        {operation: own.to(wide) for operation, own in found.items()},
    )
