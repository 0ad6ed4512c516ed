"""Models, specs and measures that the tests of the torch binding share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import superlora as sl
import superlora.torch as slt
from superlora import maps

WIDTH, INNER = 16, 8

# Every preset, and the points of the design space that take another path through the code.
SPECS = {
    "dense": sl.dense(scale=0.7),
    "lora": sl.lora(2, alpha=5),
    "lokr": sl.lokr(2, scale=0.7),
    "lokr-both": sl.lokr(1, decompose_both=True, scale=0.7),
    "krona": sl.krona(scale=-1.5),
    "loha": sl.loha(2, scale=0.7),
    "lonkr": sl.lonkr(1, splits=3, scale=0.7),
    "lotr": sl.lotr(2, scale=0.7),
    "fact_tt": sl.fact_tt(3, scale=0.7),
    "fact_tk": sl.fact_tk(2, alpha=3),
    "lorta": sl.lorta(2, scale=0.7),
    "lora_fa": sl.lora_fa(2, alpha=5),
    "vera": sl.vera(5, scale=0.7),
    "tied_lora": sl.tied_lora(3, scale=0.7),
    "gralora": sl.gralora(4, 2, scale=0.7),
    "miss": sl.miss(4, scale=0.7),
    "lora_xs": sl.lora_xs(3, scale=0.7),
    "tinylora": sl.tinylora(2, 5, scale=0.7),
    "tinylora-tied": sl.tinylora(2, 5, scale=0.7, tied=["0.factor0"]),
    "lorta_cp": sl.lorta_cp(3, fold=(2, 2, 2, 4, 16), scale=0.7),
    "compacter": sl.Spec(rank=("full", 1), splits=2, terms=3, tied=["0.core"], scale=0.7),
    "per-split-order": sl.Spec(
        rank=(1, 2), order=(2, 3), splits=2, fold=((2, 2, 2), (2, 2, 4)), scale=0.7
    ),
    "overrides": sl.lora(
        2, alpha=5, overrides={"v": {"rank": 3}, "o": {"rank": "full", "scale": -0.5}}
    ),
    "lorta-4": sl.lorta(2, order=4, scale=0.7),
    "stack": sl.Spec(rank=2, groups=1, fold="stack", scale=0.7),
    "one-group": sl.Spec(rank=2, groups=1, fold="balanced", scale=0.7),
    "aligned-2": sl.Spec(rank=2, groups=1, fold="aligned", scale=0.7),
    "aligned-3": sl.Spec(rank=2, order=3, groups=1, fold="aligned", scale=0.7),
    "cp": sl.Spec(rank=3, order=3, groups=1, fold="aligned", core="identity", scale=0.7),
    "layer": sl.Spec(rank=2, groups="layer", fold="balanced", scale=0.7),
    "cut": sl.Spec(rank=2, groups=5, fold="balanced", scale=0.7),
    "cut-pad": sl.Spec(rank=2, groups=5, fold="balanced", cut="pad", scale=0.7),
    "splits-2": sl.Spec(rank=2, order=3, splits=2, groups=1, fold="balanced", scale=0.7),
    "splits-3": sl.Spec(rank=2, order=3, splits=3, groups=1, fold="balanced", scale=0.7),
    "fourierft": sl.fourierft(7, scale=20.0),
    "waveft": sl.waveft(7, scale=2.0),
    "c3a": sl.c3a(4, scale=7.0),
    "did": sl.did(9, scale=0.7),
    "said": sl.said(9, scale=0.7),
    "unilora": sl.unilora(9, 2, scale=7.0),
    "nola": sl.nola(3, 2, scale=0.7),
    "fastfood": sl.Spec(
        rank=2, groups=1, fold="balanced", map=maps.Fastfood(), ratio=0.3, scale=0.7
    ),
    "fastfood-stacked": sl.Spec(
        rank=2,
        groups="layer",
        fold="balanced",
        map=maps.Fastfood(blocks="stacked", order="le", shared=False),
        ratio=0.2,
        scale=0.7,
    ),
    "fastfood-cut": sl.lorta(2, groups=3, map=maps.Fastfood(values="sign"), ratio=0.3, scale=0.7),
    "one-hot": sl.dense(groups=2, map=maps.OneHot(), size=30, scale=0.7),
    "one-hot-window": sl.dense(groups=2, map=maps.OneHot(window=7), size=30, scale=0.7),
    "shuffle-all": sl.Spec(
        rank=2, groups=3, fold="balanced", map=maps.Shuffle(scope="all"), scale=0.7
    ),
    "separable": sl.lora(2, map=maps.Separable(), ratio=0.3, scale=0.7),
    "separable-3": sl.lorta(2, fold="aligned", map=maps.Separable(), ratio=0.3, scale=0.7),
    "composed": sl.dense(
        map=maps.Composed(first=maps.Broadcast(along="outputs"), second=maps.Shuffle()),
        scale=0.7,
    ),
    "splits-3-aligned": sl.Spec(rank=1, order=3, splits=3, groups=1, fold="aligned", scale=0.7),
}
every_spec = pytest.mark.parametrize("key", SPECS)
# Networks with inputs, of whole widths, of digits, and of a digit in two; a map's own product; and
# opened rows. Each is also formed.
KINDS = ("lora", "lokr", "one-group", "fourierft", "aligned-3")
# One that is applied as factors, one that is formed, one that shares factors over cut weights.
# One whose map mixes what all layers are cut from.
some_specs = pytest.mark.parametrize("key", ["lora", "dense", "cut", "fastfood"])

LAYERS = ("bias", "no-bias", "conv1d")
every_layer = pytest.mark.parametrize("layer", LAYERS)


def slow_but(quick: Collection[str], keys: Iterable[str]) -> list[Any]:
    """Return values of a parameter, of which all but the quick ones are left to the slow tests."""
    return [key if key in quick else pytest.param(key, marks=pytest.mark.slow) for key in keys]


def targets_of(key: str) -> list[str]:
    """Return the targets that a spec of the table can serve: a stack needs equal shapes."""
    spec = SPECS[key]
    one_shape = spec.fold == "stack" and spec.groups != "weight"
    return ["q", "v"] if one_shape or isinstance(spec.fold, tuple) else ["q", "v", "o"]


def make_layer(layer: str, width: int, outputs: int) -> nn.Module:
    if layer == "conv1d":
        found = pytest.importorskip("transformers.pytorch_utils").Conv1D(outputs, width)
        nn.init.normal_(found.weight, std=0.3)
        nn.init.normal_(found.bias, std=0.3)
        return found
    return nn.Linear(width, outputs, bias=layer == "bias")


class Block(nn.Module):
    def __init__(self, layer: str = "bias") -> None:
        super().__init__()
        self.q = make_layer(layer, WIDTH, INNER)
        self.v = make_layer(layer, WIDTH, INNER)
        self.norm = nn.LayerNorm(INNER)
        self.o = make_layer(layer, INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.o(self.norm(nn.functional.silu(self.q(x)) + self.v(x)))


class Net(nn.Module):
    """Blocks of unequal widths, with normalisation, a buffer and a head."""

    def __init__(self, layer: str = "bias", depth: int = 2) -> None:
        super().__init__()
        self.register_buffer("shift", torch.linspace(-1, 1, WIDTH))
        self.blocks = nn.ModuleList(Block(layer) for _ in range(depth))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.shift
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Outer(nn.Module):
    """A model within a model, whose layers have two dotted names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Net()
        self.extra = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.extra(self.inner(x))


