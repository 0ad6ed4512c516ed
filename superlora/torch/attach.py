"""`attach`: freeze a model and register the factors of a plan on it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from superlora._backend import backend_of
from superlora.algebra.frozen import each_frozen
from superlora.algebra.init import each_factor
from superlora.design.cost_rule import check_apply
from superlora.design.spec import Spec
from superlora.design.supports import Supports, design_of, without
from superlora.errors import AdapterError, some
from superlora.maps._check import check, is_own
from superlora.plan import Plan
from superlora.torch.adapter import Adapter, adapters_of, registered
from superlora.torch.files.state import without_bias
from superlora.torch.layers import parameter_of, shape_of, weight_of
from superlora.torch.replaced import Replaced
from superlora.torch.site import Site
from superlora.torch.targets import ALL_LINEAR, Targets, find_targets
from superlora.torch.walk import freeze


def attach(
    model: nn.Module,
    spec: Spec | Mapping[Any, Any],
    targets: Targets = ALL_LINEAR,
    *,
    name: str = "superlora",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    apply: str = "auto",
) -> Adapter:
    """Adapt a model's layers; its output stays bit for bit what it was.

    But for a ``factor_map`` from one vector, as in `superlora.unilora`: it cannot start at zero.

    Parameters
    ----------
    model : torch.nn.Module
        Any model with ``Linear`` layers, or GPT-2's ``Conv1D``. Its parameters are
        frozen; their names and the modules' classes stay as they are.
    spec : Spec, Supports or mapping
        The design, such as ``superlora.lora(rank=8)``; or one for each merge operation, such as
        ``superlora.glora(rank=8)`` or a mapping that `superlora.Supports` takes.
    targets : sequence of str, str or callable
        Names or suffixes of layers, a regular expression for whole names,
        ``"all-linear"``, or ``predicate(name, module) -> bool``.
    name : str
        The attribute of `model` under which the adapter is registered; of its
        first adapted layer, where `model` is a ``Sequential`` or a ``ModuleList``.
    seed : int
        Seed of the initial factors, in [0, 2**64).
    dtype : torch.dtype, optional
        The factors' dtype; by default the weights', float32 for half precision.
    apply : {"auto", "factored", "formed"}
        Whether updates are formed in the forward pass. ``"auto"`` takes what costs least
        for each layer and number of tokens; ``adapter.applied`` changes it.

    Returns
    -------
    Adapter
        A module whose parameters are the factors.

    Raises
    ------
    AdapterError
        If `model` has an attribute of that name.
    TypeError, ValueError
        If the spec, the targets or the weights do not fit, or some updates cannot be
        applied factored; nothing is changed then.

    Examples
    --------
    >>> import torch, superlora as sl, superlora.torch as slt
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    >>> adapter = slt.attach(model, sl.lora(rank=2), targets=["0"])
    >>> adapter.num_parameters, model(torch.ones(1, 8)).shape
    (32, torch.Size([1, 2]))
    """
    check_model(model)
    modules = find_targets(model, targets)
    shapes = {target: shape_of(module) for target, module in modules.items()}
    plan = Plan(_fitting(design_of(spec), modules), shapes)
    check_free(model, host_of(model, modules), name)
    _refuse_stored(plan)
    check_apply(apply, plan.layout)
    for fixed, before, size in plan.layout.map_uses():
        if is_own(fixed):  # the library's are tested
            check(fixed, before, size, like=torch.empty(0, dtype=torch.float64))
    adapter = Adapter(plan, initial(plan, modules, seed, dtype), name)
    adapter._seed = seed
    adapter.applied = apply
    return register(model, adapter, modules)


def register(
    model: nn.Module,
    adapter: Adapter,
    modules: Mapping[str, nn.Module],
    replaced: Mapping[str, Tensor] | None = None,
) -> Adapter:
    """Put an adapter on a model; the checks of the blocks that it holds lie behind us."""
    pending = Replaced(model, replaced) if replaced else None
    if pending is not None:
        for other in adapters_of(model):
            twice = pending.overlap(other.replaced) if other.replaced is not None else []
            if twice:
                raise AdapterError(
                    f"adapter {other.name!r} has replaced {twice[0]!r} already: detach it first"
                )
        pending.refuse_merged()
    # Both kinds, for what torch.compile cannot trace, or would trace again once it is known.
    backend_of(*adapter.blocks.values(), torch.empty(0))
    adapter.train(model.training)
    # Those of another model on these layers too.
    adapter._order = 1 + max([other._order for other in adapters_of(model)], default=0)
    adapter._frozen = freeze(model)
    adapter._bare = without_bias(adapter.plan, modules)
    for target in adapter.plan.layout.supports:
        adapter._link(modules[target], target)
    host = host_of(model, modules)
    adapter._homes = (model, host)
    host.add_module(adapter.name, adapter)
    adapter._hooks = [
        model.register_load_state_dict_pre_hook(adapter.refuse_to_load),
        model.register_load_state_dict_post_hook(functools.partial(_fill, adapter)),
    ]
    if any(each.several for own in adapter.supports.values() for each in own.shared()):
        adapter._hooks += [
            model.register_forward_pre_hook(adapter.blocks.scope.open),
            model.register_forward_hook(adapter.blocks.scope.close, always_call=True),
        ]
    if pending is not None:
        adapter.replaced = pending
        pending.use(True)
    return adapter


def _fitting(design: Spec | Supports, modules: Mapping[str, nn.Module]) -> Spec | Supports:
    """Leave out what scales the bias of layers that have none."""
    bare = [name for name, module in modules.items() if Site.bias_below(module) is None]
    if isinstance(design, Spec) or not bare:
        return design
    return without(design, "scale_bias", bare, all_of=len(bare) == len(modules))


def host_of(model: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    """Return what registers the adapter: the model, or the first layer of a container."""
    # The children of a container are counted, indexed and called one after the other.
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return next(iter(modules.values())) if isinstance(model, containers) else model


def check_free(model: nn.Module, host: nn.Module, name: str) -> None:
    """Refuse a name that is in use already, or that torch cannot register."""
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name must be a Python identifier: got {name!r}")
    adapters = registered(model)
    taken = [part for part in adapters if part.name == name and part._homes[:1] == (model,)]
    if taken or hasattr(host, name):
        kind = type(taken[0] if taken else getattr(host, name)).__name__
        raise AdapterError(
            f"name must be free: the model has an attribute {name!r} already, of type {kind}; "
            "detach() it or choose another name"
        )


def check_model(model: object) -> None:
    """Refuse what is no model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module: got {type(model).__name__}")


