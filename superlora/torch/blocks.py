"""`Blocks`: where the blocks of a plan are registered, and what is computed from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from superlora.algebra.form import map_slice, source_array, with_blocks
from superlora.algebra.frozen import each_frozen
from superlora.algebra.init import each_factor
from superlora.design.network import Source, network_of
from superlora.plan import Plan
from superlora.torch.autograd import without_autocast
from superlora.torch.scope import Scope
from superlora.torch.sharded import gathered, spread


class Place(NamedTuple):
    """The module that registers a block, under which name, and the part that the block is."""

    owner: nn.Module
    leaf: str
    frozen: bool
    part: tuple[slice | int, ...] | None = None

    def read(self) -> Tensor:
        """Return the block."""
        held = self.owner._buffers if self.frozen else self.owner._parameters
        found = held[self.leaf]
        assert found is not None
        return found if self.part is None else found[self.part]


@dataclass
class Scale:
    """The number in front of updates, and the tensor of it that compiled code reads."""

    value: float
    number: Tensor = field(compare=False)


class Blocks(Mapping[str, Tensor]):
    """The blocks of a plan by name; they are read from the modules that register them.

    Parameters
    ----------
    plan : Plan
        What lies where.
    places : mapping of str to Place
        One for each of ``plan.factor_shapes`` and ``plan.frozen_shapes``.
    whole : Blocks, optional
        The blocks of the same adapter that these are parts of: scope and scales are theirs.

    Attributes
    ----------
    first : Place
        The first factor, whose dtype all have.
    scope : Scope
        What layers share during a forward pass.
    scales : dict of str to Scale
        The numbers in front of the updates.
    """

    scope: Scope
    scales: dict[str, Scale]
    # Two adapters with the same numbers are two.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __init__(
        self, plan: Plan, places: Mapping[str, Place], whole: Blocks | None = None
    ) -> None:
        self.plan, self.places = plan, places
        layout = plan.layout
        self.first = places[next(iter(layout.factor_shapes))]
        if whole is not None:
            self.scope, self.scales = whole.scope, whole.scales
            return
        self.scope = Scope()
        planned = {name: layout.scaling(name) for name in layout.shapes}
        with torch.inference_mode(False):
            held = {
                own: Scale(own, torch.tensor(own, dtype=torch.float64, device="cpu"))
                for own in dict.fromkeys(planned.values())
            }
        self.scales = {name: held[own] for name, own in planned.items()}
        self._scale = plan.scale

    def __getitem__(self, name: str) -> Tensor:
        return self.places[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def dtype(self) -> torch.dtype:
        """The factors' dtype."""
        return self.first.read().dtype

    @property
    def scale(self) -> float:
        """The number in front of all updates, which those of overrides are in proportion to."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._scale = value
        layout, planned = self.plan.layout, self.plan.scale
        for name, scale in self.scales.items():
            scale.value = float(scale_in_force(layout.scaling(name), planned, value))
            scale.number.fill_(scale.value)

    def device_of(self, name: str) -> torch.device:
        """Return where the blocks of one weight's update lie."""
        names = self.plan.blocks_of(name)  # says which weights there are, if this is none
        return self[names[0]].device

    def gathered(self, names: Iterable[str] | None = None) -> AbstractContextManager[Any]:
        """Let blocks that processes share be whole inside a ``with`` block, which all enter."""
        places = (self.places[name] for name in (self.places if names is None else names))
        return gathered((place.owner, place.leaf) for place in places)

    def tensors(self, names: Sequence[str]) -> list[Tensor]:
        """Return trained tensors and frozen blocks by name."""
        return [self[name] for name in names]

    def inputs_of(
        self, blocks: Sequence[str]
    ) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], list[Tensor]]]:
        """Return the tensors that blocks are made of, and what makes them of such tensors."""
        layout = self.plan.layout
        inner = layout.inner
        names = list(dict.fromkeys(inner[b].name if b in inner else b for b in blocks))
        tensors = self.tensors(names)
        device = tensors[0].device if tensors else None

        def make(given: Sequence[Tensor]) -> list[Tensor]:
            moved = {name: own.to(device) for name, own in zip(names, given, strict=True)}
            found = with_blocks(layout, moved, blocks)
            return [found[block] for block in blocks]

        return tensors, make

    def sources(self, sources: Sequence[Source]) -> list[Tensor]:
        """Return the arrays of sources, differentiably."""
        layout = self.plan.layout
        tensors, make = self.inputs_of([source.block for source in sources])
        with without_autocast(tensors[0].device):
            return [
                source_array(layout, source, block)
                for source, block in zip(sources, make(tensors), strict=True)
            ]

    @torch.no_grad()
    def draw(self, seed: int, frozen: bool = False) -> None:
        """Draw the initial factors anew, and the frozen blocks if asked to."""
        for block, drawn in each_factor(self.plan.layout, seed):
            self[block].copy_(spread(torch.from_numpy(drawn), self[block]))
        # What depends on the weights comes with the state dict that fills them.
        for block, made in each_frozen(self.plan.layout, singular=False) if frozen else ():
            self[block].copy_(spread(torch.from_numpy(made), self[block]))

    @torch.no_grad()
    def prepare(self) -> None:
        """Let maps draw what they keep, which compiled code only reads."""
        layout = self.plan.layout
        done: set[object] = set()
        for name, pieces in layout.grouping.pieces.items():
            device = self.device_of(name)
            for piece in pieces:
                fixed = layout.maps[piece.group]
                before, size = layout.joint_sizes(piece.group)
                bounds = layout.position(piece) if fixed.sliced else (0, size)
                key: object = (id(fixed), before, size, bounds, device)
                if fixed.in_place:
                    key = (piece.group, device)
                if device.type == "meta" or key in done or not getattr(fixed, "stored", True):
                    continue
                done.add(key)
                if not fixed.in_place:
                    map_slice(fixed, torch.zeros(before, device=device), size, *bounds)
                elif fixed.mapped(len(layout.groups[piece.group].fold)):
                    self.sources(network_of(layout, name).sources)
                if layout.multiplies(name):
                    x = torch.zeros((1, layout.shapes[name][1]), device=device)
                    fixed.multiply(torch.zeros(before, device=device), x)
        for inner in dict.fromkeys(layout.inner.values()):
            theta = self[inner.name]
            if not theta.is_meta:
                inner.map.apply_slice(theta, inner.size, inner.start, inner.stop)


