"""Adapters that come nearest to the difference of two checkpoints, or to another adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from superlora.algebra.fit import FitReport
from superlora.design.axes import Axes
from superlora.design.spec import Spec
from superlora.errors import some
from superlora.plan import Plan
from superlora.torch.adapter import Adapter
from superlora.torch.attach import attach, register
from superlora.torch.files.safetensors_file import DTYPES
from superlora.torch.interop.foreign import attach_foreign, update_of
from superlora.torch.interop.formats import Export, exact_layer, low_rank_layer
from superlora.torch.on_disk.adapters import read_adapter
from superlora.torch.on_disk.checkpoint import Checkpoint, check_alike
from superlora.torch.on_disk.skeleton import skeleton
from superlora.torch.on_disk.writing import check_output
from superlora.torch.replaced import Replaced
from superlora.torch.start import frozen_of, placed


class Deltas(Mapping[str, Tensor]):
    """Updates that are made when they are asked for, and not kept.

    Parameters
    ----------
    names : iterable of str
        The weights.
    make : callable
        From a name to its update.
    """

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]) -> None:
        self._names, self._make = tuple(names), make

    def __getitem__(self, name: str) -> Tensor:
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclasses.dataclass(frozen=True)
class Extraction:
    """What was extracted.

    Attributes
    ----------
    plan : Plan
        The adapter's.
    report : FitReport
        How near it comes.
    replaced : tuple of str
        Changed parameters that the adapter brings whole.
    left : tuple of str
        Changed tensors that it does not have.
    """

    plan: Plan
    report: FitReport
    replaced: tuple[str, ...]
    left: tuple[str, ...]


def extract_files(
    base: str | Path,
    tuned: str | Path,
    output: str | Path,
    spec: Any,
    targets: str | Sequence[str] = "all-linear",
    *,
    also: bool = False,
    force: bool = False,
) -> Extraction:
    """Write the adapter whose updates come nearest to what a fine-tune changed.

    Parameters
    ----------
    base, tuned : str or pathlib.Path
        Checkpoints, files or folders, of the same tensors.
    output : str or pathlib.Path
        The adapter's file, which `superlora.torch.load` reads.
    spec : Spec
        The design.
    targets : str or sequence of str
        As `plan_checkpoint` takes them.
    also : bool
        Let the adapter bring all other changed parameters whole.
    force : bool
        Replace an output that exists.

    Returns
    -------
    Extraction
        The fit's report, and what was changed besides.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If the checkpoints have other tensors, are quantised, hold NaN or infinity, or do not differ
        in the targets; or the design does not fit, or the output exists.

    Notes
    -----
    Differences are read as they are fitted: in memory are those of one group of the design, or of
    groups that share blocks.
    """
    output = Path(output)
    check_output(output, [Path(base), Path(tuned)], force)
    one, two = Checkpoint(base), Checkpoint(tuned)
    for source in (one, two):
        source.refuse_quantised()
    check_alike(one, [two])
    changed = _changed(one, two)
    if not changed:
        raise ValueError(f"{two.path} must differ from {one.path}: all tensors are the same")
    tensors = {name: one.tensor(name) for name, own in one.tensors.items() if own.dtype in DTYPES}
    model = skeleton(tensors, one.turned())
    adapter = attach(model, spec, targets=targets, dtype=torch.float32)
    if not isinstance(adapter.plan.spec, Spec):
        raise ValueError("spec must only add to weights to be fitted: got several operations")
    names = {
        name: f"{adapter._selection.module_of(name)}.{weight.key}".lstrip(".")
        for name, weight in adapter.weights().items()
    }
    own = set(names.values())
    if own.isdisjoint(changed):
        raise ValueError(
            f"targets must match weights that differ: {some(map(repr, names))} are all the same, "
            f"while {some(map(repr, changed))} differ"
        )
    rest = tuple(name for name in changed if name not in own)
    brought = tuple(name for name in rest if also and name in tensors)
    if brought:
        adapter.detach()
        adapter = attach(model, spec, targets=targets, dtype=torch.float32, also=list(brought))

    def difference(name: str) -> Tensor:
        weight, key = adapter.weights()[name], names[name]
        parts = [source.tensor(key) for source in (two, one)]
        wide = torch.promote_types(parts[0].dtype, torch.float32)
        found = parts[0].to(wide) - parts[1].to(wide)
        return weight.form().matrix(found).reshape(adapter.plan.shapes[name])

    report = _fit(adapter, Deltas(adapter.plan.shapes, difference))
    with torch.no_grad():
        for name in brought:
            assert adapter.replaced is not None
            adapter.replaced.tensors()[name].copy_(two.tensor(name))
    adapter.save(output)
    return Extraction(
        adapter.plan, report, brought, tuple(name for name in rest if name not in brought)
    )


def _changed(one: Checkpoint, two: Checkpoint) -> list[str]:
    """Return the tensors that differ, or raise where one holds NaN or infinity."""
    changed = []
    for name, own in one.tensors.items():
        if name not in two.tensors:  # a buffer of integers
            continue
        other = two.tensors[name]
        if own.dtype == other.dtype and torch.equal(one.data(name), two.data(name)):
            continue
        for source in (one, two):
            if own.dtype in DTYPES and not source.tensor(name).isfinite().all():
                raise ValueError(f"{source.path} must be finite: {name!r} has NaN or infinity")
        if own.dtype in DTYPES:
            wide = torch.promote_types(DTYPES[own.dtype], DTYPES.get(other.dtype, torch.float32))
            if torch.equal(one.tensor(name).to(wide), two.tensor(name).to(wide)):
                continue
        changed.append(name)
    return changed


@torch.no_grad()
def _fit(adapter: Adapter, deltas: Mapping[str, Tensor]) -> FitReport:
    """Give an adapter the factors whose updates come nearest to given ones."""
    held = {name: adapter.blocks[name].detach() for name in adapter.plan.frozen_shapes}
    factors, report = adapter.plan.fit(deltas, frozen=held)
    for name, values in factors.items():
        adapter.blocks[name].copy_(values)
    return report


def largest_rank(plan_of: Callable[[int], Plan], budget: int) -> int:
    """Return the largest rank whose plan has no more parameters than a budget.

    Parameters
    ----------
    plan_of : callable
        From a rank to the plan.
    budget : int
        Trainable parameters.

    Returns
    -------
    int
        The rank.

    Raises
    ------
    ValueError
        If rank 1 takes more.
    """
    least = plan_of(1).num_parameters
    if least > budget:
        raise ValueError(
            f"budget must be at least {least:,} parameters, what rank 1 takes: got {budget:,}"
        )
    low, high, before = 1, 2, least
    while True:
        found = plan_of(high).num_parameters
        if found > budget:
            break
        if found == before:  # capped
            return low
        low, high, before = high, 2 * high, found
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if plan_of(middle).num_parameters > budget else (middle, high)
    return low


def refit(adapter: Adapter, spec: Spec) -> tuple[Adapter, FitReport]:
    """Put an adapter of another design in the place of one, with the nearest updates."""
    if not isinstance(adapter.plan.spec, Spec):
        raise ValueError("an adapter must only add to weights to be fitted: it has more operations")
    plan, selection = Plan(spec, adapter.plan.layout.layer_axes), adapter._selection
    weights = selection.weights
    blocks = frozen_of(plan, weights) | plan.init(like=torch.float32)
    made = Adapter(plan, placed(plan, weights, blocks, torch.float32), adapter.name)
    report = _fit(made, Deltas(plan.shapes, lambda name: adapter.delta(name).detach()))
    return _in_place_of(adapter, made), report


def as_lora(
    adapter: Adapter, rank: int | None, energy: float | None
) -> tuple[Adapter, dict[str, float]]:
    """Put the nearest LoRA in the place of an adapter, and say what is missing of each update."""
    if not isinstance(adapter.plan.spec, Spec):
        raise ValueError("an adapter must only add to weights to be a LoRA: it has more operations")
    if adapter._selection.rows or any(not axes.plain for axes in adapter.plan.layout.axes.values()):
        raise ValueError("layers must be whole matrices to be written as LoRA of other ranks")
    updates, errors = {}, {}
    for name in adapter.plan.shapes:
        layer, errors[name] = low_rank_layer(adapter.blocks, name, rank, energy)
        ((left, right),) = layer.parts
        parts = ((left.to(torch.float32), right.to(torch.float32)),)
        updates[name] = update_of("lora", parts, scale=layer.scale)
    model, replaced = adapter.model, _brought(adapter)
    adapter.detach()
    return attach_foreign(model, Path("the adapter"), updates, replaced, adapter.name), errors


def _brought(adapter: Adapter) -> dict[str, Tensor]:
    return {} if adapter.replaced is None else dict(adapter.replaced.tensors())


def _in_place_of(adapter: Adapter, made: Adapter) -> Adapter:
    model, selection, values = adapter.model, adapter._selection, _brought(adapter)
    shared = {} if adapter.replaced is None else adapter.replaced.shared
    adapter.detach()
    return register(model, made, selection, Replaced(model, values, shared) if values else None)


def shapes_of(path: str | Path, base: str | Path | None = None) -> dict[str, Axes]:
    """Return the axes of the weights that an adapter of files adapts."""
    return dict(read_adapter(path, base)[1].plan.layout.layer_axes)


def convert_files(
    source: str | Path,
    output: str | Path,
    to: str,
    *,
    base: str | Path | None = None,
    spec: Spec | str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    force: bool = False,
) -> dict[str, float]:
    """Write an adapter in another format, and of another design if asked.

    Parameters
    ----------
    source : str or pathlib.Path
        A file or folder of this library, a folder of PEFT's, or a file of LyCORIS's.
    output : str or pathlib.Path
        A folder for PEFT, else a file.
    to : {"superlora", "peft", "lycoris", "kohya", "comfy", "diffusers"}
        The format.
    base : str or pathlib.Path, optional
        The adapter's base, where its files alone say too little.
    spec : Spec or "lora", optional
        Another design, which is fitted to the updates; ``"lora"`` takes for each weight the LoRA
        of `rank`, or of the least rank with the part `energy` of its squared singular values.
    rank, energy : int and float, optional
        Also where the format has no counterpart of the design, as in ``Adapter.to_peft``.
    force : bool
        Replace an output that exists.

    Returns
    -------
    dict of str to float
        The relative error of each weight's update, 0 where the format says it exactly.

    Raises
    ------
    FileNotFoundError
        If there is no such adapter.
    ValueError
        If the format cannot say the design, or the output exists.
    """
    if to not in _WRITERS:
        raise ValueError(f"to must be one of {', '.join(_WRITERS)}: got {to!r}")
    source, output = Path(source), Path(output)
    check_output(output, [source], force)
    _, adapter = read_adapter(source, base)
    errors = dict.fromkeys(adapter.plan.shapes, 0.0)
    if spec == "lora":
        adapter, errors = as_lora(adapter, rank, energy)
    elif isinstance(spec, Spec):
        adapter, report = refit(adapter, spec)
        errors = report.errors
    elif spec is not None:
        raise ValueError(f"spec must be a superlora.Spec or 'lora': got {spec!r}")
    export = _WRITERS[to](adapter, output, rank, energy)
    return errors if export is None or spec is not None else export.errors


def resize_files(
    source: str | Path,
    output: str | Path,
    rank: int,
    *,
    base: str | Path | None = None,
    force: bool = False,
) -> dict[str, float]:
    """Write an adapter of the same design and format, and of a smaller rank.

    Parameters
    ----------
    source, output, base, force : as for `convert_files`
        The adapter, and what is written.
    rank : int
        The new rank.

    Returns
    -------
    dict of str to float
        The relative error of each weight's update.

    Raises
    ------
    FileNotFoundError
        If there is no such adapter.
    ValueError
        If the rank is not smaller, the design has no rank, or the output exists.

    Notes
    -----
    LoRA is truncated by the singular values of its factors, and no update is formed; other
    designs are fitted.
    """
    source, output = Path(source), Path(output)
    check_output(output, [source], force)
    kind, adapter = read_adapter(source, base)
    spec, before = adapter.plan.spec, adapter.num_parameters
    layers = {name: exact_layer(adapter.blocks, name) for name in adapter.plan.shapes}
    if all(layer is not None and layer.method == "lora" for layer in layers.values()):
        ranks = [layer.rank for layer in layers.values() if layer is not None]
        if rank >= max(ranks):
            raise ValueError(f"rank must be below {max(ranks)}, the adapter's: got {rank}")
        adapter, errors = as_lora(adapter, rank, None)
    else:
        if not isinstance(spec, Spec) or _capped(spec.rank, rank) == spec.rank:
            raise ValueError(f"rank must be below that of the design: got {rank} for {spec!r}")
        adapter, report = refit(adapter, _of_rank(spec, rank))
        errors = report.errors
    if adapter.num_parameters >= before:
        raise ValueError(
            f"rank must leave fewer parameters than {before:,}: {rank} takes "
            f"{adapter.num_parameters:,}"
        )
    _WRITERS["peft" if kind == "PEFT" else kind.lower()](adapter, output, None, None)
    return errors


def _of_rank(spec: Spec, rank: int) -> Spec:
    """Return a design of no larger ranks than one, and of the same scale."""
    overrides = {
        pattern: None
        if fields is None
        else {key: _capped(own, rank) if key == "rank" else own for key, own in fields}
        for pattern, fields in spec.overrides
    }
    same = {"alpha": None, "rslora": False, "scale": spec.scaling}
    return spec.replace(rank=_capped(spec.rank, rank), overrides=overrides, **same)


def _capped(rank: Any, most: int) -> Any:
    if isinstance(rank, tuple):
        return tuple(_capped(own, most) for own in rank)
    return min(rank, most) if isinstance(rank, int) else rank


def _save(adapter: Adapter, path: Path, *_: Any) -> None:
    adapter.save(path)


def _to_peft(adapter: Adapter, path: Path, rank: int | None, energy: float | None) -> Export:
    return adapter.to_peft(path, rank=rank, energy=energy)


def _flat(keys: str) -> Callable[..., Export]:
    def write(adapter: Adapter, path: Path, rank: int | None, energy: float | None) -> Export:
        return adapter.to_lycoris(path, rank=rank, energy=energy, keys=keys)

    return write


_WRITERS: dict[str, Callable[..., Export | None]] = {
    "superlora": _save,
    "peft": _to_peft,
    **{keys: _flat(keys) for keys in ("lycoris", "kohya", "comfy", "diffusers")},
}