def make_net(layer: str = "bias", depth: int = 2, seed: int = 0, **to: Any) -> Net:
    with seeded(seed):
        return Net(layer, depth).to(**to)


def make_outer(**to: Any) -> Outer:
    with seeded(0):
        return Outer().to(**to)


def make_input(*shape: int, seed: int = 1, **to: Any) -> Tensor:
    with seeded(seed):
        return torch.randn(*(shape or (2, 5)), WIDTH).to(**to)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    # All is drawn on the CPU. `torch.manual_seed` would also note down, with the stack of its
    # caller, to seed every kind of accelerator that may come into use: 5 ms a call.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def fill(adapter: slt.Adapter, seed: int = 2) -> slt.Adapter:
    """Give every factor random values, as if it had been trained."""
    # None near zero: a product of many factors must not vanish beside the weight.
    with seeded(seed), torch.no_grad():
        for factor in adapter.parameters():
            signs = torch.randint(0, 2, factor.shape) * 2.0 - 1
            factor.copy_(signs * (0.5 + 0.5 * torch.rand(factor.shape)))
    return adapter


def attach_filled(
    model: nn.Module, key: str, *, name: str = "superlora", seed: int = 2, **options: Any
) -> slt.Adapter:
    return fill(slt.attach(model, SPECS[key], targets_of(key), name=name, **options), seed)