def register_blocks(module: nn.Module, plan: Plan, values: Mapping[str, Tensor]) -> Blocks:
    """Let a module register blocks, named ``"group.split.block"``: parameters and buffers."""
    shapes = plan.layout.input_shapes
    for block, shape in shapes.items():
        if tuple(values[block].shape) != shape:
            raise ValueError(
                f"factors[{block!r}] must have shape {shape}: got {tuple(values[block].shape)}"
            )
    return Blocks(plan, {block: _register(module, plan, block, values[block]) for block in shapes})


def _register(module: nn.Module, plan: Plan, block: str, values: Tensor) -> Place:
    owner = module
    *path, leaf = block.split(".")
    for key in path:
        if key not in owner._modules:
            owner.add_module(key, nn.Module())
        owner = owner.get_submodule(key)
    source = plan.layout.frozen.get(block)
    # Made under `torch.inference_mode` a tensor could never be trained.
    with torch.inference_mode(False):
        values = values.clone() if values.is_inference() else values
        if source is None:
            owner.register_parameter(leaf, nn.Parameter(values))
        else:  # what the spec alone decides is in no state dict
            # Contiguous, as files of tensors have to be.
            kept = source not in ("random", "ones")
            owner.register_buffer(leaf, values.contiguous(), persistent=kept)
    return Place(owner, leaf, source is not None)


def scale_in_force(own: float, planned: float, scale: float) -> float:
    """Return a layer's scale after the adapter's was set."""
    if scale == planned:
        return own
    return scale if own == planned else scale * (own / planned)
