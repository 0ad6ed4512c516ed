"""One adapter, one safetensors file: every factor once, and what it needs to be loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from superlora.design.ways import check_apply
from superlora.errors import AdapterError, some
from superlora.plan import Plan
from superlora.supports import OF_BIAS
from superlora.torch.adapter import Adapter
from superlora.torch.attach import check_free, check_model, frozen_of, host_of, placed, register
from superlora.torch.files import Header, read_tensors, write_tensors
from superlora.torch.headers import (
    FORMAT_VERSION,
    KEY,
    MODEL,
    check_frozen,
    check_maps,
    check_tensors,
    checksums_of,
    header_of,
    print_of,
    scale_of,
    shapes_of,
    spec_of,
    stored_shapes,
    valid_header,
)
from superlora.torch.layers import is_adaptable, parameter_of, shape_of
from superlora.torch.replaced import refuse_unfit
from superlora.torch.site import Site
from superlora.torch.targets import find_targets
from superlora.torch.walk import module_of


def save_adapter(adapter: Adapter, path: Path) -> None:
    """Write an adapter's factors and description to `path`, atomically.

    Parameters
    ----------
    adapter : Adapter
        The adapter.
    path : pathlib.Path
        The file; replaced if it exists.

    Raises
    ------
    AdapterError
        If a factor lies on the meta device.
    """
    if any(block.is_meta for block in adapter.factors().values()):
        raise AdapterError(
            f"adapter {adapter.name!r} must not lie on the meta device to be saved: load the "
            "model's weights first"
        )
    blocks = {name: block.detach().cpu() for name, block in adapter.factors().items()}
    header: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "spec": adapter.plan.spec.to_dict(),
        "weights": [[name, list(shape)] for name, shape in adapter.plan.layout.layers.items()],
    }
    if adapter.scale != adapter.plan.scale:
        header["scale"] = adapter.scale
    if without := _without_bias(adapter.plan, adapter.layers()):
        header["without_bias"] = without
    tensors = {name: blocks[name] for name in stored_shapes(adapter.plan)}
    made = {name: block for name, block in blocks.items() if name not in tensors}
    if made:
        header["frozen"] = {name: print_of(block) for name, block in made.items()}
    checksums = checksums_of(adapter.plan)
    if checksums:
        header["maps"] = checksums
    if adapter.replaced is not None:
        tensors |= {MODEL + name: value for name, value in adapter.replaced.values().items()}
    write_tensors(path, tensors, {KEY: json.dumps(header, separators=(",", ":"))})


def load(
    model: nn.Module, path: str | Path, *, name: str = "superlora", apply: str = "auto"
) -> Adapter:
    """Attach a saved adapter to a model.

    Parameters
    ----------
    model : torch.nn.Module
        A model with layers of the names and shapes that the file gives.
    path : str or pathlib.Path
        A file that ``Adapter.save`` wrote.
    name : str
        The attribute of `model` under which the adapter is registered.
    apply : {"auto", "factored", "formed"}
        Whether updates are formed in the forward pass, as in `attach`.

    Returns
    -------
    Adapter
        With the very factors that were saved, on the layers' devices.

    Raises
    ------
    AdapterError
        If `model` has an attribute of that name, or a weight lies on the meta
        device.
    FileNotFoundError
        If there is no such file.
    TypeError
        If `model` is not a module, or a weight is not of a floating-point type.
    ValueError
        If the file is truncated, not an adapter, of another format version, for
        other names or shapes, or has missing or extra tensors, or its maps or frozen
        blocks are not drawn as they were: they are listed, and the model is as it was.
    """
    check_model(model)
    path = Path(path)
    plan, header, tensors = _read(path)
    check_apply(apply, plan.layout)
    factors = {key: value for key, value in tensors.items() if not key.startswith(MODEL)}
    replaced = {
        key.removeprefix(MODEL): value for key, value in tensors.items() if key.startswith(MODEL)
    }
    modules = find_layers(model, plan, path)
    check_biases(plan, modules, header, path)
    check_free(model, host_of(model, modules), name)
    check_maps(plan, header, path)
    refuse_unfit(model, replaced, path)
    dtype = factors[next(iter(plan.factor_shapes))].dtype
    factors |= _make_frozen(plan, modules, header, path, dtype)
    adapter = register(
        model, plan, modules, placed(plan, modules, factors), name, replaced=replaced
    )
    adapter.scale = scale_of(header, plan.spec)
    adapter.applied = apply
    return adapter


def check_biases(
    plan: Plan, modules: Mapping[str, nn.Module], header: Mapping[str, Any], path: Path
) -> None:
    """Refuse layers that have a bias where a file's had none, or the other way round.

    Parameters
    ----------
    plan : Plan
        The file's design.
    modules : mapping of str to torch.nn.Module
        The layers.
    header : mapping
        The file's.
    path : pathlib.Path
        The file, for the message.

    Raises
    ------
    ValueError
        If an operation of the bias would find another; all layers are listed.
    """
    with valid_header(path):
        expected = set(header.get("without_bias", ()))
    found = set(_without_bias(plan, modules))
    problems = [
        f"{name!r} has {'no' if name in found else 'a'} bias"
        for name in plan.layout.layers
        if (name in found) != (name in expected)
    ]
    if problems:
        raise ValueError(
            f"layers must have a bias where they had one in {path}: {some(problems, 20)}"
        )


def _without_bias(plan: Plan, modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the layers that have no bias where an operation would change it."""
    return [
        name
        for name, own in plan.layout.supports.items()
        if not OF_BIAS.isdisjoint(own) and Site.bias_below(modules[name]) is None
    ]


