"""What every row is made of: a model, a peer that adapts it, our adapter with its values."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn

import superlora as sl
import superlora.torch as slt
from tests.torch.helpers import make_layer, seeded

View = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Options:
    """What hypothesis draws: widths (output, input) of the layers, and the method's numbers."""

    shapes: tuple[tuple[int, int], ...]
    rank: int = 2
    alpha: float = 5.0
    seed: int = 0
    layer: str = "bias"
    extra: int = 1

    @property
    def keys(self) -> list[str]:
        return list("abcdef"[: len(self.shapes)])

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        names = (f"layers.{key}" for key in self.keys)
        return dict(zip(names, self.shapes, strict=True))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


WIDTHS, FEW, ONE = st.integers(1, 10), st.integers(1, 3), st.just(1)


@st.composite
def options(
    draw: st.DrawFn,
    *,
    sizes: st.SearchStrategy[int] = WIDTHS,
    one_shape: bool = False,
    count: st.SearchStrategy[int] = FEW,
    rank: st.SearchStrategy[int] | None = None,
    layers: tuple[str, ...] = ("bias", "no-bias"),
    extra: st.SearchStrategy[int] = ONE,
    fits: Callable[[Options], bool] = lambda _: True,
) -> Options:
    """Draw layers of unequal widths and, unless said otherwise, a rank that all of them allow."""
    pairs = st.tuples(sizes, sizes)
    number = draw(count)
    drawn = [draw(pairs) for _ in range(1 if one_shape else number)]
    shapes = tuple(drawn * number if one_shape else drawn)
    most = min(map(min, shapes))
    found = Options(
        shapes,
        draw(st.integers(1, min(most, 4)) if rank is None else rank),
        draw(st.sampled_from([1.0, 3.0, 16.0])),
        draw(st.integers(0, 9)),
        draw(st.sampled_from(layers)),
        draw(extra),
    )
    assume(fits(found))
    return found


class Net(nn.Module):
    """Layers side by side, each seen in the output: the last axis joins what they give."""

    def __init__(self, drawn: Options) -> None:
        super().__init__()
        layers = {
            key: make_layer(drawn.layer, columns, rows)
            for key, (rows, columns) in zip(drawn.keys, drawn.shapes, strict=True)
        }
        self.layers = nn.ModuleDict(layers)
        self.columns = [columns for _, columns in drawn.shapes]

    def forward(self, x: Tensor) -> Tensor:
        widths = zip(self.layers.values(), self.columns, strict=True)
        return torch.cat([layer(x[..., :columns]) for layer, columns in widths], dim=-1)


def make_net(drawn: Options) -> Net:
    with seeded(drawn.seed):
        return Net(drawn).double()


def same(tensor: Tensor) -> Tensor:
    return tensor


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2)


@dataclasses.dataclass(frozen=True)
class Take:
    """Where one of our blocks is found in a peer: a permutation of a parameter's entries."""

    parameter: Tensor
    view: View = same
    origin: Tensor | float = 0.0

    def values(self) -> Tensor:
        return self.view(self.parameter.detach() - self.origin)


Leaves = dict[str, Take]  # by the block's name, without the group where it has one group only


@dataclasses.dataclass
class TorchPeer:
    """A peer's own modules.

    Attributes
    ----------
    forward : callable
        Its training forward of the whole model.
    parameters : list of Tensor
        What it trains.
    leaves : mapping of str to Leaves
        Where our blocks are found, by layer.
    formed : mapping of str to Tensor
        The updates that the peer forms itself to merge them, if it can be trusted.
    """

    forward: Callable[[Tensor], Tensor]
    parameters: list[Tensor]
    leaves: dict[str, Leaves]
    formed: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    def backward(self, x: Tensor, cotangent: Tensor) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        (self.forward(x) * cotangent).sum().backward()


Update = Callable[[Mapping[str, numpy.ndarray]], dict[str, numpy.ndarray]]


@dataclasses.dataclass
class PaperPeer:
    """A published formula in numpy, of weights and arrays by name."""

    net: Net
    arrays: dict[str, Tensor]
    update: Update
    leaves: dict[str, Leaves]
    formed: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def parameters(self) -> list[Tensor]:
        return [array for array in self.arrays.values() if array.requires_grad]

    def deltas(self) -> dict[str, numpy.ndarray]:
        return self.update({key: array.detach().numpy() for key, array in self.arrays.items()})

    def forward(self, x: Tensor) -> Tensor:
        added = [
            x[..., : delta.shape[1]] @ torch.from_numpy(numpy.ascontiguousarray(delta)).T
            for delta in self.deltas().values()
        ]
        return self.net(x) + torch.cat(added, dim=-1)

    @torch.no_grad()
    def backward(self, x: Tensor, cotangent: Tensor) -> None:
        inputs, outputs = (a.numpy().reshape(-1, a.shape[-1]) for a in (x, cotangent))
        ends = numpy.cumsum([len(delta) for delta in self.deltas().values()])
        wanted = [
            part.T @ inputs[:, :columns]
            for part, columns in zip(
                numpy.split(outputs, ends[:-1], axis=1), self.net.columns, strict=True
            )
        ]

        def value() -> float:
            pairs = zip(self.deltas().values(), wanted, strict=True)
            return sum(float((delta * gradient).sum()) for delta, gradient in pairs)

        # The updates are linear in every single entry, or quadratic where both factors are made
        # of one vector: half its central difference is its derivative.
        for parameter in self.parameters:
            entries, gradient = parameter.view(-1), torch.zeros(parameter.numel()).double()
            for index in range(len(entries)):
                kept = entries[index].item()
                for sign in (1, -1):
                    entries[index] = kept + sign
                    gradient[index] += sign * value() / 2
                entries[index] = kept
            parameter.grad = gradient.view(parameter.shape)


