"""Write a checkpoint like another, tensor by tensor: whole or not at all, and resumed by file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from superlora.torch.files import strict_json
from superlora.torch.files.safetensors_file import replacing, write_text
from superlora.torch.on_disk.checkpoint import CONFIG, Checkpoint, Stored

# Bytes that are read and written at a time.
_CHUNK = 1 << 24
_JOURNAL = "journal.json"
# Weights in other formats, which would be the old ones.
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot"),
    *(".safetensors.index.json", ".bin.index.json"),
)

Progress = Callable[[int], None]


class Made(NamedTuple):
    """A tensor that is not copied: its dtype as a file calls it, its shape, what makes its rows."""

    dtype: str
    shape: tuple[int, ...]
    rows: Callable[[], Iterable[Tensor]]
    file: Path | None = None  # that it goes to, where it has no place in one yet

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * (int("".join(filter(str.isdigit, self.dtype))) // 8)


Layout = dict[str, Stored | Made]
Part = TypeVar("Part")


def planned(source: Checkpoint, made: Mapping[str, Made]) -> dict[Path, Layout]:
    """Return what every file is to hold, in order: tensors of the source, or made instead."""
    found: dict[Path, Layout] = {file: {} for file in source.files}
    for name, own in source.tensors.items():
        found[own.file][name] = made.get(name, own)
    for name, new in made.items():
        if name not in source.tensors:
            assert new.file is not None
            found[new.file][name] = new
    return found


def size_of(layout: Layout) -> int:
    """Return the bytes of a file's tensors."""
    return sum(own.nbytes for own in layout.values())


def check_output(output: Path, inputs: Iterable[Path], force: bool) -> None:
    """Refuse an output that is there already, or is one of the inputs, around them or in them."""
    for own in inputs:
        one, two = output.resolve(), own.resolve()
        if one == two or one in two.parents or two in one.parents:
            raise ValueError(f"output must not be an input, nor around or inside one: got {output}")
    if (output.exists() or output.is_symlink()) and not force:
        raise ValueError(f"output must not exist already: got {output}; --force replaces it")
    if output.exists() and not (output.is_file() or output.is_dir()):
        raise ValueError(f"output must be a file or a folder: got {output}, a device or a pipe")
    if output.is_dir() and any(output.iterdir()) and not any(output.glob("*.safetensors")):
        raise ValueError(
            "output must be a folder with safetensors files, or empty, to be replaced: got "
            f"{output}"
        )
    if not output.parent.is_dir():
        raise FileNotFoundError(f"output must lie in an existing folder: got {output}")


