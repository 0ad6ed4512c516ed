"""`Checkpoint`: the tensors of a safetensors file, or of a folder of shards, one at a time."""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from superlora.errors import some
from superlora.torch.files import strict_json
from superlora.torch.files.safetensors_file import DTYPES, other_shapes, read_header, short
from superlora.torch.interop.to_peft import CONFIG as PEFT_CONFIG

INDEX = ".safetensors.index.json"
CONFIG = "config.json"
# Layers of transformers' Conv1D, whose weights are (input, output), by the models that have them.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "decision_transformer", "imagegpt", "clvp")
_CONV1D_LAYERS = ("c_attn", "q_attn", "c_proj", "c_fc")
_QUANTISED = (
    *(".absmax", ".quant_map", ".SCB", ".weight_format", ".qweight", ".qzeros", ".g_idx"),
    *(".weight_scale", ".weight_scale_inv", ".weight_packed", "_blocks", "_scales"),
)


class Stored(NamedTuple):
    """Where a tensor lies: its dtype as the file calls it, its shape, its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.stop - self.start


class Checkpoint:
    """A safetensors file, or a folder of one or of shards with their index.

    Parameters
    ----------
    path : str or pathlib.Path
        The file or the folder.

    Attributes
    ----------
    path : pathlib.Path
        As given.
    files : dict of pathlib.Path to dict
        The safetensors files and their metadata, in the order of the index.
    tensors : dict of str to Stored
        All tensors, file by file in the order of their bytes.
    index : dict or None
        What the index of a sharded folder says.
    config : dict
        What ``config.json`` says, empty where there is none.

    Raises
    ------
    FileNotFoundError
        If there is nothing, or a shard is missing.
    ValueError
        If a file is truncated, or the index contradicts it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.index: dict[str, Any] | None = None
        self.config: dict[str, Any] = {}
        self.files: dict[Path, dict[str, str]] = {}
        self.tensors: dict[str, Stored] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        for file in self._find_files():
            self._read(file)
        self._check_index()

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder."""
        return self.path.is_dir()

    def _find_files(self) -> list[Path]:
        path = self.path
        if not path.exists():
            raise FileNotFoundError(f"no checkpoint at {path}: a safetensors file, or a folder")
        if not path.is_dir():
            return [path]
        if (path / PEFT_CONFIG).is_file() and not (path / CONFIG).is_file():
            raise ValueError(f"{path} must be a checkpoint: it is an adapter of PEFT")
        if (path / CONFIG).is_file():
            self.config = _parsed(path / CONFIG)
        if (path / "model.safetensors").is_file():
            return [path / "model.safetensors"]
        named = path / f"model{INDEX}"
        indices = [named] if named.is_file() else sorted(path.glob(f"*{INDEX}"))
        if len(indices) == 1:
            self.index = _parsed(indices[0]) | {"name": indices[0].name}
            places = self.index.get("weight_map")
            if not isinstance(places, dict) or not all(
                isinstance(own, str) and Path(own).name == own for own in places.values()
            ):
                raise ValueError(f"{indices[0]} must have a weight_map of names to file names")
            return [path / name for name in dict.fromkeys(places.values())]
        alone = sorted(path.glob("*.safetensors"))
        if len(indices) > 1 or len(alone) != 1:
            found = some(own.name for own in (*indices, *alone)) or "none"
            raise FileNotFoundError(
                f"{path} must have model.safetensors, one *{INDEX}, or one safetensors file: got "
                f"{found}"
            )
        return alone

    def _read(self, file: Path) -> None:
        if not file.is_file():
            raise FileNotFoundError(f"no file {file}, which is a part of {self.path}")
        self.files[file], found = read_header(file)
        for name, (dtype, shape, start, stop) in found.items():
            if name in self.tensors:
                raise ValueError(f"{name!r} must be in one file: {self.tensors[name].file}, {file}")
            self.tensors[name] = Stored(dtype, shape, file, start, stop)

    def _check_index(self) -> None:
        if self.index is None:
            return
        places = self.index["weight_map"]
        found = {name: own.file.name for name, own in self.tensors.items()}
        wrong = [name for name in {**places, **found} if places.get(name) != found.get(name)]
        if wrong:
            raise ValueError(
                f"{self.path / self.index['name']} must say which file has each tensor: it "
                f"contradicts the files for {some(map(repr, wrong))}"
            )

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of a floating-point type, in the file's own memory: never written to."""
        own = self.tensors[name]
        if own.dtype not in DTYPES:
            raise ValueError(
                f"{name!r} of {self.path} must be of a floating-point type: {own.dtype}"
            )
        return self._array(own, DTYPES[own.dtype]).reshape(own.shape)

    def data(self, name: str) -> Tensor:
        """Return a tensor's bytes, in the file's own memory."""
        return self._array(self.tensors[name], torch.uint8)

    def _array(self, own: Stored, dtype: torch.dtype) -> Tensor:
        if own.start == own.stop:
            return torch.empty(0, dtype=dtype)
        if own.file not in self._maps:
            with own.file.open("rb") as file:
                self._maps[own.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        held, count = self._maps[own.file], own.nbytes // dtype.itemsize
        if own.start % dtype.itemsize:  # no file of the library itself
            return torch.frombuffer(bytearray(held[own.start : own.stop]), dtype=dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            return torch.frombuffer(held, dtype=dtype, count=count, offset=own.start)

    def transposed(self, layer: str) -> bool | None:
        """Return whether a layer's weight is stored (input, output); None if no config says it."""
        if not self.config:
            return None
        conv1d = self.config.get("model_type") in _CONV1D_MODELS
        return conv1d and layer.rpartition(".")[2] in _CONV1D_LAYERS

    def turned(self, layers: Iterable[str] | None = None) -> list[str]:
        """Return layers whose weights are stored (input, output), of some or of all."""
        ends = (name.removesuffix(".weight") for name in self.tensors if name.endswith(".weight"))
        names = list(ends if layers is None else layers)
        unknown = [n for n in names if not self.config and n.rpartition(".")[2] in _CONV1D_LAYERS]
        if unknown:
            raise ValueError(
                f"{self.path} must have a {CONFIG} beside it, which says of {some(unknown)} "
                "whether weights are stored (output, input) or, as GPT-2's, (input, output)"
            )
        return [name for name in names if self.transposed(name)]

    def refuse_quantised(self) -> None:
        """Raise where weights are codes, of which no update is a sum."""
        codes = [
            name
            for name, own in self.tensors.items()
            if name.endswith(_QUANTISED)
            or ".quant_state." in name
            or (own.dtype.startswith(("I8", "U8", "F8", "F4")) and len(own.shape) == 2)
        ]
        said = self.config.get("quantization_config")
        if codes or said:
            kind = said.get("quant_method") if isinstance(said, dict) else None
            raise ValueError(
                f"{self.path} must hold weights of a floating-point type: it is quantised"
                f"{f' by {kind}' if kind else ''}{', ' * bool(codes)}{some(map(repr, codes))}; "
                "save it dequantised first, as by model.dequantize() of transformers"
            )


def _parsed(path: Path) -> dict[str, Any]:
    try:
        found = strict_json.parse(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON: {short(error)}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must be a JSON object: got {type(found).__name__}")
    return found


def check_alike(first: Checkpoint, others: Iterable[Checkpoint]) -> None:
    """Raise where checkpoints have other tensors, or of other shapes."""
    for other in others:
        # Buffers of integers, such as position_ids, are saved by some releases of a library alone.
        expected, found = (
            {
                name: own.shape
                for name, own in one.tensors.items()
                if own.dtype in DTYPES or name in two.tensors
            }
            for one, two in ((first, other), (other, first))
        )
        problems = other_shapes(expected, found)
        if problems:
            raise ValueError(
                f"{other.path} must have the tensors of {first.path}: {some(problems, 20)}"
            )