Peer = TorchPeer | PaperPeer


@torch.no_grad()
def fill(parameters: Iterable[Tensor], seed: int) -> None:
    """Give every parameter other values, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


class Ours:
    """Our adapter on a copy of the same model, with the peer's values."""

    def __init__(self, net: Net, spec: sl.Spec, peer: Peer) -> None:
        self.model = copy.deepcopy(net)
        self.adapter = slt.attach(self.model, spec, list(peer.leaves))
        self.plan = self.adapter.plan
        self.takes: dict[str, Take] = {}
        frozen = self.plan.frozen_shapes
        for name, leaves in peer.leaves.items():
            whole = set(self.plan.blocks_of(name))
            short = {block.partition(".")[2]: block for block in sorted(whole)}
            found = {short.get(leaf, leaf): take for leaf, take in leaves.items()}
            assert whole - frozen.keys() <= found.keys() <= whole, (name, whole, leaves)
            self.takes |= found
        for block, take in self.takes.items():
            self.put(block, take.values())

    @torch.no_grad()
    def put(self, block: str, values: Tensor) -> None:
        own = self.adapter.factors()[block]
        assert own.shape == values.shape, (block, own.shape, values.shape)
        own.copy_(values)

    def arrays(self) -> dict[str, numpy.ndarray]:
        return {name: block.detach().numpy() for name, block in self.adapter.factors().items()}


@dataclasses.dataclass
class Case:
    """One model with its peer, and what shall be the same in our words."""

    drawn: Options
    net: Net
    spec: sl.Spec
    peer: Peer
    tolerance: float = 1e-11

    def ours(self, spec: sl.Spec | None = None) -> Ours:
        return Ours(self.net, self.spec if spec is None else spec, self.peer)

    def near(self, actual: Any, expected: Any, what: str) -> None:
        actual, expected = (torch.as_tensor(array).detach() for array in (actual, expected))
        assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
        largest = max(1.0, expected.abs().max().item())
        error = (actual - expected).abs().max().item()
        assert error <= self.tolerance * largest, f"{what} is wrong by {error}"

    @functools.cached_property
    def inputs(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(11)
        x = torch.randn(2, 3, max(self.net.columns), generator=generator, dtype=torch.float64)
        return x, torch.randn(self.net(x).shape, generator=generator, dtype=torch.float64)

    @functools.cached_property
    def outputs(self) -> Tensor:
        """What the peer's training forward gives."""
        return self.peer.forward(self.inputs[0]).detach()

    @functools.cached_property
    def updates(self) -> dict[str, Tensor]:
        """The peer's updates, read off its training forward of the unit vectors."""
        eye = torch.eye(max(self.net.columns), dtype=torch.float64)
        difference = (self.peer.forward(eye) - self.net(eye)).detach()
        shapes = self.drawn.widths
        parts = difference.split([rows for rows, _ in shapes.values()], dim=-1)
        named = zip(shapes.items(), parts, strict=True)
        return {name: part[:columns].T for (name, (_, columns)), part in named}

    @functools.cached_property
    def gradients(self) -> dict[int, Tensor]:
        """The gradients of the peer's parameters, by identity."""
        self.peer.backward(*self.inputs)
        return {id(p): p.grad for p in self.peer.parameters}


def check_updates(case: Case, ours: Ours) -> None:
    """Every way to form an update of ours, on numpy and torch, is the peer's update."""
    arrays = ours.arrays()
    together = ours.plan.deltas(arrays)
    for name, expected in case.updates.items():
        case.near(ours.plan.delta(arrays, name), expected, f"Plan.delta of {name}")
        case.near(together[name], expected, f"Plan.deltas of {name}")
        case.near(ours.adapter.delta(name), expected, f"Adapter.delta of {name}")
        if name in case.peer.formed:
            case.near(case.peer.formed[name], expected, f"the peer's own update of {name}")
        thin = ours.plan.low_rank(arrays, name)
        if thin is not None:
            case.near(thin[0] @ thin[1].T, expected, f"Plan.low_rank of {name}")


def check_forward(case: Case, ours: Ours) -> None:
    """The adapted models give the same outputs, and not those of the base."""
    x, _ = case.inputs
    case.near(ours.model(x), case.outputs, "the forward")
    assert not torch.allclose(case.outputs, case.net(x))


def check_merged(case: Case, ours: Ours) -> None:
    """The merged model gives the same outputs, and the base's own after that."""
    x, _ = case.inputs
    ours.adapter.merge()
    case.near(ours.model(x), case.outputs, "the merged forward")
    ours.adapter.unmerge()
    with ours.adapter.disabled():
        case.near(ours.model(x), case.net(x), "the base")


def check_gradients(case: Case, ours: Ours) -> None:
    """Every trained block has the peer's gradient."""
    x, cotangent = case.inputs
    ours.adapter.zero_grad()
    (ours.model(x) * cotangent).sum().backward()
    for block, parameter in ours.adapter.named_parameters():
        take = ours.takes[block]
        expected = take.view(case.gradients[id(take.parameter)])
        case.near(parameter.grad, expected, f"the gradient of {block}")


def check_count(case: Case, ours: Ours) -> None:
    """As many numbers are trained."""
    expected = sum(parameter.numel() for parameter in case.peer.parameters)
    trained = sum(p.numel() for p in ours.model.parameters() if p.requires_grad)
    assert ours.plan.num_parameters == trained == expected


@dataclasses.dataclass(frozen=True)
class Row:
    """One method against one peer; its name begins with the preset's."""

    name: str
    build: Callable[[Options], Case]
    drawn: st.SearchStrategy[Options]
    example: Options

    @property
    def preset(self) -> str:
        return self.name.partition("-")[0]
