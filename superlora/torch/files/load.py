"""Read an adapter's file, and attach it to a model that it fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from superlora.design.cost_rule import check_apply
from superlora.errors import some
from superlora.plan import Plan
from superlora.torch.adapter import Adapter
from superlora.torch.attach import check_free, check_model, frozen_of, host_of, placed, register
from superlora.torch.files.safetensors_file import Header, read_tensors
from superlora.torch.files.state import (
    MODEL,
    Description,
    check_biases,
    check_frozen,
    check_maps,
    check_tensors,
    description_of,
    print_of,
    valid_header,
)
from superlora.torch.layers import is_adaptable, parameter_of, refuse_empty, shape_of
from superlora.torch.replaced import refuse_unfit
from superlora.torch.targets import find_targets


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
    read = read_adapter(model, Path(path), name)
    if read.description.supernet is not None:
        raise ValueError(f"{path} must be an adapter's: superlora.search.Supernet.load reads it")
    check_apply(apply, read.plan.layout)
    adapter = Adapter(read.plan, read.blocks, name)
    register(model, adapter, read.modules, read.replaced)
    adapter.scale = read.description.scale
    adapter.applied = apply
    return adapter


@dataclass
class Read:
    """A file's adapter, before it is attached."""

    plan: Plan
    description: Description
    modules: dict[str, nn.Module]
    blocks: dict[str, Tensor]
    replaced: dict[str, Tensor]


def read_adapter(model: nn.Module, path: Path, name: str) -> Read:
    """Read a file, and check that its adapter fits a model; nothing is changed."""
    check_model(model)

    def check(metadata: Mapping[str, str], tensors: Header) -> tuple[Plan, Description]:
        description = description_of(metadata, path)
        with valid_header(path):
            plan = Plan(description.spec, description.layers)
        check_tensors(plan, tensors, path)
        return plan, description

    (plan, description), tensors = read_tensors(path, check)
    factors = {key: value for key, value in tensors.items() if not key.startswith(MODEL)}
    replaced = {
        key.removeprefix(MODEL): value for key, value in tensors.items() if key.startswith(MODEL)
    }
    modules = find_layers(model, plan.layout.layers, path)
    check_biases(plan, modules, description, path)
    check_free(model, host_of(model, modules), name)
    check_maps(plan, description, path)
    refuse_unfit(model, replaced, path)
    # Rounded as they were when they were saved.
    dtype = factors[next(iter(plan.factor_shapes))].dtype
    made = {name: block.to(dtype) for name, block in frozen_of(plan, modules).items()}
    check_frozen({name: print_of(block) for name, block in made.items()}, description, path)
    blocks = placed(plan, modules, factors | made, dtype)
    return Read(plan, description, modules, blocks, replaced)


def find_layers(
    model: nn.Module, layers: Mapping[str, tuple[int, int]], path: Path
) -> dict[str, nn.Module]:
    """Return the layers of a model that a file names, or list those that it has not."""
    modules: dict[str, nn.Module] = {}
    problems = []
    for name, shape in layers.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            problems.append(f"no layer {name!r}")
            continue
        if not is_adaptable(module):
            problems.append(f"{name!r} is a {type(module).__name__}")
        elif shape_of(module) != shape:
            problems.append(f"{name!r} has shape {shape_of(module)} instead of {shape}")
        else:
            modules[name] = module
    if problems:
        raise ValueError(f"the model must have the layers of {path}: {some(problems, 20)}")
    chosen = set(map(id, modules.values()))
    find_targets(model, lambda _, module: id(module) in chosen)  # refuses unfit ones
    # Giving the model memory later would wipe the factors.
    weights = {name: parameter_of(module) for name, module in modules.items()}
    refuse_empty("weights must be loaded before an adapter", weights)
    return modules
