"""A group's vector after its map, formed once for all layers that are cut from it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from superlora.layout import Layout
from superlora.torch.formed import without_autocast
from superlora.uses import joint_sizes

# Takes the tensors that the group is made from and returns the entries before the map.
Entries = Callable[[Sequence[Tensor]], Tensor]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(eq=False)
class _Made:
    """One vector, cut, and what it was made from.

    Neither values nor parts are left where gradients were taken: the next pass makes a graph of
    its own.
    """

    tensors: tuple[Tensor, ...]
    state: tuple[Any, ...]
    values: tuple[Tensor, ...] = ()
    parts: tuple[Tensor, ...] = ()

    def serves(self, tensors: tuple[Tensor, ...], state: tuple[Any, ...]) -> bool:
        """Return whether it is what these tensors would make."""
        values = self.values  # read once: another thread may take their gradients meanwhile
        if self.state != state or len(values) != len(tensors):
            return False
        # A version does not count what is written through `.data`, as averages of weights are.
        found = zip(self.tensors, values, tensors, strict=True)
        return all(own is t and _same(value, t) for own, value, t in found)


class _Parts(torch.autograd.Function):
    """The pieces of a mapped vector; on the way back one adjoint for all of them.

    Nothing but the tensors that it is made from is kept, so that the gradients of two passes
    that share it can be taken one after the other. It must not hold what holds its outputs:
    no collector of garbage sees such a cycle.
    """

    @staticmethod
    def forward(
        ctx: Any, cut: Cut, entries: Entries, made: _Made, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.cut, ctx.entries, ctx.made = cut, entries, weakref.ref(made)
        ctx.tensors = tensors
        ctx.versions = _versions(tensors)
        ctx.set_materialize_grads(False)
        x = entries(tensors)
        ctx.before = x.shape[0]
        return cut.of(cut.map.apply(x, cut.size))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        made = ctx.made()
        if made is not None:
            made.parts = made.values = ()  # of the weights' size
        if _versions(ctx.tensors) != ctx.versions:
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
    _last: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pieces: dict[int, list[tuple[int, int]]] = {}
        last: dict[int, str] = {}
        for name, found in self.layout.grouping.pieces.items():
            for piece in found:
                first = self.layout.joint(piece.group)[0]
                pieces.setdefault(first, []).append(self.layout.position(piece))
                last[first] = name
        for first, bounds in pieces.items():
            fixed = self.layout.maps[first]
            # What keeps the size has as many entries to be formed before it, for any slice.
            mixes = fixed.keeps_size or not fixed.sliced
            if len(bounds) > 1 and mixes and not self.layout.identity(first):
                _, size = joint_sizes(self.layout, first)
                self._cuts[first] = Cut(fixed, size, tuple(sorted(bounds)))
                self._last.setdefault(last[first], []).append(first)

    # What was made belongs to one adapter, and can be made again.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": {}}

    def serves(self, name: str) -> bool:
        """Return whether a layer's update is cut from vectors that others are cut from."""
        pieces = self.layout.grouping.pieces[name]
        return any(self.layout.joint(piece.group)[0] in self._cuts for piece in pieces)

    def groups(self, names: Iterable[str]) -> tuple[int, ...]:
        """Return the first of the groups that each map takes together, for layers served here."""
        found = (self.layout.grouping.pieces[name] for name in names if self.serves(name))
        firsts = (self.layout.joint(piece.group)[0] for pieces in found for piece in pieces)
        return tuple(dict.fromkeys(firsts))

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
            with without_autocast(tensors[0].device):
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
            *_versions(tensors),
            *(tensor.requires_grad for tensor in tensors),
        )
        made = self._made.get(first)
        parts = made.parts if made is not None and made.serves(tensors, state) else ()
        if not parts:
            made = None  # before another one takes as much memory
            self._made.pop(first, None)
            made = _Made(tensors, state, tuple(tensor.detach().clone() for tensor in tensors))
            parts = _Parts.apply(cut, entries, made, *tensors)  # type: ignore[no-untyped-call]
            made.parts = parts
            self._made[first] = made
        return parts

    def release(self, name: str) -> None:
        """Forget the vectors that a layer is the last to be cut from."""
        for first in self._last.get(name, ()):
            self._made.pop(first, None)

    def clear(self) -> None:
        """Forget all vectors, which are of the weights' size."""
        self._made.clear()


def _versions(tensors: Sequence[Tensor]) -> list[int | None]:
    """Return what counts the changes in place, which tensors of inference mode have not."""
    return [None if tensor.is_inference() else tensor._version for tensor in tensors]


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same bits, which are not equal where they are NaN."""
    if (one.dtype, one.device, one.shape) != (other.dtype, other.device, other.shape):
        return False
    whole = _INTEGERS[one.dtype.itemsize]
    return torch.equal(one.view(whole), other.detach().view(whole))


def _transforms() -> bool:
    """Return whether a transform of torch.func is at work, whose tensors end with it."""
    return torch._C._functorch.peek_interpreter_stack() is not None
