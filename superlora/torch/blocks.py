"""`Blocks`: a plan's blocks as parameters and buffers, and what is computed from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from superlora.costs import FORMED, check_apply, choose
from superlora.frozen import each_frozen
from superlora.init import each_factor
from superlora.maps import Fourier, Identity, Separable
from superlora.plan import Plan
from superlora.reconstruct import map_slice, weight_delta
from superlora.terms import joined, mapped_blocks, with_blocks
from superlora.torch.formed import Pull, autocasts, linearized, run, transforms, without_autocast
from superlora.torch.machine import calibrate_once, machine_of
from superlora.torch.products import LayerProduct, Recomputed, low_rank
from superlora.torch.shared import Read
from superlora.torch.sources import LEFT, RIGHT, Entered, Sources, scale_in_force
from superlora.uses import joint_sizes

# Entries of an update that are formed at once: few enough for a core's cache.
_CHUNK = 1 << 18


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
        # What compiled code multiplies by, so that it need not be compiled again.
        with torch.inference_mode(False):
            self._numbers = {
                own: torch.tensor(own, dtype=torch.float64, device="cpu")
                for own in dict.fromkeys(self._scales.values())
            }
        self._sources = Sources(plan.layout)
        self._applied = "auto"
        for name in plan.shapes:
            plan.layout.prepare(name)
        for block, shape in plan.layout.input_shapes.items():
            if tuple(blocks[block].shape) != shape:
                raise ValueError(
                    f"factors[{block!r}] must have shape {shape}: got {tuple(blocks[block].shape)}"
                )
            self._register(block, blocks[block], plan.layout.frozen.get(block))
        self._prepare()

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

    @property
    def applied(self) -> str:
        """How the layers apply their updates: ``"auto"``, ``"factored"`` or ``"formed"``.

        It can be set; ``"auto"`` takes what costs least for a layer and its number of tokens.
        """
        return self._applied

    @applied.setter
    def applied(self, value: str) -> None:
        check_apply(value, self.plan.layout)
        self._applied = value

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
        for block, drawn in each_factor(self.plan.layout, seed):
            self._block(block).copy_(torch.from_numpy(drawn))
        # What depends on the weights comes with the state dict that fills them.
        for block, made in each_frozen(self.plan.layout, singular=False) if frozen else ():
            self._block(block).copy_(torch.from_numpy(made))

    def _apply(self, *arguments: Any, **options: Any) -> Blocks:
        empty = any(parameter.is_meta for parameter in self.parameters())
        super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]
        # Memory given to factors that had none (`Module.to_empty`) holds anything.
        if empty and not any(parameter.is_meta for parameter in self.parameters()):
            self.draw(self._seed, frozen=True)
        self._sources.shared.clear()
        self._prepare()
        return self

    @torch.no_grad()
    def _prepare(self) -> None:
        """Measure the devices, and let maps draw what they keep: compiled code only reads it."""
        layout = self.plan.layout
        done: set[object] = set()
        for device in {block.device for block in self.factors().values()}:
            calibrate_once(device)
        for name, pieces in layout.grouping.pieces.items():
            device = self._device(name)
            for piece in pieces:
                fixed = layout.maps[piece.group]
                kept = getattr(fixed, "stored", True) and not isinstance(fixed, Identity)
                if not kept or device.type == "meta":
                    continue
                if isinstance(fixed, Separable):
                    if piece.group not in done:
                        done.add(piece.group)
                        own = layout.blocks_of_joint(piece.group)
                        blocks = with_blocks(layout, self.factors(), own)
                        mapped_blocks(layout, blocks, piece.group)
                    continue
                before, size = joint_sizes(layout, piece.group)
                if "fourier" in layout.ways(name):
                    assert isinstance(fixed, Fourier)
                    x = torch.zeros((1, layout.shapes[name][1]), device=device)
                    fixed.multiply(torch.zeros(before, device=device), x)
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
        blocks = self.blocks(name, self._device(name))
        found = self.form(name, blocks)
        if not torch.compiler.is_compiling() and not transforms():
            # What the caller changes must be no factor, nor what other layers are made of.
            own = {block.untyped_storage()._cdata for block in blocks.values()}
            found = found.clone() if found.untyped_storage()._cdata in own else found
        self._sources.release(name)
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
        return self._block(self._sources.names[name][0]).device

    def blocks(self, name: str, device: torch.device) -> dict[str, Tensor]:
        """Return what one layer's update is made of, the scale multiplied in."""
        if torch.compiler.is_compiling():
            scale: float | Tensor = self._numbers[self._scales[name]]
        else:
            scale = self.scale_of(name)
        return self._sources.of(name, device, self._block, scale)

    def scale_of(self, name: str) -> float:
        """Return the number in front of one layer's update."""
        return scale_in_force(self._scales[name], self.plan.scale, self._scale)

    def _set_scale(self, scale: float) -> None:
        self._scale = scale
        for own, number in self._numbers.items():
            number.fill_(scale_in_force(own, self.plan.scale, scale))

    def form(
        self, name: str, blocks: Mapping[str, Tensor], rows: tuple[int, int] | None = None
    ) -> Tensor:
        """Form one layer's update, or rows of it, from what `blocks` gave."""
        height, width = self.plan.layout.shapes[name]
        first, last = rows or (0, height)
        with without_autocast(next(iter(blocks.values())).device):
            if LEFT in blocks:
                return self._form_rows(name, blocks[LEFT], blocks.get(RIGHT), first, last)
            if isinstance(blocks, Entered):
                pieces = [
                    Read.apply(token, value, *rest)  # type: ignore[no-untyped-call]
                    for value, token, *rest in blocks.pairs()
                ]
            elif name in self._sources.vectors:
                pieces = list(blocks.values())
            else:
                delta: Tensor = weight_delta(self.plan.layout, blocks, name, 1.0, (first, last))
                return delta
            whole: Tensor = joined(pieces).reshape(height, width)
        return whole if rows is None else whole[first:last]

    def form_linearized(
        self,
        name: str,
        blocks: dict[str, Tensor],
        rows: tuple[int, int] | None,
        wanted: Sequence[bool],
    ) -> tuple[Tensor, Pull]:
        """Form the same, and what takes its gradient back to the blocks."""
        if not isinstance(blocks, Entered):
            kind, names = type(blocks), tuple(blocks)

            def form(*tensors: Tensor) -> Tensor:
                return self.form(name, kind(zip(names, tensors, strict=True)), rows)

            return linearized(form, list(blocks.values()), wanted)
        readers = list(blocks.pairs())
        with torch.no_grad():
            delta = self.form(name, blocks, rows)

        def pull(gradient: Tensor) -> list[Tensor | None]:
            start, flat = 0, gradient.reshape(-1)
            found: list[Tensor | None] = []
            for value, token, sink, reader in readers:
                stop = start + reader.stop - reader.start
                if token.requires_grad:
                    reader.add(flat[start:stop], sink.sum_like(value))
                found += [None, torch.zeros_like(token)]
                start = stop
            return found

        return delta, pull

    def _form_rows(
        self, name: str, left: Tensor, right: Tensor | None, first: int, last: int
    ) -> Tensor:
        layout = self.plan.layout
        width = layout.shapes[name][1]
        (piece,) = layout.grouping.pieces[name]
        size = layout.groups[piece.group].fold[-1]
        skipped = piece.start % size  # before the weight, in the first of its opened rows
        start, stop = skipped + first * width, skipped + last * width
        left = left[start // size : -(-stop // size)]
        entries = (left if right is None else left @ right).reshape(-1)
        start %= size
        count = (last - first) * width
        if entries.shape[0] != count:  # a slice of all is a pass more on the way back
            entries = entries[start : start + count]
        return entries.reshape(last - first, width)

    def rows_at_once(self, name: str) -> int:
        """Return how many rows of a layer's update are best formed at once; 0 for all."""
        layout = self.plan.layout
        if layout.ways(name)[FORMED].once <= math.prod(layout.shapes[name]):
            return 0  # it is no more than copied
        if name in self._sources.vectors or not layout.identity(layout.groups_of(name)[0]):
            return 0
        return max(1, _CHUNK // layout.shapes[name][1])

    def way(self, name: str, x: Tensor, fused: bool) -> str:
        """Return how one layer's update is best applied to inputs.

        Parameters
        ----------
        name : str
            The layer.
        x : torch.Tensor, (..., input width)
            Its inputs.
        fused : bool
            Whether one product with ``W₀ + ΔW`` can take the place of two.

        Returns
        -------
        str
            A key of ``plan.layout.ways(name)``.
        """
        tokens = x.numel() // max(1, x.shape[-1])
        trained = torch.is_grad_enabled()
        machine = machine_of(x.device)
        return choose(
            self.plan.layout, name, machine, tokens, self._applied, trained=trained, fused=fused
        )

    def update(
        self,
        name: str,
        x: Tensor,
        way: str,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Multiply by one layer's update without forming it.

        Parameters
        ----------
        name : str
            The layer.
        x : torch.Tensor, (..., input width)
            Its inputs.
        way : str
            ``"low_rank"``, ``"kronecker"`` or ``"fourier"``.
        weight, bias : torch.Tensor, optional
            The layer's own, to be applied in the same passes; for ``"low_rank"`` alone.

        Returns
        -------
        torch.Tensor, (..., output width)
            Of the factors' dtype, or that of automatic mixed precision.
        """
        blocks = self.blocks(name, x.device)
        dtype = next(iter(blocks.values())).dtype
        if autocasts(x.device):
            dtype = torch.get_autocast_dtype(x.device.type)
        product = LayerProduct(self.plan.layout, name, way, blocks)
        if weight is None:
            x = x.to(dtype)
        if way != "low_rank":
            factors = [factor.to(dtype) for factor in blocks.values()]
            flat = x.reshape(-1, x.shape[-1])
            # What lies between the factors is as large as the inputs; of spectra it is more.
            if way == "kronecker" or transforms():
                y = product(flat, factors)
            else:
                y = run(Recomputed, flat, product, *factors)
            return y.reshape(*x.shape[:-1], y.shape[-1])
        with without_autocast(x.device):
            left, right = product.pair(list(blocks.values()))
        right = None if right is None else right.to(dtype)
        return low_rank(x, weight, bias, left.to(dtype), right)

    def _block(self, block: str) -> Tensor:
        group, split, leaf = block.split(".")
        owner = self._modules[group]._modules[split]  # type: ignore[union-attr]
        found = owner._parameters.get(leaf)  # type: ignore[union-attr]
        return found if found is not None else owner._buffers[leaf]  # type: ignore[union-attr, return-value]
