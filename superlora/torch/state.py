"""One adapter, one safetensors file: every factor once, and what it needs to be loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from superlora.errors import AdapterError, some
from superlora.frozen import fingerprint
from superlora.plan import Plan
from superlora.spec import Spec
from superlora.torch.adapter import Adapter
from superlora.torch.attach import check_free, check_model, frozen_of, host_of, placed, register
from superlora.torch.files import Header, read_tensors, unfit_dtypes, write_tensors
from superlora.torch.layers import is_adaptable, parameter_of, shape_of
from superlora.torch.replaced import refuse_unfit
from superlora.torch.targets import find_targets
from superlora.uses import map_uses

FORMAT_VERSION = 1
# Before the names of the model's own parameters that come with the adapter.
_MODEL = "model."
# One metadata key: safetensors writes several in no fixed order.
_KEY = "superlora"
# What reading a header of other values than ours can raise.
_UNREADABLE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
# Between fingerprints: rounding changes one by less.
_TOLERANCE = 1e-3


def save_adapter(adapter: Adapter, path: Path) -> None:
    """Write an adapter's factors and description to `path`, atomically.

    Parameters
    ----------
    adapter : Adapter
        The adapter.
    path : pathlib.Path
        The file; replaced if it exists.
    """
    blocks = {name: block.detach().cpu() for name, block in adapter.factors().items()}
    header: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "spec": adapter.plan.spec.to_dict(),
        "weights": [[name, list(shape)] for name, shape in adapter.plan.shapes.items()],
    }
    if adapter.scale != adapter.plan.scale:
        header["scale"] = adapter.scale
    tensors = {name: blocks[name] for name in _stored_shapes(adapter.plan)}
    made = {name: block for name, block in blocks.items() if name not in tensors}
    if made:
        header["frozen"] = {
            name: fingerprint(block.double().numpy()) for name, block in made.items()
        }
    checksums = _checksums(adapter.plan)
    if checksums:
        header["maps"] = checksums
    if adapter.replaced is not None:
        tensors |= {_MODEL + name: value for name, value in adapter.replaced.values().items()}
    write_tensors(path, tensors, {_KEY: json.dumps(header, separators=(",", ":"))})


def load(model: nn.Module, path: str | Path, *, name: str = "superlora") -> Adapter:
    """Attach a saved adapter to a model.

    Parameters
    ----------
    model : torch.nn.Module
        A model with layers of the names and shapes that the file gives.
    path : str or pathlib.Path
        A file that ``Adapter.save`` wrote.
    name : str
        The attribute of `model` under which the adapter is registered.

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
    factors = {key: value for key, value in tensors.items() if not key.startswith(_MODEL)}
    replaced = {
        key.removeprefix(_MODEL): value for key, value in tensors.items() if key.startswith(_MODEL)
    }
    modules = find_layers(model, plan, path)
    check_free(model, host_of(model, modules), name)
    _check_maps(plan, header, path)
    refuse_unfit(model, replaced, path)
    dtype = factors[next(iter(plan.factor_shapes))].dtype
    factors |= _make_frozen(plan, modules, header, path, dtype)
    adapter = register(
        model, plan, modules, placed(plan, modules, factors), name, replaced=replaced
    )
    adapter.scale = header.get("scale", plan.scale)
    return adapter


