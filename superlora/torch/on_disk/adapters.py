"""Adapters of files without a model: on modules of the shapes that the files say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from superlora.design.spec import Spec
from superlora.design.supports import OF_BIAS
from superlora.plan import Plan
from superlora.torch.adapter import Adapter
from superlora.torch.files.folder import TENSORS, file_of
from superlora.torch.files.load import load
from superlora.torch.files.safetensors_file import DTYPES, Header, read_header
from superlora.torch.files.state import KEY, MODEL, description_of
from superlora.torch.interop import from_lycoris as lycoris
from superlora.torch.interop import from_peft as peft
from superlora.torch.interop.formats import LYCORIS_FORMS, PEFT_FORMS, Forms, Layer, parts_of
from superlora.torch.interop.keys import OTHER_NAMES, places, split_key
from superlora.torch.interop.to_lycoris import ALPHA
from superlora.torch.interop.to_peft import CONFIG, WEIGHTS
from superlora.torch.norms import Norms
from superlora.torch.on_disk.checkpoint import Checkpoint
from superlora.torch.on_disk.merge import attach_to
from superlora.torch.on_disk.skeleton import skeleton

# Weights that a file may have layers of, which bounds what its header may cost.
_MOST = 1 << 16


def is_adapter(path: Path) -> bool:
    """Return whether a file or folder is an adapter, of this library or another."""
    if path.is_dir():
        return (path / CONFIG).is_file() or (path / TENSORS).is_file()
    if not path.is_file():
        raise FileNotFoundError(f"no file or folder at {path}")
    metadata, header = read_header(path)
    ends = tuple(f".{leaf}" for leaf in (*lycoris._LEAVES, *OTHER_NAMES))
    return KEY in metadata or (bool(header) and all(key.endswith(ends) for key in header))


def read_adapter(path: str | Path, base: str | Path | None = None) -> tuple[str, Adapter]:
    """Return the format of an adapter's files, and the adapter, on its base or on its shapes."""
    path = Path(path)
    kind = _kind(path)
    if base is not None:
        return kind, attach_to(Checkpoint(base), path).adapter
    return kind, {"superlora": _own, "PEFT": _of_peft, "LyCORIS": _of_lycoris}[kind](path)


def _kind(path: Path) -> str:
    if (path / CONFIG).is_file():
        return "PEFT"
    if path.is_dir() and not (path / TENSORS).is_file():
        raise FileNotFoundError(f"no adapter in {path}: neither {TENSORS} nor {CONFIG}")
    if not file_of(path).is_file():
        raise FileNotFoundError(f"no adapter at {path}")
    return "superlora" if KEY in read_header(file_of(path))[0] else "LyCORIS"


