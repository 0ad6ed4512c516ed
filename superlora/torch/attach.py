"""`attach`: freeze a model and register the factors of a plan on it."""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from superlora._backend import backend_of
from superlora.design.cost_rule import FORMED, application, check_apply
from superlora.design.spec import Spec
from superlora.design.supports import ADD, OF_BIAS, Supports, design_of, unnamed, without
from superlora.errors import AdapterError, some
from superlora.maps._check import check, is_own
from superlora.plan import Plan
from superlora.torch.adapter import Adapter, adapters_of, registered
from superlora.torch.dropout import NAMES, Dropout
from superlora.torch.files.state import without_bias
from superlora.torch.layers import KINDS, Weight, computes_plainly
from superlora.torch.low_rank import applies, low_rank
from superlora.torch.offload import is_offloaded
from superlora.torch.replaced import Also, Replaced, batches_of, with_also
from superlora.torch.selection import Selection
from superlora.torch.sharded import refuse_engines, refuse_plans, spread
from superlora.torch.site import Site
from superlora.torch.start import device_beside, drawn, placed, starting, with_opposite_terms
from superlora.torch.summary import warn_of_few
from superlora.torch.targets import ALL, ALL_LINEAR, Targets, find_targets
from superlora.torch.walk import freeze, outside_adapters, unwrapped


def attach(
    model: nn.Module,
    spec: Spec | Mapping[Any, Any] | None,
    targets: Targets = ALL_LINEAR,
    *,
    exclude: Targets | None = None,
    layers: Iterable[int] | Mapping[str, Iterable[int]] | None = None,
    tied: str = "refuse",
    also: Also | None = None,
    dropout: float = 0.0,
    rank_dropout: float = 0.0,
    module_dropout: float = 0.0,
    name: str = "superlora",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    init: Mapping[str, Any] | None = None,
    keep_output: bool = False,
    apply: str = "auto",
) -> Adapter:
    """Adapt a model's weights; its output stays bit for bit what it was.

    But for a ``factor_map`` from one vector, as in `superlora.unilora`: it cannot start at zero.
    With `init`, the model starts with the update of given factors.

    Parameters
    ----------
    model : torch.nn.Module
        Any model with linear layers, convolutions, embeddings, norms, or other parameters such as
        stacked experts. Its parameters are frozen; their names and the modules' classes stay as
        they are.
    spec : Spec, Supports or mapping
        The design, such as ``superlora.lora(rank=8)``; or one for each merge operation, such as
        ``superlora.glora(rank=8)`` or a mapping that `superlora.Supports` takes. None where
        `targets` gives one for each key.
    targets : sequence of str, str, callable or mapping
        Names or suffixes of layers or parameters; a regular expression for whole names;
        ``"all-linear"``, all linear layers but output heads; ``"all"``, convolutions and stacked
        experts too, but no embeddings; ``predicate(name, module) -> bool``; or a mapping, of
        which each layer takes the first key that it is named by or lies below: to a `Spec` of its
        own, to None to leave it out, or to rows of a layer that are adapted by themselves, such as
        ``{"attn.qkv": {"q": (0, d), "v": (2 * d, 3 * d)}}``.
    exclude : sequence of str, str or callable, optional
        Layers to leave out, with all that lies below them.
    layers : iterable of int, or mapping of str to it, optional
        Numbers of the layers to adapt, such as ``range(8, 24)``: the first number in a name, or
        that after the path which the one key is.
    tied : {"refuse", "once"}
        Whether a weight that other layers share is refused, or adapted once for all of them.
    also : sequence of str, str or callable, optional
        Parameters of the model that train, and are saved, with the adapter, such as a new head:
        names of modules or parameters or their ends, a regular expression for whole names, or
        ``predicate(name, parameter) -> bool``. Modules bring their stored buffers too. The
        model's own come back with `detach` and inside `disabled`.
    dropout : float
        In training, the part of a layer's inputs that its update does not see, in [0, 1).
    rank_dropout : float
        In training, the part of the rows of ΔW that are zero, as PEFT and LyCORIS call it.
    module_dropout : float
        In training, the probability that a layer is without its update.
    name : str
        The attribute of `model` under which the adapter is registered; of its
        first adapted layer, where `model` is a ``Sequential`` or a ``ModuleList``.
    seed : int
        Seed of the initial factors, in [0, 2**64).
    dtype : torch.dtype, optional
        The factors' dtype; by default the weights', float32 for half precision.
    init : mapping of str to array, optional
        Factors to start from instead of those of the seed, of numpy, torch or jax: what
        ``Plan.fit`` or another adapter's ``factors()`` returns. They are copied, in the factors'
        dtype.
    keep_output : bool
        Let the output be what it was, but for rounding, although the factors are those of `init`:
        the update is ``ΔW(factors) - ΔW(init)``. See the notes.
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
        If the spec, the targets, the weights or the factors do not fit, or some updates cannot be
        applied factored; nothing is changed then.

    Notes
    -----
    PiSSA ([1]_) and LoRA-GA ([2]_) start from factors of the weight or of a gradient, and subtract
    their update from the weight. With `keep_output` it is subtracted from the update instead, as
    fixed terms of the sum (``Spec.frozen_terms``): W₀ is not touched or rounded, and the file, a
    merge and an export mean the same on the model as it was. A forward pass applies twice the
    terms, unless it is merged; a LoRA of rank r is written for other libraries as one of rank 2r.

    References
    ----------
    .. [1] F. Meng, Z. Wang and M. Zhang, "PiSSA: Principal Singular Values and Singular Vectors
       Adaptation of Large Language Models", 2024.
    .. [2] S. Wang, L. Yu and J. Li, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation",
       2024.

    Examples
    --------
    >>> import torch, superlora as sl, superlora.torch as slt
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    >>> adapter = slt.attach(model, sl.lora(rank=2), targets=["0"])
    >>> adapter.num_parameters, model(torch.ones(1, 8)).shape
    (32, torch.Size([1, 2]))
    >>> factors = adapter.factors()
    >>> adapter.detach()
    >>> slt.attach(model, sl.lora(rank=2), ["0"], init=factors, keep_output=True).plan.spec
    Spec(rank=2, terms=2, frozen_terms=1)
    """
    model = checked_model(model)
    selection = find_targets(model, targets, exclude=exclude, layers=layers, tied=tied)
    left_out = Dropout(dict(zip(NAMES, (dropout, rank_dropout, module_dropout), strict=True)))
    if isinstance(targets, str) and targets in (ALL_LINEAR, ALL):
        _leave_out_unfit(spec, selection)
    design = _fitting(_design(spec, selection), selection)
    plan = Plan(with_opposite_terms(design) if keep_output else design, selection.shapes)
    check_free(model, host_of(model, selection.weights), name)
    check_operations(plan, selection)
    check_apply(apply, plan.layout)
    check_ways(plan, selection, apply)
    for fixed, before, size in plan.layout.map_uses():
        if is_own(fixed):  # the library's are tested
            check(fixed, before, size, like=torch.empty(0, dtype=torch.float64))
    check_dropout(plan, selection, left_out)
    replaced = with_also(model, also, selection.weights.values())
    blocks, stored = starting(plan, selection.weights, seed, dtype, init, keep_output)
    adapter = Adapter(plan, blocks, name)
    adapter._seed, adapter._stored = seed, stored
    adapter.applied = apply
    adapter.dropout = left_out
    register(model, adapter, selection, replaced)
    if isinstance(targets, str) and targets in (ALL_LINEAR, ALL):
        warn_of_few(adapter)
    return adapter


