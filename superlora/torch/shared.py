"""A group's vector after its map, formed once for all layers that are cut from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from superlora.layout import Layout
from superlora.torch.formed import without_autocast

# Takes the tensors that the group is made from and returns the entries before the map.
Entries = Callable[[Sequence[Tensor]], Tensor]


@dataclass(eq=False)
class _Made:
    """One vector, cut, and what it was made from."""

    tensors: tuple[Tensor, ...]
    state: tuple[Any, ...]
    values: tuple[Tensor, ...] = ()
    parts: tuple[Tensor, ...] = ()
    spent: bool = False  # its gradients were taken: the next pass makes a graph of its own

    def serves(self, tensors: tuple[Tensor, ...], state: tuple[Any, ...]) -> bool:
        """Return whether it is what these tensors would make."""
        if self.spent or self.state != state:
            return False
        # A version does not count what is written through `.data`, as averages of weights are.
        found = zip(self.tensors, self.values, tensors, strict=True)
        return all(own is t and torch.equal(value, t) for own, value, t in found)


class _Parts(torch.autograd.Function):
    """The pieces of a mapped vector; on the way back one adjoint for all of them.

    Nothing but the tensors that it is made from is kept, so that the gradients of two passes
    that share it can be taken one after the other.
    """

    @staticmethod
    def forward(
        ctx: Any, cut: Cut, entries: Entries, made: _Made, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.cut, ctx.entries, ctx.made = cut, entries, made
        ctx.tensors = tensors
        ctx.versions = [tensor._version for tensor in tensors]
        ctx.set_materialize_grads(False)
        x = entries(tensors)
        ctx.before = x.shape[0]
        return cut.of(cut.map.apply(x, cut.size))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.made.spent = True
        if [tensor._version for tensor in ctx.tensors] != ctx.versions:
            raise RuntimeError(
                "a factor was changed in place between the forward and the backward pass"
            )
        wanted = ctx.needs_input_grad[3:]
        with torch.enable_grad(), without_autocast(ctx.tensors[0].device):
            tensors = [
                tensor.detach().requires_grad_(asked)
                for tensor, asked in zip(ctx.tensors, wanted, strict=True)
            ]
            x = ctx.entries(tensors)
            gradient = ctx.cut.map.adjoint(ctx.cut.joined(gradients, x), ctx.before)
            asked = [tensor for tensor in tensors if tensor.requires_grad]
            found = iter(torch.autograd.grad(x, asked, gradient, allow_unused=True))
        return None, None, None, *(next(found) if want else None for want in wanted)


@dataclass(frozen=True)
class Cut:
    """Where a vector is cut.

    Attributes
    ----------
    map : Map
        The map that makes it.
    size : int
        Its entries.
    bounds : tuple of (int, int)
        Where every piece begins and ends, in order.
    """

    map: Any
    size: int
    bounds: tuple[tuple[int, int], ...]

    def of(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Return the pieces of a vector."""
        return tuple(vector[start:stop] for start, stop in self.bounds)

    def joined(self, parts: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """Return the vector of some pieces, the others zero."""
        vector = like.new_zeros(self.size)
        for (start, stop), part in zip(self.bounds, parts, strict=True):
            if part is not None:
                vector[start:stop] = part
        return vector


@dataclass
class Shared:
    """The vectors of a plan whose maps mix what several weights are cut from.

    Attributes
    ----------
    layout : Layout
        What lies where.
    """

    layout: Layout
    _cuts: dict[int, Cut] = field(default_factory=dict)
    _made: dict[int, _Made] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pieces: dict[int, list[tuple[int, int]]] = {}
        for found in self.layout.grouping.pieces.values():
            for piece in found:
                joint = self.layout.joint(piece.group)
                pieces.setdefault(joint[0], []).append(self.layout.position(piece))
        for first, bounds in pieces.items():
            fixed = self.layout.maps[first]
            if len(bounds) > 1 and not fixed.sliced and not self.layout.identity(first):
                size = sum(self.layout.groups[group].size for group in self.layout.joint(first))
                self._cuts[first] = Cut(fixed, size, tuple(sorted(bounds)))

    # What was made belongs to one adapter, and can be made again.
    def __getstate__(self) -> dict[str, Any]:
        return {"layout": self.layout, "_cuts": self._cuts, "_made": {}}

    def serves(self, name: str) -> bool:
        """Return whether a layer's update is cut from vectors that others are cut from."""
        pieces = self.layout.grouping.pieces[name]
        return any(self.layout.joint(piece.group)[0] in self._cuts for piece in pieces)

    def parts(
        self, name: str, tensors_of: Callable[[int], tuple[Tensor, ...]], entries: Any, scale: float
    ) -> list[Tensor]:
        """Return what a layer's update is made of, one piece after the other.

        Parameters
        ----------
        name : str
            The layer.
        tensors_of : callable
            Takes a group and returns the tensors that it is made from.
        entries : callable
            Takes a group and such tensors and returns the entries before the map.
        scale : float
            The number that `entries` multiplies by.

        Returns
        -------
        list of torch.Tensor, (n,)
            As long as the parameters stay as they are, and no gradient was taken, the same
            tensors for all layers and all passes.
        """
        found = []
        for piece in self.layout.grouping.pieces[name]:
            first = self.layout.joint(piece.group)[0]
            bound = self.layout.position(piece)
            tensors = tensors_of(first)

            def make(given: Sequence[Tensor], group: int = first) -> Tensor:
                entered: Tensor = entries(group, given)
                return entered

            cut = self._cuts.get(first)
            if cut is None:  # of this layer alone
                size = self.layout.groups[first].size
                found.append(self.layout.maps[first].apply(make(tensors), size))
            elif torch.compiler.is_compiling() or _transforms() or tensors[0].is_meta:
                found.append(cut.map.apply(make(tensors), cut.size)[slice(*bound)])
            else:
                parts = self._of(first, cut, tensors, make, scale)
                found.append(parts[cut.bounds.index(bound)])
        return found

    def _of(
        self, first: int, cut: Cut, tensors: tuple[Tensor, ...], entries: Entries, scale: float
    ) -> tuple[Tensor, ...]:
        state = (
            scale,
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            *(tensor._version for tensor in tensors),
            *(tensor.requires_grad for tensor in tensors),
        )
        made = self._made.get(first)
        if made is None or not made.serves(tensors, state):
            self._made.pop(first, None)  # before another one takes as much memory
            made = _Made(tensors, state, tuple(tensor.detach().clone() for tensor in tensors))
            with without_autocast(tensors[0].device):
                made.parts = _Parts.apply(cut, entries, made, *tensors)  # type: ignore[no-untyped-call]
            self._made[first] = made
        parts = made.parts
        return parts

    def clear(self) -> None:
        """Forget all vectors, which are of the weights' size."""
        self._made.clear()


def _transforms() -> bool:
    """Return whether a transform of torch.func is at work, whose tensors end with it."""
    return torch._C._functorch.peek_interpreter_stack() is not None
