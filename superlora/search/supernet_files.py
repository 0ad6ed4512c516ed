"""One supernet, one safetensors file: every tensor once, and the space that it is of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from superlora.errors import some
from superlora.random import check_seed
from superlora.search.space import Space
from superlora.search.supernet_storage import LEFT, stored_shapes
from superlora.torch.attach import check_model
from superlora.torch.files.safetensors_file import Header, read_tensors, unfit_dtypes, write_tensors
from superlora.torch.files.state import find_layers, valid_header
from superlora.torch.layers import bias_of
from superlora.torch.targets import find_targets

if TYPE_CHECKING:
    from superlora.search.supernet import Supernet

FORMAT_VERSION = 1
# One metadata key: safetensors writes several in no fixed order.
KEY = "superlora_supernet"


def save_supernet(supernet: Supernet, path: Path) -> None:
    """Write a supernet's tensors and space to `path`, atomically."""
    header = {
        "format_version": FORMAT_VERSION,
        "seed": supernet.seed,
        "space": supernet.space.to_dict(),
    }
    metadata = {KEY: json.dumps(header, separators=(",", ":"))}
    write_tensors(path, _tensors(supernet), metadata)


def load_supernet(model: nn.Module, path: Path, name: str) -> Supernet:
    """Put a saved supernet on a model."""
    from superlora.search.supernet import Supernet

    check_model(model)
    space, seed, tensors = _read(path)
    shapes = dict(space.layers)
    modules = find_layers(model, shapes, path)
    found = [name for name, module in modules.items() if bias_of(module) is None]
    if found != list(space.without_bias):
        both = (space.without_bias, found)
        expected, got = (some(map(repr, names)) or "none" for names in both)
        raise ValueError(
            f"the model must have the biases of {path}: expected layers without one "
            f"{expected}, got {got}"
        )
    chosen = set(map(id, modules.values()))
    ordered = list(find_targets(model, lambda _, module: id(module) in chosen))
    if ordered != list(shapes):
        raise ValueError(
            f"the model must have the layers of {path} in their order: expected "
            f"{some(map(repr, shapes))}, got {some(map(repr, ordered))}"
        )
    supernet = Supernet(
        model,
        lambda layer, _: layer in shapes,
        space.ranks,
        operations=dict(space.operations),
        name=name,
        seed=seed,
        dtype=next(iter(tensors.values())).dtype,
    )
    with torch.no_grad():
        for key, own in _tensors(supernet).items():
            own.copy_(tensors[key])
    return supernet


def _tensors(supernet: Supernet) -> dict[str, Tensor]:
    found = {}
    for layer, operation, side in stored_shapes(supernet.space):
        left, right = supernet.stored(layer)[operation]
        tensor = left if side == LEFT else right
        assert tensor is not None
        found[_key(layer, operation, side)] = tensor
    return found


def _key(layer: str, operation: str, side: str) -> str:
    return f"{layer}.{operation}.{side}"


def _read(path: Path) -> tuple[Space, int, dict[str, Tensor]]:
    def check(metadata: Mapping[str, str], tensors: Header) -> tuple[Space, int]:
        header = _header_of(metadata, path)
        with valid_header(path):
            space, seed = Space.from_dict(header["space"]), check_seed(header["seed"])
        _check_tensors(space, tensors, path)
        return space, seed

    (space, seed), tensors = read_tensors(path, check)
    return space, seed, tensors


def _header_of(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    if KEY not in metadata:
        raise ValueError(f"{path} must be a superlora supernet: its header does not say so")
    with valid_header(path):
        header: dict[str, Any] = json.loads(metadata[KEY])
        version = header["format_version"]
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(f"{path} must be of format version {FORMAT_VERSION}: got {version!r}")
    return header


def _check_tensors(space: Space, header: Header, path: Path) -> None:
    expected = {_key(*name): shape for name, shape in stored_shapes(space).items()}
    problems = [f"missing {key!r}" for key in expected if key not in header]
    problems += [f"extra {key!r}" for key in header if key not in expected]
    problems += [
        f"{key!r} of shape {header[key][0]} instead of {shape}"
        for key, shape in expected.items()
        if key in header and header[key][0] != shape
    ]
    problems += unfit_dtypes(header)
    kinds = sorted({dtype for _, dtype in header.values()})
    if len(kinds) > 1:
        problems.append(f"more than one dtype: {', '.join(kinds)}")
    if problems:
        raise ValueError(f"{path} must hold the tensors of its space: {some(problems, 20)}")
