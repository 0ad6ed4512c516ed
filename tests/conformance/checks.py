"""What is checked of a method on an architecture."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import superlora as sl
import superlora.torch as slt
from superlora.torch.adapter import Adapter
from tests.conformance.models import Entry

PRESETS = {
    "lora": sl.lora(2, scale=0.7),
    "lokr": sl.lokr(2, scale=0.7),
    "loha": sl.loha(2, scale=0.7),
    "lonkr": sl.lonkr(2, splits=2, scale=0.7),
    "one group": sl.Spec(rank=2, groups=1, fold="balanced", scale=0.7),
    "glora": sl.glora(2),
}
# An operation that some kinds of weights cannot have, or sizes that a design cannot take.
REFUSALS = (
    "must have weights of",
    "operations on a bias must have",
    "must have no other operation",
    "singular vectors",
)


@dataclasses.dataclass
class Tried:
    """A model with an adapter whose factors are not zero.

    Attributes
    ----------
    output : callable
        Makes the model's output, as one vector.
    """

    entry: Entry
    model: nn.Module
    adapter: Adapter
    preset: str

    def output(self, model: nn.Module | None = None) -> Tensor:
        """Return all numbers of the model's output as one vector."""
        return output_of(self.entry, self.model if model is None else model)


def make(entry: Entry, dtype: torch.dtype | None = None) -> nn.Module:
    """Build a model, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = entry.build()
    with torch.no_grad():  # some start at zero, where nothing would be seen
        for index, parameter in enumerate(model.parameters()):
            if parameter.dim() and not parameter.any():
                parameter.add_(
                    0.02 * torch.cos(torch.arange(parameter.numel()) + index).view_as(parameter)
                )
    return model.eval().to(dtype or entry.dtype)


def output_of(entry: Entry, model: nn.Module) -> Tensor:
    """Return all numbers of a model's output as one vector."""
    dtype = next(model.parameters()).dtype
    inputs = {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in entry.call().items()
    }
    args = [inputs.pop("x")] if "x" in inputs else []
    found = pytree.tree_leaves(_plain(model(*args, **inputs)))
    numbers = [
        each.flatten() for each in found if isinstance(each, Tensor) and each.is_floating_point()
    ]
    return torch.cat([each.to(torch.promote_types(each.dtype, torch.float32)) for each in numbers])


def _plain(output: Any) -> Any:
    if isinstance(output, Mapping):  # of transformers; caches hold no output
        return [value for key, value in output.items() if "cache" not in key and "past" not in key]
    if hasattr(output, "sample"):
        return output.sample
    return output


def attach(entry: Entry, preset: str, dtype: torch.dtype | None = None) -> Tried | str:
    """Adapt all of a model, or return why the method is refused."""
    model = make(entry, dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "adapter .* reaches")
        try:
            adapter = slt.attach(model, PRESETS[preset], "all", tied="once")
        except ValueError as error:
            if any(each in str(error) for each in REFUSALS):
                return str(error)
            raise
    return Tried(entry, model, adapter, preset)


def fill(adapter: Adapter) -> None:
    """Give the factors numbers, small enough for routing and norms to stay alike."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for factor in adapter.parameters():
            values = torch.randn(factor.shape, generator=generator, dtype=torch.float64)
            factor.copy_(0.1 * values)


def near(found: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """Raise where two outputs differ by more than rounding."""
    if tolerance is None:
        tolerance = 1e-6 if expected.dtype is torch.float64 else 1e-3
    assert found.shape == expected.shape
    assert torch.isfinite(expected).all(), "the output is not finite"
    scale = expected.abs().max().clamp_min(1e-3)
    error = ((found - expected).abs().max() / scale).item()
    assert error <= tolerance, f"differs by {error:.1e} of the largest number"


def starts_as_the_base(tried: Tried) -> None:
    """The output is that of the frozen base, bit for bit."""
    base = make(tried.entry).requires_grad_(False)
    with torch.no_grad():
        expected = output_of(tried.entry, base)
        assert torch.equal(tried.output(), expected)
    # With gradients some modules of torch take another of their ways.
    near(tried.output(), expected)


def has_gradients(tried: Tried) -> None:
    """Every factor has a gradient where its weight has one in the base."""
    base = make(tried.entry)
    output_of(tried.entry, base).square().sum().backward()
    fill(tried.adapter)
    tried.output().square().sum().backward()
    plan, reached = tried.adapter.plan, tried.adapter.reached()
    used = {
        block
        for layer, own in plan.layout.supports.items()
        # An expert of a stack that no token was sent to has none.
        if not plan.layout.layer_axes[layer].stack and _is_trained(base, tried.adapter, layer)
        for name in own.values()
        for block in plan.layout.inputs_of(name)
    }
    without = [
        name
        for name, factor in tried.adapter.named_parameters()
        if name in used and (factor.grad is None or not factor.grad.any())
    ]
    assert not without, f"{len(without)} factors have no gradient, as {without[:3]}"
    assert all(reached.values()), f"not reached: {[n for n, yes in reached.items() if not yes][:3]}"
    tried.adapter.zero_grad()


def _is_trained(base: nn.Module, adapter: Adapter, layer: str) -> bool:
    """Return whether a layer's weight has a gradient in the base."""
    weight = adapter.weights()[layer]
    name = layer if weight.kind == "parameter" else f"{layer}.{weight.key}"
    gradient = dict(base.named_parameters(remove_duplicate=False))[name].grad
    return gradient is not None and bool(gradient.any())


