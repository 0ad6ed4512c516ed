"""Adapters that come nearest to the difference of two checkpoints, or to another adapter."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from superlora.algebra.fit import FitReport, parts
from superlora.choose.budget import largest_rank
from superlora.design.axes import Axes
from superlora.design.spec import Spec
from superlora.errors import some
from superlora.plan import Plan
from superlora.torch.adapter import Adapter
from superlora.torch.attach import attach, register
from superlora.torch.files.safetensors_file import DTYPES, read_header
from superlora.torch.interop.foreign import attach_foreign, update_of
from superlora.torch.interop.formats import (
    Export,
    check_export,
    exact_layer,
    low_rank_layer,
)
from superlora.torch.interop.keys import keys_of
from superlora.torch.on_disk.adapters import read_adapter
from superlora.torch.on_disk.checkpoint import Checkpoint, check_alike
from superlora.torch.on_disk.planning import plan_checkpoint, shapes_alone
from superlora.torch.on_disk.skeleton import skeleton
from superlora.torch.on_disk.writing import check_output
from superlora.torch.replaced import Replaced, _chosen
from superlora.torch.start import frozen_of, placed
from superlora.torch.targets import find_targets
from superlora.torch.walk import tensors_of


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
    replaced : dict of str to float
        Changed parameters that the adapter brings whole, and their relative changes: the
        Frobenius norm of the difference over that of the base.
    left : dict of str to float
        Changed tensors that it does not have, and the same; NaN for integers.
    """

    plan: Plan
    report: FitReport
    replaced: dict[str, float]
    left: dict[str, float]


