"""Safetensors files: read without trust, written whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

# Of the tensors that are read, by what a file calls them.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# What a file's header says of its tensors: shape and dtype by name.
Header = dict[str, tuple[tuple[int, ...], str]]
Checked = TypeVar("Checked")


def unfit_dtypes(header: Header) -> list[str]:
    """Return what to say of tensors that are not of a floating-point type."""
    return [f"{key!r} of dtype {kind}" for key, (_, kind) in header.items() if kind not in DTYPES]


def other_shapes(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    words: tuple[str, str, str] = ("missing", "extra", "of"),
) -> list[str]:
    """Return what is missing, extra or of another shape, in such words."""
    missing, extra, of = words
    problems = [f"{missing} {name!r}" for name in expected if name not in found]
    problems += [f"{extra} {name!r}" for name in found if name not in expected]
    problems += [
        f"{name!r} {of} shape {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    return problems


def read_tensors(
    path: Path, check: Callable[[Mapping[str, str], Header], Checked], *, owned: bool = True
) -> tuple[Checked, dict[str, Tensor]]:
    """Read the tensors of a safetensors file, after its header was found good."""
    if path.suffix in _PICKLES:
        raise ValueError(
            f"{path} must be a safetensors file: a {path.suffix} file may run any code when it is "
            "read; where you trust it, convert it with safetensors.torch.save_file(torch.load("
            f"{path.name!r}, weights_only=True), {path.with_suffix('.safetensors').name!r})"
        )
    if not path.is_file():
        hint = "; it is a folder, which superlora.torch.from_peft reads" if path.is_dir() else ""
        raise FileNotFoundError(f"no adapter file at {path}{hint}")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            header = {key: (tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()}
            checked = check(file.metadata() or {}, header)
            found = {key: file.get_tensor(key) for key in header}
            if owned:
                found = {key: value.clone() for key, value in found.items()}
            return checked, found
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file: {error}") from None


def read_metadata(path: Path) -> Mapping[str, str]:
    """Return what a safetensors file says of itself."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file: {error}") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, atomically."""
    path = path.resolve()  # a link stays a link
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path must lie in an existing folder: got {path}")
    if path.is_dir():
        raise IsADirectoryError(f"path must be a file, not a directory: got {path}")
    if path.suffix in _PICKLES:
        raise ValueError(f"path must not end like a pickle's, which loading refuses: got {path}")
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    temporary = path.parent / f".{uuid.uuid4().hex}.part"
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = (path if path.exists() else temporary).stat().st_mode
    try:
        save_file(held, temporary, metadata=metadata)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