def _own(path: Path) -> Adapter:
    file = file_of(path)
    metadata, header = read_header(file)
    description = description_of(metadata, file, _MOST)
    design, rows = description.spec, description.rows
    of_bias = not isinstance(design, Spec) and not OF_BIAS.isdisjoint(design.operations)
    if any(own == "singular" or own.startswith("singular") for own in _frozen(path)):
        raise ValueError(
            f"{path} must be read with its base, of whose weights it takes singular vectors: give "
            "--base"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    turned = []
    for name, axes in description.layers.items():
        layer = name.rpartition(".")[0] if name in rows else name
        height = max(
            [own[1] for n, own in rows.items() if n.rpartition(".")[0] == layer], default=0
        )
        out, in_ = height or axes.out, axes.in_
        if name in (description.transposed or ()):
            turned.append(layer)
            out, in_ = in_, out
        weight = layer if axes.stack else f"{layer}.weight".lstrip(".")
        shapes[weight] = (*axes.stack, out, in_, *axes.window)
        if of_bias and not axes.stack and name not in description.without_bias:
            shapes[f"{layer}.bias".lstrip(".")] = (axes.out,)
    tensors = _zeros(shapes)
    for name, (dtype, shape, *_) in header.items():
        if name.startswith(MODEL):
            kind = DTYPES.get(dtype, torch.int64)
            tensors |= _zeros({name.removeprefix(MODEL): shape}, kind)
    return load(skeleton(tensors, turned, description.shared), file)


def _frozen(path: Path) -> Iterable[str]:
    """Return how frozen blocks of a file are made."""
    file = file_of(path)
    description = description_of(read_header(file)[0], file, _MOST)
    return Plan(description.spec, description.layers).layout.frozen.values()


def _of_peft(folder: Path) -> Adapter:
    config = peft._read_config(folder, _MOST)
    header = _header(folder / WEIGHTS)
    keys = peft._sort_keys(config, header)
    method = config["peft_type"].lower()
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, leaves in keys.layers.items():
        found = {leaf: header[key][0] for leaf, key in leaves.items()}
        if method == "vera":
            size = (found["vera_lambda_b"][0], header["base_model.vera_A"][0][1])
        else:
            size = _shape(method, found, PEFT_FORMS, layer)
        shapes[f"{layer}.weight"] = size[::-1] if config.get("fan_in_fan_out") else size
    shapes |= {name: header[key][0] for name, key in {**keys.replaced, **keys.base}.items()}
    turned = list(keys.layers) if config.get("fan_in_fan_out") else []
    return peft.from_peft(skeleton(_zeros(shapes), turned), folder)


def _of_lycoris(file: Path) -> Adapter:
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, (shape, _) in _header(file).items():
        stem, leaf = split_key(key, lycoris._LEAVES)
        layers.setdefault(stem, {})[leaf] = shape
    shapes = {}
    for stem, found in layers.items():
        method = lycoris._method(found)
        if method is None:
            raise ValueError(f"{file} must be an adapter: {stem!r} has {sorted(found)}")
        if lycoris._BIAS in found:
            raise ValueError(f"{file} changes biases, which are known with a base: give --base")
        found.pop(ALPHA, None)
        begins = [f"{prefix}{joint}" for prefix, joint in places(None)]
        begin = max((own for own in begins if stem.startswith(own)), key=len, default="")
        shape = _shape(method, found, LYCORIS_FORMS, stem)
        shapes[f"{stem.removeprefix(begin)}.weight"] = shape
    prefix = "" if not begin else None
    return lycoris.from_lycoris(skeleton(_zeros(shapes)), file, prefix=prefix)


def _header(file: Path) -> Header:
    return {name: (shape, dtype) for name, (dtype, shape, *_) in read_header(file)[1].items()}


def _shape(
    method: str, found: Mapping[str, tuple[int, ...]], forms: Forms, layer: str
) -> tuple[int, int]:
    """Return the shape of a layer's weight, of those of its factors."""
    try:
        return Layer(method, parts_of(_zeros(found), forms[method]), 1.0).shape
    except ValueError as error:
        raise ValueError(f"{layer!r}: {error}") from None


def _zeros(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Return tensors of zeros that take the memory of one entry each."""
    return {name: torch.zeros((), dtype=dtype).expand(shape) for name, shape in shapes.items()}


@dataclass(frozen=True)
class Inspection:
    """What an adapter's files hold.

    Attributes
    ----------
    kind : str
        ``"superlora"``, ``"PEFT"`` or ``"LyCORIS"``.
    adapter : Adapter
        The adapter, on modules of its layers' shapes.
    norms : dict of str to Norms
        Of every update, scale included.
    replaced : dict of str to tuple of int
        Shapes of parameters of the model that it brings.
    """

    kind: str
    adapter: Adapter
    norms: dict[str, Norms]
    replaced: dict[str, tuple[int, ...]]


def inspect_adapter(path: str | Path, base: str | Path | None = None) -> Inspection:
    """Read an adapter's files, check them, and measure its updates.

    Parameters
    ----------
    path : str or pathlib.Path
        A file or folder of this library, a folder of PEFT's, or a file of LyCORIS's.
    base : str or pathlib.Path, optional
        Its base, where blocks are made from the weights or the names are the base's.

    Returns
    -------
    Inspection
        What was found.

    Raises
    ------
    FileNotFoundError
        If there is no adapter.
    ValueError
        If a file is truncated, contradicts itself, holds NaN or infinity, or needs its base.
    """
    kind, adapter = read_adapter(path, base)
    replaced = {} if adapter.replaced is None else adapter.replaced.tensors()
    shapes = {name: tuple(own.shape) for name, own in replaced.items()}
    return Inspection(kind, adapter, adapter.norms(), shapes)
