"""`attach`: freeze a model and register the factors of a plan on it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from superlora._backend import backend_of
from superlora.design.ways import check_apply
from superlora.errors import AdapterError, some
from superlora.frozen import each_frozen
from superlora.init import each_factor
from superlora.maps._check import check, is_own
from superlora.plan import Plan
from superlora.spec import Spec
from superlora.supports import Supports, design_of
from superlora.torch.adapter import Adapter, adapters_of
from superlora.torch.empty import fill_after_loading, first_weight
from superlora.torch.freezing import freeze
from superlora.torch.layers import parameter_of, shape_of, weight_of
from superlora.torch.replaced import Replaced
from superlora.torch.site import Site
from superlora.torch.targets import ALL_LINEAR, Targets, find_targets
from superlora.torch.walk import outside_adapters, registered


def attach(
    model: nn.Module,
    spec: Spec | Supports | Mapping[Any, Any],
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
    spec : Spec or mapping of str to Spec
        The design, such as ``superlora.lora(rank=8)``; or one for each merge operation, as
        ``superlora.glora(rank=8)`` has them: keys are among `superlora.OPERATIONS`, or tuples of
        operations whose supports are grouped together, and a value may also be the name of
        an operation whose entries this one shares.
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
    adapter = register(model, plan, modules, _initial(plan, modules, seed, dtype), name)
    adapter._seed = seed
    adapter.applied = apply
    return adapter


def register(
    model: nn.Module,
    plan: Plan,
    modules: Mapping[str, nn.Module],
    factors: Mapping[str, Tensor],
    name: str,
    replaced: Mapping[str, Tensor] | None = None,
) -> Adapter:
    """Put an adapter with the given factors on a model; all checks lie behind us.

    Parameters
    ----------
    model : torch.nn.Module
        The model.
    plan : Plan
        What lies where.
    modules : mapping of str to torch.nn.Module
        The layers, in the plan's order.
    factors : mapping of str to torch.Tensor
        One tensor for each block of the plan.
    name : str
        A free attribute of the model.
    replaced : mapping of str to torch.Tensor, optional
        New values of the model's own parameters, which fit it.

    Returns
    -------
    Adapter
        The adapter.

    Raises
    ------
    AdapterError
        If another adapter has replaced the same parameter, or is merged into it.
    """
    pending = None
    if replaced:
        _refuse_replaced_twice(model, replaced)
        pending = Replaced(model, replaced)
        pending.refuse_merged()
    adapter = Adapter(plan, factors, name)
    # Both kinds, for what torch.compile cannot trace, or would trace again once it is known.
    backend_of(*adapter.factors().values(), torch.empty(0))
    adapter.train(model.training)
    others = [part for _, part in registered(model) if isinstance(part, Adapter)]
    adapter._order = 1 + _last_order(model, others)
    adapter._frozen = freeze(model)
    for target in plan.layout.supports:
        adapter._sites[target] = Site.add(modules[target], target, adapter)
    host = host_of(model, modules)
    adapter._homes = (model, host)
    host.add_module(name, adapter)
    hooks = [other._hooks for other in others if other._homes[:1] == (model,)]
    adapter._hooks = hooks[0] if hooks else _hooks_of(model)
    if adapter.shares:
        adapter._scope_hooks = (
            model.register_forward_pre_hook(adapter.scope.open),
            model.register_forward_hook(adapter.scope.close, always_call=True),
        )
    if pending is not None:
        adapter.replaced = pending
        pending.use(True)
    return adapter


def _fitting(design: Spec | Supports, modules: Mapping[str, nn.Module]) -> Spec | Supports:
    """Leave out what scales the bias of layers that have none."""
    bare = [name for name, module in modules.items() if Site.bias_below(module) is None]
    if isinstance(design, Spec) or not bare:
        return design
    return design.without("scale_bias", bare, all_of=len(bare) == len(modules))


def _hooks_of(model: nn.Module) -> tuple[RemovableHandle, ...]:
    return (
        model.register_load_state_dict_pre_hook(_refuse_merged),
        model.register_load_state_dict_post_hook(fill_after_loading),
    )


def _last_order(model: nn.Module, adapters: Sequence[Adapter]) -> int:
    """Return the largest order of the adapters of a model."""
    orders = [adapter._order for adapter in adapters]
    sites = [Site.of(module) for _, module in outside_adapters(model)]
    # Those of another model too; every layer has its own in order.
    orders += [site.links[-1].adapter._order for site in sites if site is not None]
    return max(orders, default=0)


def _refuse_replaced_twice(model: nn.Module, replaced: Mapping[str, Tensor]) -> None:
    for other in adapters_of(model):
        name = other.replaced.overlaps(replaced, model) if other.replaced is not None else None
        if name is not None:
            raise AdapterError(
                f"adapter {other.name!r} has replaced {name!r} already: detach it first"
            )


def host_of(model: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    """Return the module that registers the adapter.

    Parameters
    ----------
    model : torch.nn.Module
        The model.
    modules : mapping of str to torch.nn.Module
        The layers to adapt.

    Returns
    -------
    torch.nn.Module
        The model; but the first layer for a container, whose children are
        counted, indexed and called one after the other.
    """
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return next(iter(modules.values())) if isinstance(model, containers) else model


def check_free(model: nn.Module, host: nn.Module, name: str) -> None:
    """Refuse a name that is in use already, or that torch cannot register.

    Parameters
    ----------
    model : torch.nn.Module
        The model.
    host : torch.nn.Module
        The module that is to register the adapter.
    name : str
        The adapter's name.

    Raises
    ------
    AdapterError
        If the module has an attribute of that name, or the model an adapter.
    ValueError
        If it is not an identifier.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name must be a Python identifier: got {name!r}")
    adapters = [part for _, part in registered(model) if isinstance(part, Adapter)]
    taken = [part for part in adapters if part.name == name and part._homes[:1] == (model,)]
    if taken or hasattr(host, name):
        kind = type(taken[0] if taken else getattr(host, name)).__name__
        raise AdapterError(
            f"name must be free: the model has an attribute {name!r} already, of type {kind}; "
            "detach() it or choose another name"
        )


