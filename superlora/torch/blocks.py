"""`Blocks`: a plan's blocks as parameters and buffers, and what is computed from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from superlora.algebra.form import map_slice, source_array, with_blocks
from superlora.algebra.frozen import each_frozen
from superlora.algebra.init import each_factor
from superlora.design.network import Source, network_of
from superlora.design.ways import check_apply
from superlora.plan import Plan
from superlora.torch.autograd import without_autocast
from superlora.torch.scope import Scope
from superlora.torch.support import Support


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
        self._scales = {name: plan.layout.scaling(name) for name in plan.layout.shapes}
        # What compiled code multiplies by, so that it need not be compiled again.
        with torch.inference_mode(False):
            self._numbers = {
                own: torch.tensor(own, dtype=torch.float64, device="cpu")
                for own in dict.fromkeys(self._scales.values())
            }
        self.scope = Scope()
        self._applied = "auto"
        for block, shape in plan.layout.input_shapes.items():
            if tuple(blocks[block].shape) != shape:
                raise ValueError(
                    f"factors[{block!r}] must have shape {shape}: got {tuple(blocks[block].shape)}"
                )
            self._register(block, blocks[block], plan.layout.frozen.get(block))
        self._first = self.place(next(iter(plan.layout.factor_shapes)))
        self.supports = {name: Support(self, name) for name in plan.layout.shapes}
        self._set_scale(plan.scale)
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
                # Contiguous, as files of tensors have to be.
                kept = source not in ("random", "ones")
                owner.register_buffer(leaf, values.contiguous(), persistent=kept)

    @property
    def num_parameters(self) -> int:
        """Trainable entries of all factors."""
        return self.plan.num_parameters

    @property
    def dtype(self) -> torch.dtype:
        """The factors' dtype."""
        owner, leaf = self._first
        found = owner._parameters[leaf]
        assert found is not None
        return found.dtype

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
        self.scope.clear()
        self._prepare()
        return self

    @torch.no_grad()
    def _prepare(self) -> None:
        """Let maps draw what they keep, which compiled code only reads."""
        layout = self.plan.layout
        done: set[object] = set()
        for name, pieces in layout.grouping.pieces.items():
            device = self._device(name)
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
            ``scale * ΔW``, differentiable; never the memory of a factor.

        Raises
        ------
        KeyError
            If the adapter has no layer of that name.
        """
        device = self._device(name)
        # The same bits as where layers share what they are cut from; never what a pass of the
        # model made, which may have been interrupted.
        shared = nullcontext() if self.scope.in_block else self.scope.opened()
        with without_autocast(device), shared:
            found = self.supports[name].form(device)
        # What the caller changes must be no factor: a support of one block alone may be one.
        return found * 1.0

    def deltas(self) -> dict[str, Tensor]:
        """Form the updates of all layers.

        Returns
        -------
        dict of str to torch.Tensor
            ``scale * ΔW`` for each layer, (output width, input width).
        """
        with self.scope.opened():
            return {name: self.delta(name) for name in self.plan.layout.shapes}

    @property
    def shares(self) -> bool:
        """Whether layers share anything during one call of the model."""
        ways = [way for own in self.supports.values() if (way := own.way) is not None]
        operands = [own.operands for own in self.supports.values()]
        operands += [own for way in ways for own in way.operands]
        return any(each.several for own in operands for each in own.shared)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Keep what layers share over many calls without gradients, inside a ``with`` block.

        Layers of one group share what they are cut from during one call of the model. Inside the
        block they share it over all calls, as generation makes them; factors must not change
        there.

        Yields
        ------
        None
            Nothing.
        """
        with self.scope.kept():
            yield

    def _device(self, name: str) -> torch.device:
        names = self.plan.blocks_of(name)  # says which layers there are, if this is none
        return self._block(names[0]).device

    def tensors(self, names: Iterable[str]) -> list[Tensor]:
        """Return trained tensors and frozen blocks by name."""
        return [self._block(name) for name in names]

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

    def scale_of(self, name: str) -> float:
        """Return the number in front of one layer's update."""
        return scale_in_force(self._scales[name], self.plan.scale, self._scale)

    def _set_scale(self, scale: float) -> None:
        self._scale = scale
        for own, number in self._numbers.items():
            number.fill_(scale_in_force(own, self.plan.scale, scale))
        for name, support in self.supports.items():
            support.scale = float(self.scale_of(name))
            support.number = self._numbers[self._scales[name]]

    def place(self, block: str) -> tuple[nn.Module, str]:
        """Return the module that registers a block, and under which name."""
        *path, leaf = block.split(".")
        return self.get_submodule(".".join(path)), leaf

    def _block(self, block: str) -> Tensor:
        owner, leaf = self.place(block)
        found = owner._parameters.get(leaf)
        return owner._buffers[leaf] if found is None else found  # type: ignore[return-value]


def scale_in_force(own: float, planned: float, scale: float) -> float:
    """Return a layer's scale after the adapter's was set."""
    if scale == planned:
        return own
    return scale if own == planned else scale * (own / planned)