def register(
    model: nn.Module,
    adapter: Adapter,
    selection: Selection,
    replaced: Replaced | None = None,
) -> Adapter:
    """Put an adapter on a model; the checks of the blocks that it holds lie behind us."""
    refuse_plans((n, each.module, each.parameter) for n, each in selection.weights.items())
    others = [other.replaced for other in adapters_of(model) if other.replaced is not None]
    if replaced is not None:
        for other in others:
            twice = replaced.overlap(other)
            if twice:
                raise AdapterError(
                    f"another adapter has replaced {twice[0]!r} already: detach it first"
                )
        replaced.refuse_merged()
    # Both kinds, for what torch.compile cannot trace, or would trace again once it is known.
    backend_of(*adapter.blocks.values(), torch.empty(0))
    adapter.train(model.training)
    # Those of another model on these layers too.
    adapter._order = 1 + max([other._order for other in adapters_of(model)], default=0)
    adapter._frozen = freeze(model, {id(p) for own in others for p in own.parameters().values()})
    adapter._bare = without_bias(adapter.plan, selection.weights)
    adapter._link(model, selection)
    host = host_of(model, selection.weights)
    adapter._homes = (model, host)
    host.add_module(adapter.name, adapter)
    adapter._hooks += [
        model.register_load_state_dict_pre_hook(adapter.refuse_to_load),
        model.register_load_state_dict_post_hook(functools.partial(_fill, adapter)),
    ]
    if any(each.several for own in adapter.supports.values() for each in own.shared()):
        adapter._hooks += [
            model.register_forward_pre_hook(adapter.blocks.scope.open),
            model.register_forward_hook(adapter.blocks.scope.close, always_call=True),
        ]
    adapter._batches = batches_of(model)
    adapter.dropout.check = functools.partial(check_dropout, adapter.plan, selection)
    if replaced is not None:
        adapter.replaced = replaced
        replaced.use(True)
    return adapter


