"""`attach`: freeze a model and register the factors of a plan on it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from superlora.errors import AdapterError, some
from superlora.plan import Plan
from superlora.spec import Spec
from superlora.torch.adapter import Adapter, adapters_of
from superlora.torch.freezing import freeze
from superlora.torch.layers import parameter_of, shape_of, weight_of
from superlora.torch.replaced import Replaced
from superlora.torch.site import Site
from superlora.torch.targets import ALL_LINEAR, Targets, find_targets


def attach(
    model: nn.Module,
    spec: Spec,
    targets: Targets = ALL_LINEAR,
    *,
    name: str = "superlora",
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> Adapter:
    """Adapt a model's layers; its output stays bit for bit what it was.

    Parameters
    ----------
    model : torch.nn.Module
        Any model with ``Linear`` layers, or GPT-2's ``Conv1D``. Its parameters are
        frozen; their names and the modules' classes stay as they are.
    spec : Spec
        The design, such as ``superlora.lora(rank=8)``.
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

    Returns
    -------
    Adapter
        A module whose parameters are the factors.

    Raises
    ------
    AdapterError
        If `model` has an attribute of that name.
    TypeError, ValueError
        If the spec, the targets or the weights do not fit; nothing is changed
        then.

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
    plan = Plan(spec, {target: shape_of(module) for target, module in modules.items()})
    check_free(model, host_of(model, modules), name)
    _refuse_stored(plan)
    adapter = register(model, plan, modules, _initial(plan, modules, seed, dtype), name)
    adapter._seed = seed
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
    adapter.train(model.training)
    adapter._order = 1 + max((other._order for other in adapters_of(model)), default=0)
    registered = (module for module in model.modules() if isinstance(module, Adapter))
    adapter._frozen = freeze(model, registered)
    for target, module in modules.items():
        adapter._sites[target] = Site.add(module, target, adapter)
    host = host_of(model, modules)
    adapter._homes = (model, host)
    host.add_module(name, adapter)
    adapter._hook = model.register_load_state_dict_pre_hook(_refuse_merged)
    if pending is not None:
        adapter.replaced = pending
        pending.use(True)
    return adapter


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
    adapters = (module for module in model.modules() if isinstance(module, Adapter))
    taken = next((a for a in adapters if a.name == name and a._homes[:1] == (model,)), None)
    if taken is not None or hasattr(host, name):
        kind = type(taken or getattr(host, name)).__name__
        raise AdapterError(
            f"name must be free: the model has an attribute {name!r} already, of type {kind}; "
            "detach() it or choose another name"
        )


def _refuse_merged(model: nn.Module, state_dict: Any, *_: Any) -> None:
    # An adapter is loaded last: on its own it would refuse when the base has changed.
    metadata = getattr(state_dict, "_metadata", {})
    for path, module in model.named_modules():
        if isinstance(module, Adapter):
            module.check_loadable(metadata.get(path, {}))


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
    # Whatever contexts we are called in, the factors hold values and can be trained.
    with torch.device("cpu"), torch.inference_mode(False):
        factors = plan.init(seed, like=torch.float64) | frozen_of(plan, modules)
    return placed(plan, modules, factors, dtype)


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
        block: factor.to(device=_first_weight(plan, modules, block).device, dtype=dtype)
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


def _first_weight(plan: Plan, modules: Mapping[str, nn.Module], block: str) -> Tensor:
    """Return the first weight of the block's group, on whose device the block lives."""
    group = int(block.partition(".")[0])
    return parameter_of(modules[plan.layout.grouping.members[group][0]])