def _make_frozen(
    plan: Plan,
    modules: Mapping[str, nn.Module],
    header: Mapping[str, Any],
    path: Path,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    # Rounded as they were when they were saved.
    made = {name: block.to(dtype) for name, block in frozen_of(plan, modules).items()}
    check_frozen({name: print_of(block) for name, block in made.items()}, header, path)
    return made


def _read(path: Path) -> tuple[Plan, dict[str, Any], dict[str, Tensor]]:
    found: list[tuple[Plan, dict[str, Any]]] = []

    def check(metadata: Mapping[str, str], tensors: Header) -> None:
        header = header_of(metadata, path)
        plan = _plan_of(header, path)
        found.append((plan, header))
        check_tensors(plan, tensors, path)

    tensors = read_tensors(path, check)
    return *found[0], tensors


def _plan_of(header: Mapping[str, Any], path: Path) -> Plan:
    spec, shapes = spec_of(header, path), shapes_of(header, path)
    with valid_header(path):
        return Plan(spec, shapes)


def find_layers(model: nn.Module, plan: Plan, path: Path) -> dict[str, nn.Module]:
    """Return the layers of a model that a plan names.

    Parameters
    ----------
    model : torch.nn.Module
        The model.
    plan : Plan
        Whose weights are named like the layers.
    path : pathlib.Path
        The file that the plan was read from, for the message.

    Returns
    -------
    dict of str to torch.nn.Module
        In the plan's order.

    Raises
    ------
    AdapterError
        If a weight lies on the meta device.
    ValueError
        If a layer is missing, of another shape or not adaptable; all are listed.
    """
    layers = plan.layout.layers
    found = {name: module_of(model, name) for name in layers}
    problems = []
    for name, shape in layers.items():
        module = found[name]
        if module is None:
            problems.append(f"no layer {name!r}")
        elif not is_adaptable(module):
            problems.append(f"{name!r} is a {type(module).__name__}")
        elif shape_of(module) != shape:
            problems.append(f"{name!r} has shape {shape_of(module)} instead of {shape}")
    if problems:
        raise ValueError(f"the model must have the layers of {path}: {some(problems, 20)}")
    modules = {name: module for name, module in found.items() if module is not None}
    chosen = set(map(id, modules.values()))
    find_targets(model, lambda _, module: id(module) in chosen)  # refuses unfit ones
    empty = [layer for layer, module in modules.items() if parameter_of(module).is_meta]
    if empty:  # giving the model memory later would wipe the factors
        raise AdapterError(
            f"weights must be loaded before an adapter: {len(empty)} lie on the meta device, first "
            f"{empty[0]!r}"
        )
    return modules