def _design(spec: Any, selection: Selection) -> Spec | Supports:
    """Return one design for all weights, also where targets give several."""
    designs = selection.designs
    rest = [name for name in selection.weights if name not in designs]
    if spec is None and rest:
        raise TypeError(
            f"spec must be a superlora.Spec or a mapping where targets give none: {rest[0]!r} has "
            "no other"
        )
    if not designs:
        return design_of(spec)
    if rest:
        designs = {**dict.fromkeys(rest, design_of(spec)), **designs}
    one, *more = {id(own): own for own in designs.values()}.values()
    if not more and isinstance(one, Supports):
        return one
    for name, own in designs.items():
        if not isinstance(own, Spec):
            raise TypeError(
                "targets must map layers to a superlora.Spec, to None or to rows, or all of them "
                f"to one superlora.Supports: got {own!r} for {name!r}"
            )
    return spec_of({name: designs[name].of(name) for name in selection.weights})


def spec_of(designs: Mapping[str, Spec | None]) -> Spec:
    """Return one spec for weights of different ones, with overrides for all but the first."""
    names: dict[Spec | None, list[str]] = {}
    for name, design in designs.items():
        names.setdefault(design, []).append(name)
    first, *others = [own for own in names if own is not None] or [Spec()]
    if set(names) == {None}:
        raise ValueError("targets must leave a layer to adapt: overrides leave out all of them")
    overrides = {}
    for own in (*others, *([None] if None in names else [])):
        fields = None
        if own is not None:
            every = {item.name: getattr(own, item.name) for item in dataclasses.fields(own)}
            fields = {key: value for key, value in every.items() if key != "overrides"}
        overrides["|".join(f"^{re.escape(name)}$" for name in names[own])] = fields
    return first.replace(overrides=overrides)


def _leave_out_unfit(spec: Any, selection: Selection) -> None:
    """Leave out the weights that a design cannot have, where nobody has named them."""
    whole = design_of(spec)
    specs = [whole] if isinstance(whole, Spec) else [own for _, own in whole.designs]
    if any(own.groups != "weight" for own in specs):
        return  # one weight alone says nothing of the groups
    known: dict[object, str] = {}
    shapes = selection.shapes
    for name, weight in list(selection.weights.items()):
        design = unnamed(whole, name)
        if design is None:
            continue
        bare = Site.bias_below(weight) is None
        flags = (name in selection.without_bias, name in selection.shared_bias)
        key = (shapes[name], bare, weight.kind, flags)
        if key not in known:
            known[key] = ""
            alone = Selection({name: weight}, readers=selection.readers)
            alone.without_bias |= selection.without_bias & {name}
            alone.shared_bias |= selection.shared_bias & {name}
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    plan = Plan(_fitting(design, alone), {name: shapes[name]})
                    check_operations(plan, alone)
                    check_ways(plan, alone, "auto")
            except ValueError as error:
                known[key] = f"cannot have this design: {error}"
        if known[key]:
            selection.left_out[name] = known[key]
            del selection.weights[name]
    if not selection.weights:
        raise ValueError(
            "targets must match at least one layer that the spec fits: "
            f"{some(f'{n!r} {why}' for n, why in selection.left_out.items())}"
        )


def _fitting(design: Spec | Supports, selection: Selection) -> Spec | Supports:
    """Leave out what scales the bias of layers that have none."""
    weights = selection.weights
    bare = [name for name, weight in weights.items() if Site.bias_below(weight) is None]
    if isinstance(design, Spec) or not bare:
        return design
    return without(design, "scale_bias", bare, all_of=len(bare) == len(weights))


