"""Safetensors files: read without trust, written whole or not at all."""

from __future__ import annotations

import glob
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from superlora.errors import some
from superlora.torch.files import strict_json

# Of the tensors that are read, by what a file calls them.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# Bytes of a header: a hundred a tensor, of 300,000.
_LONGEST = 32 << 20
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
    path: Path,
    check: Callable[[Mapping[str, str], Header], Checked],
    *,
    owned: bool = True,
    nonfinite: bool = False,
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
    _parsed_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            header = {key: (tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()}
            checked = check(file.metadata() or {}, header)
            found = {key: file.get_tensor(key) for key in header}
            # A sum is finite where all entries are, and seldom else: what is left is looked at.
            wrong = [key for key, value in found.items() if not nonfinite and not _is_finite(value)]
            if wrong:
                raise ValueError(
                    f"{path} must hold finite numbers, or allow_nonfinite=True: got NaN or "
                    f"infinity in {some(map(repr, wrong))}"
                )
            if owned:
                found = {key: value.clone() for key, value in found.items()}
            return checked, found
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file: {short(error)}") from None


def _is_finite(value: Tensor) -> bool:
    if not value.is_floating_point() or not value.numel():
        return True
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())


def short(error: object) -> str:
    """Return an error's words, of which a file may have written most."""
    text = str(error)
    return text if len(text) <= 1000 else f"{text[:900]} … {text[-90:]}"


def read_header(
    path: Path,
) -> tuple[dict[str, str], dict[str, tuple[str, tuple[int, ...], int, int]]]:
    """Return a whole file's metadata, and of each tensor dtype, shape, first byte and end."""
    start, said = _parsed_header(path)
    try:
        with safe_open(path, framework="pt"):  # which checks that tensors fill the file
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file: {short(error)}") from None
    metadata = said.pop("__metadata__", None) or {}
    found = {
        name: (own["dtype"], tuple(own["shape"]), *(start + place for place in own["data_offsets"]))
        for name, own in sorted(said.items(), key=lambda item: item[1]["data_offsets"])
    }
    return metadata, found


def _parsed_header(path: Path) -> tuple[int, Any]:
    """Return where the tensors begin, and the header, unless it is too long or repeats a key."""
    with path.open("rb") as file:
        start = file.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if size > _LONGEST:
            raise ValueError(
                f"{path} must be a whole safetensors file, of a header of at most {_LONGEST:,} "
                f"bytes: got {size:,}"
            )
        text = file.read(size)
    try:
        return 8 + size, strict_json.parse(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be a whole safetensors file: {short(error)}") from None


def read_metadata(path: Path) -> Mapping[str, str]:
    """Return what a safetensors file says of itself."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file: {error}") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    with replacing(path.resolve()) as temporary:
        temporary.write_text(text, encoding="utf-8")


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
    with replacing(path) as temporary:
        save_file(held, temporary, metadata=metadata)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a file to write, which takes the place of another once it is whole and on the disk."""
    if path.exists() and not path.is_file():
        raise ValueError(f"path must be a regular file: got {path}, a device, pipe or socket")
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        writer = re.fullmatch(r"(\d+)-\d+", stale.name[len(path.name) + 2 : -5])
        if writer and not _runs(int(writer[1])):
            stale.unlink(missing_ok=True)
    # Another thread or process may write to the same path.
    writer_id = f"{os.getpid()}-{threading.get_ident()}"
    temporary = path.parent / f".{path.name}.{writer_id}.part"
    temporary.unlink(missing_ok=True)
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = (path if path.exists() else temporary).stat().st_mode
    try:
        try:
            yield temporary
        except SafetensorError as error:  # what its writer says of a full disk
            raise OSError(f"{path} could not be written: {error}") from error
        os.chmod(temporary, mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _runs(process: int) -> bool:
    """Return whether a process may still run."""
    if os.name != "posix":
        return process == os.getpid()  # another's open file cannot be removed there
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
