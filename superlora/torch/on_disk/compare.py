"""Differences and means of checkpoints, a tensor at a time, and of adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from superlora.design.spec import Spec
from superlora.errors import some
from superlora.torch.adapter import Adapter
from superlora.torch.combine import combine
from superlora.torch.files.folder import file_of
from superlora.torch.files.load import load
from superlora.torch.files.safetensors_file import DTYPES, other_shapes
from superlora.torch.on_disk.adapters import is_adapter, read_adapter
from superlora.torch.on_disk.checkpoint import Checkpoint, check_alike
from superlora.torch.on_disk.writing import (
    Made,
    Progress,
    check_output,
    fingerprint,
    write_checkpoint,
)
from superlora.torch.rounding import is_finite

_CHUNK = 1 << 20  # entries


class Difference(NamedTuple):
    """How a tensor or an update of one file differs from that of another.

    Attributes
    ----------
    name : str
        The tensor, or the weight whose update it is.
    why : str
        ``"values"``, or what keeps them from being compared.
    norm : float
        The Frobenius norm of the second less the first over that of the first; NaN without one.
    largest : float
        The largest absolute value of the second less the first.
    """

    name: str
    why: str
    norm: float = math.nan
    largest: float = math.nan


def diff_files(
    first: str | Path, second: str | Path, base: str | Path | None = None
) -> list[Difference]:
    """Compare two checkpoints by their tensors, or two adapters by their updates.

    Parameters
    ----------
    first, second : str or pathlib.Path
        Two checkpoints, files or folders, or two adapters of any format.
    base : str or pathlib.Path, optional
        The adapters' base, where their files alone say too little.

    Returns
    -------
    list of Difference
        What differs, the largest norm first; empty where all is the same.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If a file is truncated, or one is an adapter and the other is none.
    """
    paths = [Path(first), Path(second)]
    kinds = [is_adapter(path) for path in paths]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"both must be adapters, or both checkpoints: {paths[kinds.index(True)]} alone is an "
            "adapter"
        )
    found = list(_of_adapters(*paths, base=base) if kinds[0] else _of_checkpoints(*paths))
    return sorted(found, key=lambda own: (not math.isnan(own.norm), -own.norm))


def _of_checkpoints(*paths: Path) -> Iterator[Difference]:
    one, two = map(Checkpoint, paths)
    for name in {**one.tensors, **two.tensors}:
        own, other = one.tensors.get(name), two.tensors.get(name)
        if own is None or other is None:
            yield Difference(name, f"only in {paths[other is not None]}")
        elif own.shape != other.shape:
            yield Difference(name, f"shape {list(own.shape)} and {list(other.shape)}")
        elif own.dtype not in DTYPES or other.dtype not in DTYPES:
            if own.dtype != other.dtype or not torch.equal(one.data(name), two.data(name)):
                yield Difference(name, f"values of {own.dtype} and {other.dtype}")
        elif own.dtype != other.dtype or not torch.equal(one.data(name), two.data(name)):
            found = _difference(name, one.tensor(name), two.tensor(name))
            if own.dtype != other.dtype:
                found = found._replace(why=f"dtype {own.dtype} and {other.dtype}")
            yield found


def _difference(name: str, one: Tensor, two: Tensor) -> Difference:
    """Return how tensors differ, in double precision and in parts."""
    squares, of_first, largest = 0.0, 0.0, torch.zeros((), dtype=torch.float64)
    flat, other = one.reshape(-1), two.reshape(-1)
    for start in range(0, len(flat), _CHUNK):
        own = flat[start : start + _CHUNK].double()
        change = other[start : start + _CHUNK].double() - own
        squares += float(change.square().sum())
        of_first += float(own.square().sum())
        largest = torch.maximum(largest, change.abs().max())  # which hands NaN on
    norm = math.sqrt(squares / of_first) if of_first else math.inf if squares else 0.0
    return Difference(name, "values", norm, float(largest))


@torch.no_grad()
def _of_adapters(*paths: Path, base: str | Path | None) -> Iterator[Difference]:
    adapters = [read_adapter(path, base)[1] for path in paths]
    shapes = [own.plan.shapes for own in adapters]
    held = [dict(own.replaced.tensors()) if own.replaced else {} for own in adapters]
    shapes = [
        own | {name: tuple(value.shape) for name, value in more.items()}
        for own, more in zip(shapes, held, strict=True)
    ]
    for problem in other_shapes(
        shapes[0], shapes[1], (f"only in {paths[0]}:", f"only in {paths[1]}:", "of")
    ):
        yield Difference(problem, "layers")
    for name in [name for name, shape in shapes[0].items() if shapes[1].get(name) == shape]:
        one, two = (
            more[name] if name in more else own.delta(name)
            for own, more in zip(adapters, held, strict=True)
        )
        if not torch.equal(one, two.to(one.dtype)):
            yield _difference(name, one, two)


def average_files(
    paths: Sequence[str | Path],
    output: str | Path,
    weights: Sequence[float] | None = None,
    *,
    force: bool = False,
    advance: Progress = lambda count: None,
) -> None:
    """Write the weighted mean of checkpoints, or of adapters.

    Parameters
    ----------
    paths : sequence of (str or pathlib.Path)
        Two or more checkpoints of the same tensors, or adapters of the same layers.
    output : str or pathlib.Path
        As the first of `paths`: a folder, or a file. Of adapters a file.
    weights : sequence of float, optional
        One for each, which are divided by their sum; by default equal ones.
    force : bool
        Replace an output that exists.
    advance : callable, optional
        Called with numbers of bytes that were written.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    OSError
        If the disk is too small.
    ValueError
        If tensors, layers or shapes differ, a mean is not finite, adapters have no exact mean, or
        the weights do not fit.

    Notes
    -----
    Of checkpoints means are taken in double precision and rounded once, to the dtype of the first;
    tensors of other types must be the same. Of adapters `superlora.torch.combine` makes the sum.
    """
    own, output = list(map(Path, paths)), Path(output)
    if len(own) < 2:
        raise ValueError(f"paths must be two at least: got {len(own)}")
    numbers = [1.0] * len(own) if weights is None else list(weights)
    if len(numbers) != len(own):
        raise ValueError(f"weights must be as many as files, {len(own)}: got {len(numbers)}")
    total = sum(numbers)
    if not math.isfinite(total) or not total:
        raise ValueError(f"weights must have a sum to divide by: got {numbers}")
    numbers = [number / total for number in numbers]
    check_output(output, own, force)
    kinds = [is_adapter(path) for path in own]
    if all(kinds):
        _mean_of_adapters(own, numbers).save(output)
        return
    if any(kinds):
        raise ValueError("paths must be all adapters, or all checkpoints: got both")
    sources = [Checkpoint(path) for path in own]
    for source in sources:
        source.refuse_quantised()
    check_alike(sources[0], sources[1:])
    made = {}
    for name, stored in sources[0].tensors.items():
        if stored.dtype in DTYPES:
            rows = _mean(sources, numbers, name, DTYPES[stored.dtype])
            made[name] = Made(stored.dtype, stored.shape, rows)
        elif any(
            name in each.tensors and not torch.equal(sources[0].data(name), each.data(name))
            for each in sources[1:]
        ):
            raise ValueError(f"{name!r} of {stored.dtype} must be the same in all: it differs")
    request = {"average": numbers, "sources": [fingerprint(each, {}) for each in sources]}
    write_checkpoint(sources[0], output, made, request, advance=advance)


def _mean(
    sources: Sequence[Checkpoint], weights: Sequence[float], name: str, dtype: torch.dtype
) -> Callable[[], Iterator[Tensor]]:
    def rows() -> Iterator[Tensor]:
        flat = [source.tensor(name).reshape(-1) for source in sources]
        for start in range(0, len(flat[0]), _CHUNK):
            total = torch.zeros(len(flat[0][start : start + _CHUNK]), dtype=torch.float64)
            for weight, own in zip(weights, flat, strict=True):
                total.add_(own[start : start + _CHUNK].double(), alpha=weight)
            found = total.to(dtype)
            if not is_finite(found):
                raise ValueError(f"the mean of {name!r} must be finite: got NaN or infinity")
            yield found

    return rows


def _mean_of_adapters(paths: Sequence[Path], weights: Sequence[float]) -> Adapter:
    """Return the weighted sum of adapters, on modules of the first one's shapes."""
    kinds, alone = zip(*map(read_adapter, paths), strict=True)
    if set(kinds) != {"superlora"}:
        raise ValueError("adapters must be files of superlora to be averaged: convert them first")
    if not all(isinstance(own.plan.spec, Spec) for own in alone):
        raise ValueError("adapters must only add to weights to be averaged")
    for path, own in zip(paths, alone, strict=True):
        if own.replaced is not None:
            raise ValueError(
                f"adapters must bring no parameters of the model to be averaged: {path} brings "
                f"{some(map(repr, own.replaced.tensors()))}"
            )
    model = alone[0].model
    others = [
        load(model, file_of(path), name=f"other{number}") for number, path in enumerate(paths[1:])
    ]
    return combine([alone[0], *others], weights, name="mean")