def check_operations(plan: Plan, selection: Selection) -> None:
    """Refuse operations that some kinds of weights cannot have."""
    for name, own in plan.layout.supports.items():
        weight = selection.weights[name]
        more = [operation for operation in own if operation != ADD]
        where = f"{name!r}, a {type(weight.module).__name__}"
        if more and name in selection.rows:
            raise ValueError(f"rows of a layer must have no other operation than {ADD!r}: {more}")
        if more and not weight.summable:
            raise ValueError(
                f"a quantised layer must have no other operation than {ADD!r}, since its weight "
                f"cannot be read: got {more} for {where}"
            )
        if OF_BIAS.intersection(own) and weight.complex:
            raise ValueError(
                f"operations on a bias must have real numbers: {where}, has complex ones"
            )
        gains = OF_BIAS.intersection(own) and Site.bias_below(weight) is None
        if gains and (weight.key != "weight" or not KINDS[weight.kind].gains_bias):
            raise ValueError(
                f"operations on a bias must have layers that have, or can be given, one: got "
                f"{sorted(OF_BIAS.intersection(own))} for {where}"
            )
        away = weight.summable and is_offloaded(weight.module, weight.parameter)
        if away and (more or not weight.linear):
            raise ValueError(
                f"a layer must be linear and have no other operation than {ADD!r} to be adapted "
                f"while accelerate offloads it: got {more or [ADD]} for {where}; attach, then "
                "offload the model"
            )
        of_bias = sorted(OF_BIAS.intersection(own))
        if of_bias and name in selection.without_bias:
            readers = [*selection.readers.get(name, ()), weight.module]
            raise ValueError(
                f"operations on a bias must have layers whose bias is read: got {of_bias} for "
                f"{where}, of which a {type(readers[0]).__name__} reads the weight alone"
            )
        if of_bias and name in selection.shared_bias:
            raise ValueError(
                f"operations on a bias must have layers of their own bias: got {of_bias} for "
                f"{where}, which shares weight or bias with another layer"
            )
        if of_bias and weight.axes.out != getattr(weight.module, "out_channels", weight.axes.out):
            raise ValueError(
                f"operations on a bias must have as many entries as the weight has outputs: got "
                f"{of_bias} for {where}, of several groups"
            )


def check_ways(plan: Plan, selection: Selection, apply: str) -> None:
    """Refuse updates that can only be formed, or only factored, where a layer allows the other."""
    layout = plan.layout
    for name, own in layout.supports.items():
        weight = selection.weights[name]
        if not weight.summable:
            formed = [each for each in own.values() if application(layout, each).factored is None]
            if formed or apply == FORMED:
                raise ValueError(
                    "a quantised layer must have an update that is applied factored, around its "
                    f"own forward: that of {name!r} would be formed"
                )
        elif apply == "factored" and not weight.linear:
            ranks = [low_rank(layout, each) for each in own.values()]
            if own.keys() != {ADD} or not all(ranks) or not applies(weight.module):
                raise ValueError(
                    f"apply='factored' must have layers that take products: {name!r}, a "
                    f"{type(weight.module).__name__}, takes a sum of weight and update; use 'auto'"
                )


def check_dropout(plan: Plan, selection: Selection, dropout: Dropout) -> None:
    """Refuse dropout where an update is not added to a layer's output by itself."""
    for name, own in plan.layout.supports.items() if dropout.on else ():
        weight = selection.weights[name]
        alone = own.keys() == {ADD} and not selection.readers.get(name)
        ranks = [low_rank(plan.layout, each) for each in own.values()]
        added = not weight.summable or computes_plainly(weight.module)
        fits = added if weight.linear else applies(weight.module) and all(ranks)
        indices = dropout["dropout"] and weight.kind == "embedding"
        if not alone or not fits or indices:
            raise ValueError(
                f"{' and '.join(dropout.values)} must have layers whose update is added to their "
                f"output: that of {name!r}, a {type(weight.module).__name__}, is a part of its "
                f"weight{', and its inputs are indices' if indices else ''}; leave it out or have "
                "no dropout"
            )


def host_of(model: nn.Module, weights: Mapping[str, Weight]) -> nn.Module:
    """Return what registers the adapter: the model, or the first layer of a container."""
    # The children of a container are counted, indexed and called one after the other.
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return next(iter(weights.values())).module if isinstance(model, containers) else model


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


def checked_model(model: object) -> nn.Module:
    """Return the model to adapt, without what is wrapped around it, or refuse what is none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module: got {type(model).__name__}")
    refuse_engines(outside_adapters(model))
    return unwrapped(model)


@torch.inference_mode(False)
def _fill(adapter: Adapter, *_: Any) -> None:
    """Draw the blocks that a state dict left without memory, where the weights have some."""
    blocks, weights = adapter.factors(), adapter.weights()
    if not any(block.is_meta for block in blocks.values()):
        return
    skipped = {
        name
        for name, block in blocks.items()
        if not block.is_meta or device_beside(adapter.plan, weights, name).type == "meta"
    }
    # Of the dtype that the factors have now, which may have come with the state dict.
    if adapter._stored:
        own = {n: v for n, v in adapter._stored.items() if n not in skipped}
        made = placed(adapter.plan, weights, own, adapter.dtype)
    else:
        made = drawn(adapter.plan, weights, adapter._seed, adapter.dtype, skipped)
    for name, values in made.items():
        place = adapter.blocks.places[name]
        values = spread(values, blocks[name])
        if place.frozen:
            place.owner._buffers[place.leaf] = values
        else:
            trained = nn.Parameter(values, blocks[name].requires_grad)
            place.owner._parameters[place.leaf] = trained
    if not any(block.is_meta for block in adapter.blocks.values()):
        adapter._stored = {}
    adapter.blocks.scope.clear()
    adapter.blocks.prepare()