def extract_files(
    base: str | Path,
    tuned: str | Path,
    output: str | Path,
    spec: Spec | Callable[[int], Spec],
    targets: str | Sequence[str] = "all-linear",
    *,
    budget: int | None = None,
    also: str | Sequence[str] | None = None,
    seed: int = 0,
    force: bool = False,
    started: Callable[[Plan, int], None] = lambda plan, peak: None,
) -> Extraction:
    """Write the adapter whose updates come nearest to what a fine-tune changed.

    Parameters
    ----------
    base, tuned : str or pathlib.Path
        Checkpoints, files or folders, of the same tensors.
    output : str or pathlib.Path
        The adapter's file, which `superlora.torch.load` reads.
    spec : Spec or callable
        The design; with `budget` a function from a rank to it.
    targets : str or sequence of str
        As `plan_checkpoint` takes them; of ``"all-linear"`` only the weights that differ.
    budget : int, optional
        Trainable parameters at most: the largest rank that fits is taken.
    also : str or sequence of str, optional
        Other changed parameters that the adapter brings whole: as in `superlora.torch.attach`, or
        ``"all"``.
    seed : int
        Of frozen blocks and of the fit's random starts.
    force : bool
        Replace an output that exists.
    started : callable, optional
        Called before the fit with the plan and the bytes of memory that it takes at most.

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
        in the targets; or the design does not fit, the budget is below that of rank 1, `also`
        matches nothing that changed, or the output exists.

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
    if isinstance(spec, Spec) is not (budget is None):
        raise ValueError("spec must be a function of a rank with a budget, and a Spec without one")
    first = spec if isinstance(spec, Spec) else spec(1)
    selection = find_targets(shapes_alone(one), targets)
    names = {
        name: f"{selection.module_of(name)}.{weight.key}".lstrip(".")
        for name, weight in selection.weights.items()
    }
    if set(names.values()).isdisjoint(changed):
        raise ValueError(
            f"targets must match weights that differ: {some(map(repr, names))} are all the same, "
            f"while {some(map(repr, changed))} differ"
        )
    if targets == "all-linear":
        names = {name: own for name, own in names.items() if own in changed}
        targets = "|".join(map(re.escape, names))  # before they are joined with the design
    plan, _ = plan_checkpoint(one, first, targets)
    if not isinstance(spec, Spec):
        assert budget is not None
        spec = spec_under(budget, spec, plan.layout.layer_axes)
    tensors = {name: one.tensor(name) for name, own in one.tensors.items() if own.dtype in DTYPES}
    model = skeleton(tensors, one.turned())
    rest = [name for name in changed if name not in names.values()]
    brought = [] if also is None else _brought_by(model, also, [n for n in rest if n in tensors])
    adapter = attach(
        model,
        spec,
        targets=targets,
        also=(lambda name, _: name in brought) if brought else None,
        seed=seed,
        dtype=torch.float32,
    )
    if not isinstance(adapter.plan.spec, Spec):
        raise ValueError("spec must only add to weights to be fitted: got several operations")
    largest = max(math.prod(one.tensors[name].shape) for name in changed)
    held = sum(one.tensors[name].nbytes for name in brought)
    started(adapter.plan, max(fit_memory(adapter.plan), 16 * largest) + 2 * held)

    def difference(name: str) -> Tensor:
        found = _difference(one, two, names[name])
        return adapter.weights()[name].form().matrix(found).reshape(adapter.plan.shapes[name])

    report = _fit(adapter, Deltas(adapter.plan.shapes, difference), seed)
    with torch.no_grad():
        for name in brought:
            assert adapter.replaced is not None
            adapter.replaced.tensors()[name].copy_(two.tensor(name))
    adapter.save(output)
    changes = {name: _relative_change(one, two, name) for name in rest}
    return Extraction(
        adapter.plan,
        report,
        {name: changes[name] for name in brought},
        {name: change for name, change in changes.items() if name not in brought},
    )


def fit_memory(plan: Plan) -> int:
    """Return how many bytes a fit takes at most: of the part with most entries, and the factors."""
    members = plan.layout.grouping.members
    entries = max(
        sum(math.prod(plan.shapes[name]) for name in {n for group in part for n in members[group]})
        for part in parts(plan.layout, plan.frozen_shapes)
    )
    # The update, its vector, what is left of it, and the working copies of decompositions: five to
    # twelve arrays in double precision were measured. Factors are in double, and twice in single.
    # The libraries that are loaded for it take the rest.
    return 96 * entries + 16 * plan.num_parameters + (32 << 20)


def _difference(one: Checkpoint, two: Checkpoint, name: str) -> Tensor:
    """Return what was added to a tensor, in single precision at least."""
    before, after = one.tensor(name), two.tensor(name)
    wide = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
    return after.to(wide) - before.to(wide)


def _relative_change(one: Checkpoint, two: Checkpoint, name: str) -> float:
    if one.tensors[name].dtype not in DTYPES or two.tensors[name].dtype not in DTYPES:
        return math.nan
    norms = (_difference(one, two, name), one.tensor(name))
    change, before = (float(torch.linalg.vector_norm(own, dtype=torch.float64)) for own in norms)
    return change / before if before else math.inf


def _brought_by(model: nn.Module, also: str | Sequence[str], changed: Sequence[str]) -> list[str]:
    """Return which changed parameters a user names, or raise if there is none."""
    if also == "all":
        return list(changed)
    chosen = _chosen(tensors_of(model), also)
    found = [name for name in changed if name in chosen]
    if not found:
        raise ValueError(
            f"also must match what changed besides the targets: {also!r} matches none of "
            f"{some(map(repr, changed))}"
        )
    return found


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
def _fit(adapter: Adapter, deltas: Mapping[str, Tensor], seed: int = 0) -> FitReport:
    """Give an adapter the factors whose updates come nearest to given ones."""
    held = {name: adapter.blocks[name].detach() for name in adapter.plan.frozen_shapes}
    factors, report = adapter.plan.fit(deltas, frozen=held, seed=seed)
    for name, values in factors.items():
        adapter.blocks[name].copy_(values)
    return report


def spec_under(budget: int, spec_of: Callable[[int], Spec], axes: Mapping[str, Axes]) -> Spec:
    """Return the design of the largest rank that a budget of parameters allows."""
    rank = largest_rank(lambda own: Plan(spec_of(own), axes), budget)
    if not rank:
        needed = Plan(spec_of(1), axes).num_parameters
        raise ValueError(
            f"budget must be at least {needed:,} parameters, what rank 1 takes: got {budget:,}"
        )
    return spec_of(rank)


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
    if to == "superlora" and spec is None and (rank is not None or energy is not None):
        raise ValueError("rank and energy must come with a spec: superlora keeps the design")
    source, output = Path(source), Path(output)
    check_output(output, [source], force)
    _, adapter = read_adapter(source, base)
    if to == "peft" and base is None:
        _check_whole(adapter)
    errors = dict.fromkeys(adapter.plan.shapes, 0.0)
    if spec == "lora":
        check_export(adapter.blocks, rank, energy)
        adapter, errors = as_lora(adapter, rank, energy)
    elif isinstance(spec, Spec):
        adapter, report = refit(adapter, spec)
        errors = report.errors
    elif spec is not None:
        raise ValueError(f"spec must be a superlora.Spec or 'lora': got {spec!r}")
    export = _WRITERS[to](adapter, output, rank, energy)
    return errors if export is None or spec is not None else export.errors


def _check_whole(adapter: Adapter) -> None:
    """Refuse biases of modules of which an adapter's files do not know the rest."""
    brought = _brought(adapter)
    layers = {adapter._selection.module_of(name) for name in adapter._sites}
    owners = {name.rpartition(".")[0] for name in brought if name.rpartition(".")[2] == "bias"}
    parts = [own for own in owners - layers if f"{own}.weight" not in brought]
    if parts:
        raise ValueError(
            f"base must be given for PEFT, which saves modules whole: the adapter brings the "
            f"biases alone of {some(map(repr, sorted(parts)))}"
        )