def check_space(folder: Path, needed: int) -> None:
    """Refuse to begin where the disk is too small."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{folder} must have {needed:,} bytes free: it has {free:,}")


def write_checkpoint(
    source: Checkpoint,
    output: Path,
    made: Mapping[str, Made],
    request: Mapping[str, Any],
    *,
    config: Mapping[str, Any] | None = None,
    advance: Progress = lambda count: None,
) -> None:
    """Write a checkpoint with some tensors made, and all else as it is."""
    # Files of an interrupted run are taken over if `request`, what is asked for, is the same;
    # `config` takes the place of fields of config.json.
    files = planned(source, made)
    if not source.is_folder:
        ((file, layout),) = files.items()
        check_space(output.resolve().parent, size_of(layout))
        _write_file(output.resolve(), source.files[file], layout, advance)
        return
    with _unfinished(output, fingerprint(source, request)) as (folder, journal):
        done = journal["files"]
        for name, size in list(done.items()):
            part = folder / name
            if not part.is_file() or part.stat().st_size != size:
                del done[name]
        rest = {file: layout for file, layout in files.items() if file.name not in done}
        check_space(folder, sum(map(size_of, rest.values())))
        for file, layout in files.items():
            if file not in rest:
                advance(size_of(layout))
                continue
            _write_file(folder / file.name, source.files[file], layout, advance)
            done[file.name] = (folder / file.name).stat().st_size
            write_text(folder / _JOURNAL, json.dumps(journal))
        _copy_others(source.path, folder)
        if source.index is not None:
            write_text(folder / source.index["name"], _index(source.index, files))
        if config and source.config:
            said = source.config | {key: own for key, own in config.items() if key in source.config}
            write_text(folder / CONFIG, json.dumps(said, indent=2) + "\n")
        (folder / _JOURNAL).unlink()
        _take_place(folder, output)


def _write_file(path: Path, metadata: dict[str, str], layout: Layout, advance: Progress) -> None:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, own in layout.items():
        begin, end = end, end + own.nbytes
        said = {"dtype": own.dtype, "shape": list(own.shape), "data_offsets": [begin, end]}
        header[name] = said
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, temporary.open("rb+", buffering=0) as target:
        _write_all(target, struct.pack("<Q", len(text)) + text)
        for name, part in _ahead(_parts_of(layout)):
            try:
                if isinstance(part, Stored):
                    _copy(part, target, advance)
                else:
                    _write_all(target, part)
                    advance(len(part))
            except OSError as error:
                raise OSError(f"{path} could not be written at {name!r}: {error}") from error
        if target.tell() != 8 + len(text) + end:
            raise ValueError(f"{path} must have {end:,} bytes of tensors: others were made")


def _parts_of(layout: Layout) -> Iterator[tuple[str, Stored | memoryview]]:
    """Yield what is to be copied, as much as lies together, and the bytes of what is made."""
    run: Stored | None = None
    for name, own in layout.items():
        if isinstance(own, Stored):
            if run is not None and (run.file, run.stop) == (own.file, own.start):
                run = run._replace(stop=own.stop)
                continue
            if run is not None:
                yield name, run
            run = own
            continue
        if run is not None:
            yield name, run
        run = None
        for part in own.rows():
            flat = part.detach().contiguous().reshape(-1).view(torch.uint8)
            yield name, flat.numpy().data
    if run is not None:
        yield name, run


def _ahead(parts: Iterator[Part]) -> Iterator[Part]:
    """Yield what an iterator does, the next made by another thread meanwhile."""
    with ThreadPoolExecutor(1) as worker:
        ahead = worker.submit(next, parts, None)
        while (part := ahead.result()) is not None:
            ahead = worker.submit(next, parts, None)
            yield part


def _copy(own: Stored, target: Any, advance: Progress) -> None:
    """Copy bytes from one file to the end of another, in the kernel where it can."""
    place, buffer = own.start, memoryview(b"")
    with own.file.open("rb", buffering=0) as source:
        while place < own.stop:
            count = min(_CHUNK, own.stop - place)
            if not buffer:
                try:
                    done = os.sendfile(target.fileno(), source.fileno(), place, count)
                except (AttributeError, OSError):  # not to files, on some systems
                    buffer = memoryview(bytearray(_CHUNK))
                    continue
            else:
                source.seek(place)
                done = source.readinto(buffer[:count])
                _write_all(target, buffer[:done])
            if not done:
                raise ValueError(f"{own.file} must be a whole safetensors file: it became shorter")
            place += done
            advance(done)


def _write_all(target: Any, data: bytes | memoryview) -> None:
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[target.write(rest) :]


def _index(index: Mapping[str, Any], files: Mapping[Path, Layout]) -> str:
    """Return an index with the tensors that there are now, and their size."""
    said = {key: own for key, own in index.items() if key != "name"}
    places = {name: file.name for file, layout in files.items() for name in layout}
    order = [*said["weight_map"], *(name for name in places if name not in said["weight_map"])]
    said["weight_map"] = {name: places[name] for name in order}
    if isinstance(said.get("metadata"), dict) and "total_size" in said["metadata"]:
        total = sum(map(size_of, files.values()))
        said["metadata"] = said["metadata"] | {"total_size": total}
    return json.dumps(said, indent=2) + "\n"


def _copy_others(source: Path, folder: Path) -> None:
    """Copy what is beside the weights: configuration, tokenizer; nothing hidden."""
    for path in sorted(source.rglob("*")):
        place = path.relative_to(source)
        hidden = any(part.startswith(".") for part in place.parts)
        if path.is_file() and not hidden and not path.name.endswith(_WEIGHTS):
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / place)


def fingerprint(source: Checkpoint, request: Mapping[str, Any]) -> str:
    """Return a digest of what is asked for, and of the files it is asked of."""
    found = hashlib.sha256(json.dumps(request, sort_keys=True).encode())
    for file in source.files:
        state = file.stat()
        with file.open("rb") as opened:
            size = struct.unpack("<Q", opened.read(8))[0]
            found.update(opened.read(size))
        found.update(f"{file.name} {state.st_size} {state.st_mtime_ns}".encode())
    return found.hexdigest()


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _unfinished(output: Path, request: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the folder of an unfinished output, and which of its files are whole."""
    folder = output.resolve().parent / f".{output.name}.unfinished"
    folder.mkdir(exist_ok=True)
    with _locked(folder):
        journal: dict[str, Any] = {"request": request, "files": {}}
        try:
            held = strict_json.parse((folder / _JOURNAL).read_text(encoding="utf-8"))
            if held["request"] == request:
                journal["files"] = {str(name): int(size) for name, size in held["files"].items()}
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            pass  # nothing of use
        if not journal["files"]:
            for left in folder.iterdir():
                if left.name != ".lock":
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
        write_text(folder / _JOURNAL, json.dumps(journal))
        yield folder, journal


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time write a folder."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"output must be written once at a time: {folder} is in use") from None
        yield


def _take_place(folder: Path, output: Path) -> None:
    """Put a finished folder in the place of another."""
    (folder / ".lock").unlink(missing_ok=True)
    before = folder.with_suffix(".before")
    if output.is_dir() and not output.is_symlink():
        shutil.rmtree(before, ignore_errors=True)  # of a run that was killed while it did so
        os.replace(output, before)
    elif output.exists():
        output.unlink()
    os.replace(folder, output)
    shutil.rmtree(before, ignore_errors=True)