def _make_frozen(
    plan: Plan,
    modules: Mapping[str, nn.Module],
    header: Mapping[str, Any],
    path: Path,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    # Rounded as they were when they were saved.
    made = {name: block.to(dtype) for name, block in frozen_of(plan, modules).items()}
    expected = header.get("frozen", {})
    wrong = [
        name
        for name, block in made.items()
        if not abs(fingerprint(block.double().numpy()) - expected.get(name, math.nan)) < _TOLERANCE
    ]
    if wrong:
        raise ValueError(
            f"frozen blocks must be made as they were when {path} was saved, from a seed or from "
            f"the model's weights, which must be the same: {some(wrong, 20)} differ"
        )
    return made


def _checksums(plan: Plan) -> dict[str, int]:
    """Return a number for what each different map draws, by its first group or its vector."""
    uses = map_uses(plan.layout)
    found = {name: use[0].checksum(*use[1:]) for use, name in uses.items()}
    return {name: number for name, number in found.items() if number is not None}


def _check_maps(plan: Plan, header: Mapping[str, Any], path: Path) -> None:
    expected = header.get("maps", {})
    found = _checksums(plan)
    wrong = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
    if wrong:
        raise ValueError(
            f"maps must be drawn from their seeds as they were when {path} was saved: those of the "
            f"groups or vectors {some(map(repr, sorted(wrong)), 20)} differ"
        )


def _stored_shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the blocks that a file holds."""
    frozen = plan.layout.frozen
    shapes = plan.layout.input_shapes
    return {n: shape for n, shape in shapes.items() if frozen.get(n, "stored") == "stored"}


def _read(path: Path) -> tuple[Plan, dict[str, Any], dict[str, Tensor]]:
    found: list[tuple[Plan, dict[str, Any]]] = []

    def check(metadata: Mapping[str, str], tensors: Header) -> None:
        found.append(_plan_of(metadata, path))
        _check_tensors(found[0][0], tensors, path)

    tensors = read_tensors(path, check)
    return *found[0], tensors


def _plan_of(metadata: Mapping[str, str], path: Path) -> tuple[Plan, dict[str, Any]]:
    if _KEY not in metadata:
        raise ValueError(f"{path} must be a superlora adapter: its header does not say so")
    try:
        header: dict[str, Any] = json.loads(metadata[_KEY])
        version = header["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} must have a readable superlora header: {error!r}") from None
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(f"{path} must be of format version {FORMAT_VERSION}: got {version!r}")
    try:
        shapes = {name: tuple(shape) for name, shape in header["weights"]}
        plan = Plan(Spec.from_dict(header["spec"]), shapes)
        if "scale" in header:
            plan.spec.scaled(0.0 + header["scale"])
        for number in header.get("frozen", {}).values():
            if isinstance(number, bool) or not math.isfinite(number):
                raise TypeError(f"fingerprints must be numbers: got {number!r}")
        header.get("maps", {}).items()
        return plan, header
    except _UNREADABLE as error:
        raise ValueError(f"{path} must have a valid superlora header: {error}") from None


def _check_tensors(plan: Plan, header: Header, path: Path) -> None:
    expected = _stored_shapes(plan)
    own = {key: shape for key, (shape, _) in header.items() if not key.startswith(_MODEL)}
    dtypes = {key: dtype for key, (_, dtype) in header.items()}
    problems = [f"missing {key!r}" for key in expected if key not in own]
    problems += [f"extra {key!r}" for key in own if key not in expected]
    problems += [
        f"{key!r} of shape {own[key]} instead of {shape}"
        for key, shape in expected.items()
        if key in own and own[key] != shape
    ]
    problems += unfit_dtypes(header)
    kinds = sorted({dtypes[key] for key in own})
    if len(kinds) > 1:
        problems.append(f"more than one dtype: {', '.join(kinds)}")
    if problems:
        raise ValueError(f"{path} must hold the factors of its spec: {some(problems, 20)}")


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
    modules = dict(model.named_modules(remove_duplicate=False))
    problems = []
    for name, shape in plan.shapes.items():
        if name not in modules:
            problems.append(f"no layer {name!r}")
        elif not is_adaptable(modules[name]):
            problems.append(f"{name!r} is a {type(modules[name]).__name__}")
        elif shape_of(modules[name]) != shape:
            problems.append(f"{name!r} has shape {shape_of(modules[name])} instead of {shape}")
    if problems:
        raise ValueError(f"the model must have the layers of {path}: {some(problems, 20)}")
    chosen = {id(modules[name]) for name in plan.shapes}
    find_targets(model, lambda _, module: id(module) in chosen)  # refuses unfit ones
    found = {name: modules[name] for name in plan.shapes}
    empty = [layer for layer, module in found.items() if parameter_of(module).is_meta]
    if empty:  # giving the model memory later would wipe the factors
        raise AdapterError(
            f"weights must be loaded before an adapter: {len(empty)} lie on the meta device, first "
            f"{empty[0]!r}"
        )
    return found