def kept_blocks(plan: sl.Plan) -> list[str]:
    """List the blocks that a state dict holds: not those that the spec alone decides."""
    frozen = plan.layout.frozen
    return [name for name in plan.layout.input_shapes if frozen.get(name) not in ("random", "ones")]


def layers_of(model: nn.Module, adapter: slt.Adapter) -> dict[str, nn.Module]:
    return {name: model.get_submodule(name) for name in adapter.plan.shapes}


def bits(tensor: Tensor) -> object:
    """Return a tensor's exact content, to be compared with ``==``."""
    if isinstance(tensor, nn.UninitializedParameter):
        return ("uninitialized", tensor.dtype)
    if tensor.is_meta:
        return ("meta", tuple(tensor.shape), tensor.dtype)
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return (tuple(tensor.shape), tensor.dtype, raw.numpy().tobytes())


def snapshot(model: nn.Module) -> dict[str, object]:
    """Return all that a model is made of: modules, attributes, parameters, hooks, bits."""
    seen: dict[str, object] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        seen[f"{path}: module"] = (type(module), id(module))
        for key, value in vars(module).items():
            if key == "_modules":
                seen[f"{path}: children"] = {name: id(child) for name, child in value.items()}
            elif key in ("_parameters", "_buffers"):
                seen[f"{path}: {key}"] = list(value)
            elif isinstance(value, dict):
                seen[f"{path}.{key}"] = dict(value)
            else:
                seen[f"{path}.{key}"] = value
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        seen[f"tensor {name}"] = (id(tensor), tensor.requires_grad, bits(tensor))
    return seen


def _same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):  # a pruned weight is a plain attribute
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    return one == other


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Assert that nothing at all of `model` is changed by the ``with`` block."""
    before = snapshot(model)
    yield
    after = snapshot(model)
    assert after.keys() == before.keys()
    assert [key for key in before if not _same(after[key], before[key])] == []


def base_bits(model: nn.Module) -> dict[str, object]:
    """Return the bits of all but the adapters' factors."""
    own = {
        id(tensor)
        for module in model.modules()
        if isinstance(module, slt.Adapter)
        for tensor in [*module.parameters(), *module.buffers()]
    }
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: bits(tensor) for name, tensor in named if id(tensor) not in own}


TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Compare relatively to the largest entry, with the tolerance of `dtype`."""
    assert actual.shape == expected.shape
    tolerance = TOLERANCES[dtype or actual.dtype]
    actual, expected = actual.detach().double(), expected.detach().double()
    error = (actual - expected).abs().max().item()
    assert error <= tolerance * expected.abs().max().item()


def gradients(adapter: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradient of every factor, zeros where the loss does not depend on it."""
    names, factors = zip(*adapter.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, factors, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def loss_of(y: Tensor) -> Tensor:
    """Return a loss whose gradient has no symmetry that could hide an error."""
    weights = torch.linspace(0.5, 2, y.numel(), dtype=y.dtype, device=y.device)
    return ((y - 1).square() * weights.reshape(y.shape)).mean()


def plain_forward(model: nn.Module, adapter: slt.Adapter, call: Callable[[], Any]) -> Any:
    """Call with every adapted layer computed by plain autograd through ``x @ (W + ΔW)ᵀ``."""
    layers = layers_of(model, adapter)
    kept = {name: vars(layer).pop("forward") for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            vars(layer)["forward"] = _plain(layer, adapter, name)
        return call()
    finally:
        for name, layer in layers.items():
            vars(layer)["forward"] = kept[name]


def _plain(layer: Any, adapter: slt.Adapter, name: str) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.t()
        y = x @ (weight + adapter.delta(name)).transpose(0, 1)
        return y if layer.bias is None else y + layer.bias

    return forward