def _refuse_merged(model: nn.Module, state_dict: Any, *_: Any) -> None:
    # An adapter is loaded last: on its own it would refuse when the base has changed.
    metadata = getattr(state_dict, "_metadata", {})
    for path, part in registered(model):
        if isinstance(part, Adapter):
            part.check_loadable(metadata.get(path, {}))


def check_model(model: object) -> None:
    """Refuse what is no model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module: got {type(model).__name__}")


def _initial(
    plan: Plan, modules: Mapping[str, nn.Module], seed: int, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype: got {dtype!r}")
    if dtype is None:
        weights = (parameter_of(module).dtype for module in modules.values())
        dtype = functools.reduce(torch.promote_types, weights, torch.float32)
    devices = {
        block: first_weight(plan, modules, block).device for block in plan.layout.input_shapes
    }
    # A block without memory is not drawn before it has some.
    empty = {
        block
        for block, device in devices.items()
        if device.type == "meta" and not plan.layout.frozen.get(block, "").startswith("singular")
    }
    found = {}
    # Whatever contexts we are called in, the factors hold values and can be trained.
    with torch.device("cpu"), torch.inference_mode(False):
        drawn = each_factor(plan.layout, seed, skipped=empty)
        made = each_frozen(plan.layout, _Weights(modules), skipped=empty)
        # One at a time: all of them in float64 would be twice the adapter.
        for block, values in itertools.chain(drawn, made):
            found[block] = torch.from_numpy(values).to(devices[block], dtype)
        for block in empty:
            shape = plan.layout.input_shapes[block]
            found[block] = torch.empty(shape, device="meta", dtype=dtype)
    return found


def placed(
    plan: Plan,
    modules: Mapping[str, nn.Module],
    factors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Move blocks to their group's first weight, all in one dtype.

    Parameters
    ----------
    plan : Plan
        What lies where.
    modules : mapping of str to torch.nn.Module
        The layers.
    factors : mapping of str to torch.Tensor
        The blocks by name.
    dtype : torch.dtype, optional
        That of the first trainable block by default.

    Returns
    -------
    dict of str to torch.Tensor
        The same values.
    """
    dtype = dtype or factors[next(iter(plan.factor_shapes))].dtype
    return {
        block: factor.to(device=first_weight(plan, modules, block).device, dtype=dtype)
        for block, factor in factors.items()
    }


def frozen_of(plan: Plan, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Make the frozen blocks of a model's adapter, in float64 and on the CPU.

    Parameters
    ----------
    plan : Plan
        What lies where.
    modules : mapping of str to torch.nn.Module
        The layers, whose weights' singular vectors may be asked for.

    Returns
    -------
    dict of str to torch.Tensor
        All but those that a file stores.

    Raises
    ------
    AdapterError
        If singular vectors are asked for and a weight lies on the meta device.
    """
    frozen: dict[str, Tensor] = plan.frozen(_Weights(modules), like=torch.float64)
    return frozen


def _refuse_stored(plan: Plan) -> None:
    stored = [block for block, source in plan.layout.frozen.items() if source == "stored"]
    if stored:
        raise ValueError(
            f"spec must say how frozen blocks are made to be attached: {some(stored)} are 'stored' "
            "in a file"
        )


class _Weights(Mapping[str, Tensor]):
    """The weights of layers by name; one is read at a time."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules

    def __getitem__(self, name: str) -> Tensor:
        weight = weight_of(self._modules[name]).detach()
        if weight.is_meta:
            raise AdapterError(
                f"weights must be loaded where a spec takes their singular vectors: {name!r} lies "
                "on the meta device"
            )
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)