def computes_alike(tried: Tried) -> None:
    """Forward, formed, merged and unmerged."""
    fill(tried.adapter)
    weights = {n: w.parameter.clone() for n, w in tried.adapter.weights().items()}
    with torch.no_grad():
        base = output_of(tried.entry, make(tried.entry))
        y = tried.output()
        assert not torch.allclose(y, base), "the adapter has no effect"
        tried.adapter.applied = "formed"
        near(tried.output(), y)
        tried.adapter.applied = "auto"
        tried.adapter.merge(bias="ignore")
        near(tried.output(), y)
        tried.adapter.unmerge()
        for name, weight in tried.adapter.weights().items():
            assert torch.equal(weight.parameter, weights[name]), f"{name} is not restored"
        assert torch.equal(tried.output(), y)
        near(tried.output(copy.deepcopy(tried.model)), y)
    near(tried.output().detach(), y)


def is_saved(tried: Tried, folder: Path) -> None:
    """A file gives a fresh model the same output."""
    fill(tried.adapter)
    path = folder / "adapter.safetensors"
    tried.adapter.save(path)
    fresh = make(tried.entry)
    slt.load(fresh, path)
    with torch.no_grad():
        assert torch.equal(tried.output(fresh), tried.output())


def is_checkpointed(tried: Tried) -> None:
    """Gradients are those without checkpoints, of both kinds."""
    fill(tried.adapter)
    expected = _gradients(tried, tried.output())
    for reentrant in (True, False):
        seed = torch.ones((), dtype=torch.float64, requires_grad=True)
        y = checkpoint(lambda one: tried.output() * one, seed, use_reentrant=reentrant)
        for name, gradient in _gradients(tried, y).items():
            near(gradient, expected[name])


def _gradients(tried: Tried, y: Tensor) -> dict[str, Tensor]:
    tried.adapter.zero_grad()
    y.square().sum().backward()
    return {n: f.grad.clone() for n, f in tried.adapter.named_parameters() if f.grad is not None}


def generates(tried: Tried) -> None:
    """The same tokens with and without a cache, and merged."""
    if not tried.entry.generates:
        return
    fill(tried.adapter)
    model: Any = tried.model
    options = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
    ids = tried.entry.call()["input_ids"]
    found = [model.generate(ids, use_cache=cache, **options) for cache in (True, False)]
    tried.adapter.merge(bias="ignore")
    found.append(model.generate(ids, **options))
    tried.adapter.unmerge()
    assert all(torch.equal(each, found[0]) for each in found)


def compiles(tried: Tried) -> None:
    """A block that is compiled by itself computes alike."""
    fill(tried.adapter)
    layers = tried.adapter.layers()
    name = list(layers)[len(layers) // 2].rpartition(".")[0]
    # The block has more than the one layer, where that is not the model.
    while name and sum(each.startswith(f"{name}.") for each in layers) < 2:
        name = name.rpartition(".")[0]
    block = tried.model.get_submodule(name)
    torch.compiler.reset()
    with torch.no_grad():
        y = tried.output()
        if type(block) not in (nn.ModuleList, nn.ModuleDict):
            block.compile(backend="eager")
        near(tried.output(), y)
    torch.compiler.reset()


def is_left_as_it_was(tried: Tried) -> None:
    """Without the adapter the model has its state dict, its output and its attributes."""
    fill(tried.adapter)
    tried.adapter.merge(bias="ignore")
    tried.adapter.unmerge()
    tried.adapter.detach()
    base = make(tried.entry)
    found, expected = tried.model.state_dict(), base.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not [
        n
        for n, m in tried.model.named_modules()
        if "forward" in vars(m) and "forward" not in vars(base.get_submodule(n))
    ]
    assert torch.equal(tried.output(), output_of(tried.entry, base))


def runs_in_half_precision(entry: Entry, preset: str) -> None:
    """The adapted and the merged model agree as far as a half-precision model can."""
    for dtype in (torch.bfloat16, torch.float16):
        tried = attach(entry, preset, dtype)
        assert not isinstance(tried, str)
        fill(tried.adapter)
        with torch.no_grad():
            y = tried.output()
            tried.adapter.merge(bias="ignore")
            z = tried.output()
        assert y.dtype == z.dtype
        if torch.isfinite(y).all():  # or the base itself overflows
            size = y.abs().max().clamp_min(1e-3)
            assert (y - z).norm() / y.norm().clamp_min(1e-3) < 0.25, (
                f"{dtype}: {(y - z).abs().max() / size}"
            )


CHECKS: dict[str, Callable[[Tried], None]] = {
    "start": starts_as_the_base,
    "gradients": has_gradients,
    "merge": computes_alike,
    "checkpoints": is_checkpointed,
    "generate": generates,
    "detach": is_left_as_it_was,
}


@contextmanager
def quietly() -> Iterator[None]:
    """Leave out what models' own libraries warn of; what we warn of is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for message in ("adapter", "the update of"):
            warnings.filterwarnings("error", message)
        yield


def every(entry: Entry, preset: str, folder: Path) -> None:
    """Make all checks of a method that is not refused."""
    for check in (*CHECKS.values(), lambda tried: is_saved(tried, folder)):
        fresh = attach(entry, preset)
        assert not isinstance(fresh, str)
        check(fresh)
    runs_in_half_precision(entry, preset)
    if preset == "lora":
        fresh = attach(entry, preset)
        assert not isinstance(fresh, str)
        compiles(fresh)
