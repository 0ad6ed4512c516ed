"""What a training step costs, counted: operations, entries written, bytes; no clock is read."""

from __future__ import annotations

import weakref
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import addmm_flop, flop_registry

from tests.torch.helpers import seeded

WIDTH, HIDDEN = 128, 352
# torch's own counts, and that of products which are added in place.
FLOPS = {**flop_registry, torch.ops.aten.addmm_: addmm_flop}
# The smallest adapted weight; what tokens make is smaller where they are few.
WEIGHT = WIDTH * WIDTH
FEW, MANY = 32, 44
assert MANY * HIDDEN < WEIGHT


class LlamaBlock(nn.Module):
    """Linear layers in a Llama's shapes; attention is left out, as it is adapted by nothing."""

    def __init__(self) -> None:
        super().__init__()
        for name in "qkvo":
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=False))
        self.gate = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(torch.sigmoid(self.q(x)) * self.k(x) + self.v(x))
        return x + self.down(torch.sigmoid(self.gate(x)) * self.up(x))


class VitBlock(nn.Module):
    """Layers with a bias, all of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.o(torch.sigmoid(self.q(x)) * self.v(x))


MODELS = {
    "llama": (LlamaBlock, ["q", "k", "v", "o", "gate", "up", "down"]),
    "vit": (VitBlock, ["q", "v"]),
}


def make_chain(kind: str, depth: int) -> nn.Module:
    with seeded(0):
        return nn.Sequential(*(MODELS[kind][0]() for _ in range(depth))).requires_grad_(False)


@dataclass(frozen=True)
class Counts:
    """What one step takes.

    Attributes
    ----------
    flops : int
        Of matrix products, as torch counts them.
    large : int
        How many tensors are made that have as many entries as a weight, or more.
    saved : int
        Bytes saved for the backward pass, of tensors that the step made.
    held : int
        Bytes that live between the passes, saved or held in another way.
    peak : int
        Bytes that live at once, at most.
    written : int
        Bytes of all tensors that are made, one after the other.
    """

    flops: int
    large: int
    saved: int
    held: int
    peak: int
    written: int

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


class Tracker(TorchDispatchMode):
    """Watches the storages that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.before: set[int] = set()  # storages that operations found
        self.sizes: dict[int, int] = {}  # of those that they made, while they live
        self.flops = self.large = self.current = self.peak = self.written = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self.sizes and storage._cdata not in self.before:
                self.before.add(storage._cdata)
                weakref.finalize(storage, self.before.discard, storage._cdata)
        result = function(*args, **kwargs)
        flops = FLOPS.get(function._overloadpacket)
        if flops is not None:
            self.flops += flops(*args, **kwargs, out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and self._add(leaf.untyped_storage()):
                self.large += leaf.numel() >= WEIGHT
        return result

    def _add(self, storage: Any) -> bool:
        key = storage._cdata
        if key in self.before or key in self.sizes:
            return False  # a view, or written in place
        self.sizes[key] = storage.nbytes()
        self.current += storage.nbytes()
        self.written += storage.nbytes()
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._drop, key)
        return True

    def _drop(self, key: int) -> None:
        self.current -= self.sizes.pop(key)


def _storages(arguments: Any) -> list[Any]:
    leaves = tree_leaves(arguments)
    return [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, Tensor)]


def count(model: nn.Module, tokens: int) -> Counts:
    """Count one training step whose inputs want a gradient, as those of a model's layers do."""
    with seeded(1):
        x = torch.randn(tokens, WIDTH, requires_grad=True)
    wanted = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata  # the graph holds it: no other takes its place
        kept[key] = tracker.sizes.get(key, 0)
        return tensor

    with Tracker() as tracker:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(x).square().mean()
        held = tracker.current
        torch.autograd.grad(loss, wanted)
    return Counts(
        tracker.flops, tracker.large, sum(kept.values()), held, tracker.peak, tracker.written
    )