def resize_files(
    source: str | Path,
    output: str | Path,
    rank: int | None = None,
    *,
    energy: float | None = None,
    base: str | Path | None = None,
    force: bool = False,
) -> dict[str, float]:
    """Write an adapter of the same design and format, and of a smaller rank.

    Parameters
    ----------
    source, output, base, force : as for `convert_files`
        The adapter, and what is written.
    rank, energy : int and float
        One of them: the new rank; or, of a LoRA, for each weight the least that keeps this part
        of its squared singular values.

    Returns
    -------
    dict of str to float
        The relative error of each weight's update.

    Raises
    ------
    FileNotFoundError
        If there is no such adapter.
    ValueError
        If not one of `rank` and `energy` is given, the adapter does not become smaller, it is no
        LoRA where one is needed, the design has no rank, or the output exists.

    Notes
    -----
    LoRA is truncated by the singular values of its factors, and no update is formed; other
    designs are fitted.
    """
    if (rank is None) == (energy is None):
        raise ValueError("one of rank and energy must be given")
    source, output = Path(source), Path(output)
    check_output(output, [source], force)
    kind, adapter = read_adapter(source, base)
    check_export(adapter.blocks, rank, energy)
    spec, before = adapter.plan.spec, adapter.num_parameters
    assert isinstance(spec, Spec)
    layers = [exact_layer(adapter.blocks, name) for name in adapter.plan.shapes]
    ranks = [layer.rank for layer in layers if layer is not None and layer.method == "lora"]
    if len(ranks) == len(layers):
        if rank is not None and rank >= max(ranks):
            raise ValueError(f"rank must be below {max(ranks)}, the adapter's: got {rank}")
        adapter, errors = as_lora(adapter, rank, energy)
    elif rank is None:
        raise ValueError(
            f"energy must be that of a LoRA: got {spec!r}; give a rank, or convert it to one"
        )
    elif _capped(spec.rank, rank) == spec.rank:
        raise ValueError(f"rank must be below that of the design: got {rank} for {spec!r}")
    else:
        adapter, report = refit(adapter, _of_rank(spec, rank))
        errors = report.errors
    if adapter.num_parameters >= before:
        raise ValueError(
            f"an adapter must become smaller than {before:,} parameters: it would have "
            f"{adapter.num_parameters:,}"
        )
    if kind == "LyCORIS":
        keys, prefix = keys_of(read_header(source)[1])
        adapter.to_lycoris(output, keys=keys, prefix=prefix)
    else:
        _WRITERS[kind.lower()](adapter, output, None, None)
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
