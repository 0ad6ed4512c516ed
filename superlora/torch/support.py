"""`Support`: one support tensor of an adapter, and how a layer applies it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from superlora.algebra.form import joint_entries
from superlora.design.cost_rule import FORMED, application
from superlora.design.supports import ADD
from superlora.torch.autograd import autocasts, is_traced, without_autocast
from superlora.torch.blocks import Blocks, Place
from superlora.torch.operands import Operands, Shared, formed_operands
from superlora.torch.update import (
    Call,
    FactoredWay,
    FormedWay,
    MultipliedWay,
    Way,
    apply_way,
)

# Entries of an update that are formed at once: few enough for a core's cache.
_CHUNK = 1 << 18


class Support:
    """One support tensor of an adapter: what is prepared for it, and where its blocks are.

    Parameters
    ----------
    blocks : Blocks
        Where its blocks are.
    name : str
        Its name in their plan.

    Attributes
    ----------
    operation : str
        The merge operation.
    scale : Scale
        The number in front of it.
    along : str
        What its vector is repeated along; empty where it is no repeated vector.
    rows : tuple of (int, int) or None
        Which rows of the layer's weight it is added to, where these are not all.
    """

    def __init__(self, blocks: Blocks, name: str) -> None:
        layout = blocks.plan.layout
        self.blocks, self.name, self.scale = blocks, name, blocks.scales[name]
        layer = layout.layer_of[name]
        self.operation = next(op for op, own in layout.supports[layer].items() if own == name)
        self.shape = layout.shapes[name]
        group = layout.grouping.pieces[name][0].group
        of_weight = self.operation in (ADD, "scale_weight")
        self.along = layout.maps[group].repeated() if of_weight else ""
        # Whether it is an update of the weight, and no repeated vector.
        self.plain = self.operation == ADD and not self.along
        self.rows: tuple[int, int] | None = None
        self.scales_weight = self.operation == "scale_weight"
        self.application = application(layout, name)
        self.operands = formed_operands(layout, name)
        self.way: Way | None = None
        if layout.multiplies(name) and not self.scales_weight:
            self.way = MultipliedWay(layout, name)
        elif self.application.factored is not None:
            self.way = FactoredWay(layout, name, self.application.factored)
        for own in (self.operands, *(self.way.operands if self.way else ())):
            own.registered = _registered(blocks, own)
        copied = self.application.forming.multiplications <= math.prod(self.shape)
        mixed = self.operands.leading and self.operands.opened is None
        # How many rows are best formed at once; 0 for all of them.
        self.chunk = 0 if copied or mixed else max(1, _CHUNK // self.shape[1])

    def cut_to(self, rows: tuple[int, int]) -> None:
        """Let the support be added to some rows of the layer's weight alone."""
        self.rows, self.plain = rows, False

    def shared(self) -> list[Shared]:
        """Return what layers may share of it."""
        every = [self.operands, *(self.way.operands if self.way else ())]
        return [each for own in every for each in own.shared]

    def given(self, operands: Operands, device: torch.device) -> list[Tensor]:
        """Return the tensors that operands are made of."""
        if operands.registered is None:
            found = [array.to(device) for array in self.blocks.sources(operands.own)]
        else:
            found = []
            for owner, leaf, frozen, part in operands.registered:  # as `Place.read`, at less cost
                block = owner._buffers[leaf] if frozen else owner._parameters[leaf]
                assert block is not None
                block = block if part is None else block[part]
                found.append(block if block.device == device else block.to(device))
        if not operands.shared:
            return found
        return [*[each.take(self.blocks) for each in operands.shared], *found]

    def is_formed(self, tokens: int, fused: bool) -> bool:
        """Return whether the support is best formed for so many inputs."""
        applied = self.blocks.scope.applied
        if self.way is None or applied == FORMED:
            return True
        if applied != "auto" or is_traced():  # no compiler is to see a number of tokens compared
            # One product with each rank would cost more, but for few tokens.
            return self.scales_weight
        bound = self.application.bounds[torch.is_grad_enabled(), fused]
        return bound is not None and tokens >= bound

    def factored(
        self,
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        base: Tensor | None = None,
    ) -> Tensor:
        """Return the product with the support, not formed, and with the layer's weight if given."""
        way = self.way
        assert way is not None
        operands = way.operands[0]
        tensors = self.given(operands, x.device)
        if base is not None:
            tensors = [*tensors, base]
        values = self.blocks.scope.values() if way.whole else None
        if weight is None:
            dtype = tensors[0].dtype
            if autocasts(x.device):
                values, dtype = None, torch.get_autocast_dtype(x.device.type)
            tensors = [tensor.to(dtype) for tensor in tensors]
            x = x.to(dtype)
        scale = self.scale.number if torch.compiler.is_compiling() else self.scale.value
        return apply_way(way, Call(x, weight, bias, tensors, scale), [values])

    def form(self, device: torch.device) -> Tensor:
        """Return the support tensor itself, the scale multiplied in; autocasting must be off."""
        own = self.operands
        tensors = self.given(own, device)
        rows = (0, self.shape[0])
        if own.shared:
            count = len(own.shared)
            tensors = [*own.cut(tensors[:count], rows, device), *tensors[count:]]
        found = own.form(tensors, rows)
        if torch.compiler.is_compiling():
            return found * self.scale.number
        return found if self.scale.value == 1 else found * self.scale.value

    def delta(self) -> Tensor:
        """Form the support tensor; never the memory of a block."""
        device = self.blocks.device_of(self.name)
        # The same bits as where layers share what they are cut from; never what a pass of the
        # model made, which may have been interrupted.
        scope = self.blocks.scope
        shared = nullcontext() if scope.in_block else scope.opened()
        read = self.blocks.plan.layout.inputs_of(self.name)
        with self.blocks.gathered(read), without_autocast(device), shared:
            found = self.form(device)
        # What the caller changes must be no factor: a support of one block alone may be one.
        return found * 1.0

    def vector(self, device: torch.device) -> Tensor:
        """Return the vector that is repeated, the scale multiplied in."""
        layout = self.blocks.plan.layout
        group = layout.grouping.pieces[self.name][0].group
        names = layout.blocks_of_groups(layout.joint(group))
        tensors, make = self.blocks.inputs_of(names)
        with without_autocast(device):
            given = dict(zip(names, make(tensors), strict=True))
            entries: Tensor = joint_entries(layout, given, group)
            compiled = torch.compiler.is_compiling()
            return (entries * (self.scale.number if compiled else self.scale.value)).to(device)


