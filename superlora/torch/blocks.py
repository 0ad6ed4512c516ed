"""`Blocks`: a plan's blocks as parameters and buffers, and what is computed from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from superlora.frozen import frozen_blocks
from superlora.maps import Identity, Separable
from superlora.plan import Plan
from superlora.reconstruct import (
    apply_factored,
    joint_entries,
    map_slice,
    scaled,
    weight_delta,
    with_blocks,
)
from superlora.torch.formed import autocasts, without_autocast
from superlora.torch.shared import Shared
from superlora.uses import joint_sizes


class Blocks(nn.Module):
    """The blocks of a plan, named ``"group.split.block"``: the trainable ones are parameters.

    Parameters
    ----------
    plan : Plan
        What lies where.
    blocks : mapping of str to torch.Tensor
        One tensor for each of ``plan.factor_shapes`` and ``plan.frozen_shapes``.
    """

    def __init__(self, plan: Plan, blocks: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.plan = plan
        self._scale = plan.scale
        self._seed = 0  # of the initial factors
        self._scales = {name: plan.layout.scaling(name) for name in plan.shapes}
        self._names = {name: plan.blocks_of(name) for name in plan.shapes}
        # The update is linear in each block, so the scale goes into the smallest of
        # every product: one place for forward, backward, merge and export.
        self._scaled = {name: plan.layout.smallest_blocks(name) for name in plan.shapes}
        self._shared = Shared(plan.layout)
        # Of what a map takes together; a plain dict, which torch.compile traces.
        self._together: dict[int, tuple[str, ...]] = {}
        for first in self._shared.groups(plan.shapes):
            self._together[first] = plan.layout.inputs_of_joint(first)
        for name in plan.shapes:
            plan.layout.prepare(name)
        for block, shape in plan.layout.input_shapes.items():
            if tuple(blocks[block].shape) != shape:
                raise ValueError(
                    f"factors[{block!r}] must have shape {shape}: got {tuple(blocks[block].shape)}"
                )
            self._register(block, blocks[block], plan.layout.frozen.get(block))
        self._prepare_maps()

    def _register(self, block: str, values: Tensor, source: str | None) -> None:
        *path, leaf = block.split(".")
        owner: nn.Module = self
        for key in path:
            if key not in owner._modules:
                owner.add_module(key, nn.Module())
            owner = owner.get_submodule(key)
        # Made under `torch.inference_mode` a tensor could never be trained.
        with torch.inference_mode(False):
            values = values.clone() if values.is_inference() else values
            if source is None:
                owner.register_parameter(leaf, nn.Parameter(values))
            else:  # what the spec alone decides is in no state dict
                owner.register_buffer(leaf, values, persistent=source not in ("random", "ones"))

    @property
    def num_parameters(self) -> int:
        """Trainable entries of all factors."""
        return self.plan.num_parameters

    @property
    def dtype(self) -> torch.dtype:
        """The factors' dtype."""
        return next(self.parameters()).dtype

    def factors(self) -> dict[str, Tensor]:
        """Return all blocks by name, frozen ones too: the form that ``Plan`` takes.

        Returns
        -------
        dict of str to torch.Tensor
            The parameters and buffers themselves.
        """
        return {block: self._block(block) for block in self.plan.layout.input_shapes}

    @torch.no_grad()
    def draw(self, seed: int, frozen: bool = False) -> None:
        """Draw the initial factors anew, and the frozen blocks if asked to."""
        values = self.plan.init(seed, like=numpy.float64)
        if frozen:
            # What depends on the weights comes with the state dict that fills them.
            values |= frozen_blocks(self.plan.layout, like=numpy.float64, singular=False)
        for block, drawn in values.items():
            self._block(block).copy_(torch.from_numpy(drawn))

    def _apply(self, *arguments: Any, **options: Any) -> Blocks:
        empty = any(parameter.is_meta for parameter in self.parameters())
        super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]
        # Memory given to factors that had none (`Module.to_empty`) holds anything.
        if empty and not any(parameter.is_meta for parameter in self.parameters()):
            self.draw(self._seed, frozen=True)
        self._shared.clear()
        self._prepare_maps()
        return self

    @torch.no_grad()
    def _prepare_maps(self) -> None:
        """Let the maps draw what they keep now, so that compiled code only reads it."""
        layout = self.plan.layout
        done = set()
        for name, pieces in layout.grouping.pieces.items():
            device = self._device(name)
            for piece in pieces:
                fixed = layout.maps[piece.group]
                kept = getattr(fixed, "stored", True) and not isinstance(fixed, Identity)
                if not kept or device.type == "meta":
                    continue
                if isinstance(fixed, Separable):
                    self.form(name, self.blocks(name, device))
                    continue
                before, size = joint_sizes(layout, piece.group)
                bounds = layout.position(piece) if fixed.sliced else (0, size)
                key = (id(fixed), before, size, bounds, device)
                if key not in done:
                    done.add(key)
                    map_slice(fixed, torch.zeros(before, device=device), size, *bounds)
        for inner in dict.fromkeys(layout.inner.values()):
            theta = self._block(inner.name)
            if not theta.is_meta:
                inner.map.apply_slice(theta, inner.size, inner.start, inner.stop)

    def delta(self, name: str) -> Tensor:
        """Form one layer's update.

        Parameters
        ----------
        name : str
            The layer's dotted name.

        Returns
        -------
        torch.Tensor, (output width, input width)
            ``scale * ΔW``, differentiable.

        Raises
        ------
        KeyError
            If the adapter has no layer of that name.
        """
        found = self.form(name, self.blocks(name, self._device(name)))
        self._shared.release(name)
        return found

    def deltas(self) -> dict[str, Tensor]:
        """Form the updates of all layers.

        Returns
        -------
        dict of str to torch.Tensor
            ``scale * ΔW`` for each layer, (output width, input width).
        """
        return {name: self.delta(name) for name in self.plan.shapes}

    def _device(self, name: str) -> torch.device:
        self.plan.blocks_of(name)  # names the layers there are, if this is none
        return self._block(self._names[name][0]).device

    def blocks(self, name: str, device: torch.device) -> dict[str, Tensor]:
        """Return what one layer's update is made of: its blocks, the scale multiplied in."""
        scale = self.scale_of(name)
        if self._shared.serves(name):
            parts = self._shared.parts(name, self._tensors_of, self._entries(scale), scale)
            return {str(index): part.to(device) for index, part in enumerate(parts)}
        layout = self.plan.layout
        blocks = {block: self._block(block).to(device) for block in self._names[name]}
        if layout.inner:
            own = layout.blocks_of(name)
            with without_autocast(device):
                blocks = dict(with_blocks(layout, blocks, own))
            blocks = {block: blocks[block] for block in own}
        if scale != 1:
            for block in self._scaled[name]:
                blocks[block] = blocks[block] * scale
        return blocks

    def _tensors_of(self, group: int) -> tuple[Tensor, ...]:
        """Return all that a group and those that its map takes with it are made from."""
        return tuple(self._block(block) for block in self._together[group])

    def _entries(self, scale: float) -> Any:
        # Not this module, which holds what is made of them.
        layout, together = self.plan.layout, self._together

        def entries(group: int, tensors: Sequence[Tensor]) -> Tensor:
            names = together[group]
            device = tensors[0].device
            given = {n: tensor.to(device) for n, tensor in zip(names, tensors, strict=True)}
            found = with_blocks(layout, given, layout.blocks_of_joint(group))
            x: Tensor = scaled(joint_entries(layout, found, group)[0], scale)
            return x

        return entries

    def scale_of(self, name: str) -> float:
        """Return the number in front of one layer's update."""
        own = self._scales[name]
        if self._scale == self.plan.scale:
            return own
        # An override's scale changes in proportion.
        return self._scale if own == self.plan.scale else self._scale * (own / self.plan.scale)

    def form(self, name: str, blocks: Mapping[str, Tensor]) -> Tensor:
        """Form one layer's update from what `blocks` gave."""
        device = next(iter(blocks.values())).device
        if self._shared.serves(name):
            return torch.cat(list(blocks.values())).reshape(self.plan.layout.shapes[name])
        with without_autocast(device):
            delta: Tensor = weight_delta(self.plan.layout, blocks, name, 1.0)
        return delta

    def applies_factored(self, name: str) -> bool:
        """Return whether the layer's update is applied without being formed."""
        return self.plan.layout.applies_factored(name)

    def apply_factored(self, name: str, x: Tensor) -> Tensor:
        """Multiply by one layer's update without forming it."""
        blocks = self.blocks(name, x.device)
        dtype = next(iter(blocks.values())).dtype
        if autocasts(x.device):
            dtype = torch.get_autocast_dtype(x.device.type)
            blocks = {block: factor.to(dtype) for block, factor in blocks.items()}
        y: Tensor = apply_factored(self.plan.layout, blocks, name, x.to(dtype), 1.0)
        return y

    def _block(self, block: str) -> Tensor:
        group, split, leaf = block.split(".")
        owner = self._modules[group]._modules[split]  # type: ignore[union-attr]
        found = owner._parameters.get(leaf)  # type: ignore[union-attr]
        return found if found is not None else owner._buffers[leaf]  # type: ignore[union-attr, return-value]
