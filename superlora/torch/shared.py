"""What several layers are made of, computed once for all of them, forward and backward."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from superlora.torch.formed import differentiated_once, without_autocast
from superlora.torch.stages import Key, Reader, Stage

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Entries that are compared where a pass goes on; all are where another one begins.
_SAMPLE = 1024


class Sink:
    """Where the gradients of a value are added up by all that read it.

    One tensor for every backward pass that is at work: two may be at once.
    """

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def sum_like(self, value: Tensor) -> Tensor:
        """Return the sum of the backward pass at work, zero at first, of the shape of a value."""
        task = torch._C._current_graph_task_id()
        if task not in self._sums:
            self._sums[task] = torch.zeros_like(value)
            # Where only other gradients are asked for, nothing takes it.
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: self._forget(task))
        return self._sums[task]

    def _forget(self, task: int) -> None:
        self._sums.pop(task, None)

    def take(self) -> Tensor | None:
        """Return the sum of the backward pass at work, and forget it."""
        return self._sums.pop(torch._C._current_graph_task_id(), None)


class Read(torch.autograd.Function):
    """A range of a value that all layers read."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, value: Tensor, sink: Sink, reader: Reader) -> Tensor:
        """Return the range; `token` ties it to the node that made the value."""
        ctx.value, ctx.sink, ctx.reader, ctx.tensors = value, sink, reader, (token,)
        return reader.read(value)

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Add the gradient up with those of others."""
        ctx.reader.add(gradient, ctx.sink.sum_like(ctx.value))
        return gradient.new_zeros(()), None, None, None


@dataclass(eq=False)
class _Made:
    """The parts that a stage made, and what it made them from.

    Neither values nor parts are left where gradients were taken: the next pass makes a graph of
    its own.
    """

    tensors: tuple[Tensor, ...]
    state: tuple[Any, ...]
    # None where a part is a view of the tensor itself, whose values it always has.
    values: tuple[Tensor | None, ...] = ()
    parts: tuple[Tensor, ...] = ()
    last: int = -1  # of the layers that asked
    sink: Sink = field(default_factory=Sink)

    def serves(self, tensors: tuple[Tensor, ...], state: tuple[Any, ...], order: int) -> bool:
        """Return whether it is what these tensors would make."""
        values = self.values  # read once: another thread may take their gradients meanwhile
        if self.state != state or len(values) != len(tensors):
            return False
        # A version does not count what is written through `.data`, as averages of weights are.
        whole = order <= self.last  # a layer that asked, or an earlier one: another pass
        self.last = order
        found = zip(self.tensors, values, tensors, strict=True)
        return all(own is t and _same(value, t, whole) for own, value, t in found)


class _Parts(torch.autograd.Function):
    """The parts of a stage; on the way back one adjoint for all of them.

    Nothing but the tensors that it is made from is kept, so that the gradients of two passes
    that share it can be taken one after the other. It must not hold what holds its outputs:
    no collector of garbage sees such a cycle.
    """

    @staticmethod
    def forward(ctx: Any, stage: Stage, made: _Made, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.stage, ctx.made, ctx.tensors, ctx.sink = stage, weakref.ref(made), tensors, made.sink
        ctx.versions = _versions(tensors)
        ctx.set_materialize_grads(False)
        parts = stage.cut(stage.make([tensor.detach() for tensor in tensors]))
        if not stage.whole:
            return parts
        ctx.mark_non_differentiable(*parts)
        return (*parts, parts[0].new_zeros(()))  # which ties those that read to this node

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        made = ctx.made()
        if made is not None:
            made.parts = made.values = made.tensors = ()  # of the weights' size
        if _versions(ctx.tensors) != ctx.versions:
            raise RuntimeError(
                "a factor was changed in place between the forward and the backward pass"
            )
        if ctx.stage.whole:
            gradients = (ctx.sink.take(),)
        wanted = ctx.needs_input_grad[2:]
        with torch.enable_grad(), without_autocast(ctx.tensors[0].device):
            tensors = [
                tensor.detach().requires_grad_(asked)
                for tensor, asked in zip(ctx.tensors, wanted, strict=True)
            ]
            values = ctx.stage.make(tensors)
            with torch.no_grad():
                gathered = ctx.stage.gather(gradients, values)
            pairs = [
                (value, gradient)
                for value, gradient in zip(values, gathered, strict=True)
                if gradient is not None and value.requires_grad
            ]
            asked = [tensor for tensor in tensors if tensor.requires_grad]
            if not pairs:
                return None, None, *([None] * len(tensors))
            outputs, given = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(outputs, asked, given, allow_unused=True))
        return None, None, *(next(found) if want else None for want in wanted)


class Shared:
    """What an adapter's layers share, by stage.

    What was made belongs to one adapter, and can be made again: copies have none of it.
    """

    def __init__(self) -> None:
        self._made: dict[Key, _Made] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": {}}

    def parts(
        self,
        key: Key,
        stage: Stage,
        tensors: tuple[Tensor, ...],
        state: tuple[Any, ...],
        order: int,
    ) -> tuple[tuple[Tensor, ...], Sink]:
        """Return what a stage makes.

        Parameters
        ----------
        key : Key
            Under which they are kept.
        stage : Stage
            What makes them.
        tensors : tuple of torch.Tensor
            From which.
        state : tuple
            What else they depend on.
        order : int
            The place in the plan of the layer that asks.

        Returns
        -------
        tuple of torch.Tensor
            As long as the tensors stay as they are, and no gradient was taken, the same for all
            layers and all passes. Of a stage whose value is read whole: the value, and a token.
        Sink
            Where the gradients of such a value are added up.
        """
        state = (
            *state,
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            *_versions(tensors),
            *((tensor.requires_grad, tensor.data_ptr()) for tensor in tensors),
        )
        made = self._made.get(key)
        if made is not None and made.serves(tensors, state, order):
            parts = made.parts  # read once, as its values are
            if parts:
                return parts, made.sink
        made = None  # before another one takes as much memory
        self._made.pop(key, None)
        made = _Made(tensors, state, last=order)
        with without_autocast(tensors[0].device):
            parts = _Parts.apply(stage, made, *tensors)  # type: ignore[no-untyped-call]
        made.values = _values(tensors, parts)
        made.parts = parts
        self._made[key] = made
        return parts, made.sink

    def forget(self, key: Key) -> None:
        """Forget what a stage made."""
        self._made.pop(key, None)

    def clear(self) -> None:
        """Forget all that was made, which is of the weights' size."""
        self._made.clear()


def _values(tensors: Sequence[Tensor], parts: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Return copies of the tensors of which no part is a view."""
    own = {part.untyped_storage()._cdata for part in parts}
    return tuple(
        None if tensor.untyped_storage()._cdata in own else tensor.detach().clone()
        for tensor in tensors
    )


def _versions(tensors: Sequence[Tensor]) -> list[int | None]:
    """Return what counts the changes in place, which tensors of inference mode have not."""
    return [None if tensor.is_inference() else tensor._version for tensor in tensors]


def _same(one: Tensor | None, other: Tensor, whole: bool) -> bool:
    """Return whether two tensors have the same bits, which are not equal where they are NaN."""
    if one is None:
        return True
    if (one.dtype, one.device, one.shape) != (other.dtype, other.device, other.shape):
        return False
    if not whole and not one.is_cpu:
        return True  # to wait for another device costs more than all else
    kind = _INTEGERS[one.dtype.itemsize]
    values, others = one.view(kind).view(-1), other.detach().view(kind).reshape(-1)
    step = 1 if whole else max(1, values.shape[0] // _SAMPLE)
    return torch.equal(values[::step], others[::step])