def _registered(own: Blocks, operands: Operands) -> list[Place] | None:
    """Return where blocks are registered, if operands are these as they are."""
    layout = own.plan.layout
    blocks = [source.block for source in operands.own]
    whole = all(layout.block_shapes[source.block] == source.shape for source in operands.own)
    if not whole or any(source.modes for source in operands.own):
        return None
    if any(block in layout.inner for block in blocks):
        return None
    return [own.places[block] for block in blocks]


def sum_output(
    supports: Sequence[Support],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Callable[[], Tensor],
    own_weight: Tensor | None = None,
) -> Tensor:
    """Return a layer's output with updates that are added to its weight, or scale it."""
    # Flat, since what a Function returns must be no view to be changed in place afterwards.
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    formed: list[Support] = []
    rest: list[Support] = []
    for support in supports:
        alike = support.is_formed(flat.shape[0], weight is not None)
        (formed if alike else rest).append(support)
    y: Tensor | None = None
    if weight is not None and formed:
        y = _formed_product(formed, flat, weight, bias, own_weight)
        formed = []
    elif weight is not None and rest and not autocasts(x.device):
        first = rest.pop(0)
        y = first.factored(flat, weight, bias, own_weight if first.scales_weight else None)
    if y is None:
        y = base()
        y = y if y.dim() == 2 else y.reshape(-1, y.shape[-1])
    if formed:
        y = y + _formed_product(formed, flat, None, None, own_weight).to(y.dtype)
    for support in rest:
        own = own_weight if support.scales_weight else None
        y = y + support.factored(flat, base=own).to(y.dtype)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


def product(support: Support, x: Tensor) -> Tensor:
    """Return the product of inputs, (..., width), with a support tensor's transpose."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if support.is_formed(flat.shape[0], False):
        y = _formed_product([support], flat, None, None, None)
    else:
        y = support.factored(flat)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


def _formed_product(
    supports: Sequence[Support],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    own_weight: Tensor | None,
) -> Tensor:
    """Multiply inputs by the sum of formed supports, and of the weight if it is given."""
    compiled = torch.compiler.is_compiling()
    shared: list[Tensor] = []
    blocks: list[Tensor] = []
    for support in supports:
        tensors = support.given(support.operands, x.device)
        count = len(support.operands.shared)
        shared += tensors[:count]
        blocks += tensors[count:]
    scaling = [support.scales_weight for support in supports]
    if any(scaling):
        assert own_weight is not None
        blocks.append(own_weight)
    way = FormedWay(
        [support.operands for support in supports],
        scaling,
        [support.scale.number if compiled else support.scale.value for support in supports],
        min([support.chunk for support in supports]),
    )
    # A layer's supports may be of several adapters, each of which has a scope of its own.
    kept = [support.blocks.scope.values() for support in supports] if way.whole else ()
    return apply_way(way, Call(x, weight, bias, [*shared, *blocks], 1.0), kept)