def initial(
    plan: Plan, modules: Mapping[str, nn.Module], seed: int, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Draw the factors that an adapter starts with, and make its frozen blocks."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype: got {dtype!r}")
    if dtype is None:
        weights = (parameter_of(module).dtype for module in modules.values())
        dtype = functools.reduce(torch.promote_types, weights, torch.float32)
    # A block without memory is not drawn before it has some.
    empty = [name for name in plan.layout.input_shapes if _weight(plan, modules, name).is_meta]
    for block in empty:
        if plan.layout.frozen.get(block, "").startswith("singular"):
            raise AdapterError(
                "weights must be loaded where a spec takes their singular vectors: "
                f"{_layer(plan, block)!r} lies on the meta device"
            )
    found = _drawn(plan, modules, seed, dtype, set(empty), _weights(modules))
    for block in empty:
        shape = plan.layout.input_shapes[block]
        found[block] = torch.empty(shape, device="meta", dtype=dtype)
    return found


def _drawn(
    plan: Plan,
    modules: Mapping[str, nn.Module],
    seed: int,
    dtype: torch.dtype,
    skipped: Container[str],
    weights: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return initial factors and frozen blocks, singular vectors only of given weights."""
    layout = plan.layout
    # Whatever contexts we are called in, the factors hold values and can be trained.
    with torch.device("cpu"), torch.inference_mode(False):
        factors = each_factor(layout, seed, skipped=skipped)
        frozen = each_frozen(layout, weights, singular=weights is not None, skipped=skipped)
        # One at a time: all of them in float64 would be twice the adapter.
        return {
            block: torch.from_numpy(values).to(_weight(plan, modules, block).device, dtype)
            for block, values in itertools.chain(factors, frozen)
        }


@torch.inference_mode(False)
def _fill(adapter: Adapter, *_: Any) -> None:
    """Draw the blocks that a state dict left without memory, where the weights have some."""
    blocks, modules = adapter.factors(), adapter.layers()
    if not any(block.is_meta for block in blocks.values()):
        return
    skipped = {
        name
        for name, block in blocks.items()
        if not block.is_meta or _weight(adapter.plan, modules, name).is_meta
    }
    # Of the dtype that the factors have now, which may have come with the state dict.
    made = _drawn(adapter.plan, modules, adapter._seed, adapter.dtype, skipped)
    for name, values in made.items():
        place = adapter.blocks.places[name]
        if place.frozen:
            place.owner._buffers[place.leaf] = values
        else:
            trained = nn.Parameter(values, blocks[name].requires_grad)
            place.owner._parameters[place.leaf] = trained
    adapter.blocks.scope.clear()
    adapter.blocks.prepare()


def _layer(plan: Plan, block: str) -> str:
    """Return the first layer of a block's group."""
    layout = plan.layout
    return layout.layer_of[layout.grouping.members[int(block.partition(".")[0])][0]]


def _weight(plan: Plan, modules: Mapping[str, nn.Module], block: str) -> Tensor:
    """Return the weight on whose device a block lives."""
    return parameter_of(modules[_layer(plan, block)])


def _weights(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {name: weight_of(module).detach() for name, module in modules.items()}


def placed(
    plan: Plan, modules: Mapping[str, nn.Module], blocks: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Move blocks to their group's first weight, all in one dtype."""
    return {
        name: block.to(device=_weight(plan, modules, name).device, dtype=dtype)
        for name, block in blocks.items()
    }


def frozen_of(plan: Plan, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Make the frozen blocks that no file stores, in float64 and on the CPU."""
    frozen: dict[str, Tensor] = plan.frozen(_weights(modules), like=torch.float64)
    return frozen


def _refuse_stored(plan: Plan) -> None:
    stored = [block for block, source in plan.layout.frozen.items() if source == "stored"]
    if stored:
        raise ValueError(
            f"spec must say how frozen blocks are made to be attached: {some(stored)} are 'stored' "
            "in a file"
        )
