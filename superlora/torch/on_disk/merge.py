"""Merge an adapter into a checkpoint, a tensor at a time."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from superlora.design.supports import OF_BIAS
from superlora.torch.adapter import Adapter
from superlora.torch.files.folder import file_of
from superlora.torch.files.load import load
from superlora.torch.files.safetensors_file import DTYPES, read_header
from superlora.torch.files.state import KEY, MODEL, Description, description_of
from superlora.torch.interop.from_lycoris import from_lycoris
from superlora.torch.interop.from_peft import from_peft
from superlora.torch.interop.to_peft import CONFIG as PEFT_CONFIG
from superlora.torch.interop.to_peft import PREFIX, WEIGHTS
from superlora.torch.merge_operations import changed_by
from superlora.torch.on_disk.checkpoint import Checkpoint
from superlora.torch.on_disk.skeleton import prefix_between, skeleton
from superlora.torch.on_disk.writing import (
    Made,
    Progress,
    check_output,
    digest,
    planned,
    size_of,
    write_checkpoint,
)
from superlora.torch.rounding import is_finite
from superlora.torch.site import Site
from superlora.torch.support import Support

Rows = Callable[[], Iterator[Tensor]]

# In a key of PEFT's, after the layer's name.
_PEFT_LEAVES = re.compile(r"\.(?:lora_|hada_|lokr_|vera_|base_layer\.|modules_to_save\.)")
# Rows that a product computes alike, alone or as a part; a few at the end are computed otherwise.
_ROWS = 64
# Entries that are made at a time where a weight's rows can be, in a core's cache, and written.
_CHUNK, _PART = 1 << 18, 1 << 22


class Merge(NamedTuple):
    """What a merge is to do, before it does it.

    Attributes
    ----------
    weights, biases, replaced : tuple of str
        Tensors of the checkpoint that are changed: adapted weights, their biases, parameters that
        the adapter brings.
    gained : tuple of str
        Biases that the checkpoint has not.
    nbytes : int
        Bytes of the output's tensors.
    peak : int
        Bytes of memory that the adapter and the tensors take at most, beside the page cache: an
        estimate.
    """

    weights: tuple[str, ...]
    biases: tuple[str, ...]
    replaced: tuple[str, ...]
    gained: tuple[str, ...]
    nbytes: int
    peak: int


def merge_files(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    dtype: str | None = None,
    force: bool = False,
    started: Callable[[Merge], None] = lambda merge: None,
    advance: Progress = lambda count: None,
) -> Merge:
    """Write a checkpoint with an adapter merged into it; no model is made.

    Parameters
    ----------
    base : str or pathlib.Path
        A safetensors file, or a folder of one or of shards with their index.
    adapter : str or pathlib.Path
        A file or folder of this library, a folder of PEFT's, or a file of LyCORIS's.
    output : str or pathlib.Path
        A folder where `base` is one, with the same files, else a file.
    dtype : {"float32", "float16", "bfloat16", "float64"}, optional
        That of all floating-point tensors of the output; sums are rounded once, to it.
    force : bool
        Replace an output that exists.
    started : callable, optional
        Called with what will be done, before anything is written.
    advance : callable, optional
        Called with numbers of bytes that were written.

    Returns
    -------
    Merge
        What was done.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    OSError
        If the disk is too small.
    ValueError
        If a file is truncated, the checkpoint is quantised or lacks layers of the adapter, or
        has others in their place, the output exists, or a sum is not finite.

    Notes
    -----
    The tensors are bit for bit those of ``load(model, adapter).merge()``. A tensor is in memory
    at a time. The output gets its name once it is whole. The finished files of an interrupted
    merge of a sharded folder are kept in a hidden folder beside it, and taken over by a merge of
    the same base and adapter.
    """
    source, path, output = Checkpoint(base), Path(adapter), Path(output)
    check_output(output, [source.path, path], force)
    source.refuse_quantised()
    kind = None if dtype is None else _kind_of(dtype)
    attached = attach_to(source, path)
    made = _made(source, attached, kind)
    merge = _description(source, attached, made)
    started(merge)
    request = {
        "adapter": [digest(own) for own in _files_of(path)],
        "dtype": kind,
    }
    said = None if dtype is None else {"dtype": dtype, "torch_dtype": dtype}
    write_checkpoint(source, output, made, request, config=said, advance=advance)
    return merge


def _kind_of(dtype: str) -> str:
    found = {str(own).removeprefix("torch."): kind for kind, own in DTYPES.items()}
    if dtype not in found:
        raise ValueError(f"dtype must be one of {', '.join(found)}: got {dtype!r}")
    return found[dtype]


def _files_of(path: Path) -> list[Path]:
    """Return what an adapter is read from."""
    if (path / PEFT_CONFIG).is_file():
        return [path / PEFT_CONFIG, path / WEIGHTS]
    return [file_of(path)]


@dataclass
class Attached:
    """An adapter of files, on modules that stand for a model of a checkpoint's tensors.

    Attributes
    ----------
    adapter : Adapter
        The adapter.
    prefixes : (str, str)
        What the checkpoint's names begin with that the model's do not, and the other way round.
    shared : dict of str to list of str
        Other names of the model's tensors.
    """

    adapter: Adapter
    prefixes: tuple[str, str]
    shared: Mapping[str, list[str]]

    def name(self, own: str) -> str:
        """Return the checkpoint's name of a tensor of the model."""
        more, less = self.prefixes
        return more + own.removeprefix(less)

    def names(self, own: str) -> list[str]:
        """Return all of the checkpoint's names of a tensor of the model."""
        return [self.name(each) for each in (own, *self.shared.get(own, ()))]


def attach_to(base: Checkpoint, path: Path) -> Attached:
    """Attach an adapter's files to modules that stand for a model of the checkpoint's tensors."""
    if (path / PEFT_CONFIG).is_file():
        keys = [key for key in read_header(path / WEIGHTS)[1] if key.startswith(PREFIX)]
        wanted = dict.fromkeys(_PEFT_LEAVES.split(key.removeprefix(PREFIX))[0] for key in keys)
        prefixes = prefix_between(wanted, base.tensors, base.path) if wanted else ("", "")
        model = skeleton(_named(base, prefixes), base.turned(wanted))
        return Attached(from_peft(model, path), prefixes, {})
    file = file_of(path)
    if not file.is_file():
        raise FileNotFoundError(f"no adapter at {path}: a file, or a folder of one")
    metadata, header = read_header(file)
    if KEY not in metadata:
        model = skeleton(_named(base, ("", "")), base.turned())
        return Attached(from_lycoris(model, file), ("", ""), {})
    description = description_of(metadata, file, len(base.tensors))
    replaced = [name.removeprefix(MODEL) for name in header if name.startswith(MODEL)]
    by_layer = {_layer(name, description): name for name in description.layers}
    prefixes = prefix_between([*by_layer, *replaced], base.tensors, base.path)
    tensors = _named(base, prefixes)
    turned = [
        own for own, name in by_layer.items() if _turned(base, tensors, own, name, description)
    ]
    shared = {**description.shared, **_tied(tensors, description.tied)}
    model = skeleton(tensors, turned, shared)
    return Attached(load(model, file), prefixes, shared)


def _tied(tensors: Mapping[str, Tensor], tied: Iterable[str]) -> dict[str, list[str]]:
    """Return other names under which a checkpoint has weights that layers share."""
    found = {}
    for layer in tied:
        name = layer if layer in tensors else f"{layer}.weight"
        own = tensors[name]
        others = [
            other
            for other, each in tensors.items()
            if other != name and (each.shape, each.dtype) == (own.shape, own.dtype)
        ]
        found[name] = [other for other in others if torch.equal(tensors[other], own)]
    return found


def _layer(name: str, description: Description) -> str:
    return name.rpartition(".")[0] if name in description.rows else name


def _named(base: Checkpoint, prefixes: tuple[str, str]) -> dict[str, Tensor]:
    """Return the checkpoint's floating-point tensors by the names of the adapter's model."""
    more, less = prefixes
    return {
        less + name.removeprefix(more): base.tensor(name)
        for name, own in base.tensors.items()
        if name.startswith(more) and own.dtype in DTYPES
    }


def _turned(
    base: Checkpoint,
    tensors: Mapping[str, Tensor],
    layer: str,
    name: str,
    description: Description,
) -> bool:
    """Return whether a weight is stored (input, output), or raise where nothing says it."""
    if description.transposed is not None:
        return name in description.transposed
    stored = tuple(tensors[layer if layer in tensors else f"{layer}.weight"].shape)
    axes = description.layers[name]
    if len(stored) < 2 or name in description.rows:
        return bool(base.transposed(layer))
    if axes.out != axes.in_:
        return stored != axes.shape  # loading refuses other sizes
    found = base.transposed(layer) if len(stored) == 2 else None
    if found is None:
        raise ValueError(
            f"{name!r} must be known to be stored (output, input) or (input, output): it is "
            f"square, and neither the adapter nor a config.json in {base.path} says it; load the "
            "adapter on its model and save it again"
        )
    return found


def _made(base: Checkpoint, attached: Attached, kind: str | None) -> dict[str, Made]:
    """Return the tensors that are made, by the checkpoint's names."""
    adapter = attached.adapter
    made: dict[str, Made] = {}
    if kind is not None:
        for name, own in base.tensors.items():
            if own.dtype in DTYPES and own.dtype != kind:
                made[name] = Made(kind, own.shape, _cast(base, name, DTYPES[kind]))
    layers = {site: adapter._selection.module_of(name) for name, site in adapter._sites.items()}
    for site, layer in layers.items():
        supports = [*site.links[adapter].supports]
        weight, bias = (f"{layer}.{key}".lstrip(".") for key in (site.held.key, "bias"))
        own = base.tensors[attached.name(weight)]
        out = kind or own.dtype
        if any(each.operation not in OF_BIAS for each in supports):
            new = Made(out, own.shape, _weight_of(site, supports, DTYPES[out]))
            made |= {name: new for name in attached.names(weight) if name in base.tensors}
        of_bias = {each.operation for each in supports} & OF_BIAS
        if of_bias - {"scale_bias"} or (of_bias and site.bias is not None):
            there = base.tensors.get(attached.name(bias))
            to = out if there is None else kind or there.dtype
            rows = _bias_of(site, supports, DTYPES[to])
            made[attached.name(bias)] = Made(to, (site.held.axes.out,), rows, own.file)
    if adapter.replaced is not None:
        for own_name, value in adapter.replaced.tensors().items():
            for name in attached.names(own_name):
                if name in base.tensors:
                    said = base.tensors[name].dtype
                    to = kind if kind and said in DTYPES else said
                    made[name] = Made(to, tuple(value.shape), _held(value, to))
    return made


def _cast(base: Checkpoint, name: str, dtype: torch.dtype) -> Rows:
    def rows() -> Iterator[Tensor]:
        flat = base.tensor(name).reshape(-1)
        for start in range(0, len(flat), _PART):
            yield flat[start : start + _PART].to(dtype)

    return rows


def _held(value: Tensor, kind: str) -> Rows:
    def rows() -> Iterator[Tensor]:
        yield value.detach().to(DTYPES[kind]) if kind in DTYPES else value.detach()

    return rows


def _weight_of(site: Site, supports: Sequence[Support], out: torch.dtype) -> Rows:
    """Return what makes a weight with its update, as `Site.merge` does."""
    weight, name = site.held.parameter, supports[0].name

    @torch.no_grad()
    def rows() -> Iterator[Tensor]:
        pair = _product(site, supports)
        if pair is None:
            of_weight, _ = changed_by(site.base, supports, Support.delta)
            assert of_weight is not None
            yield _finite(_sum(weight, site.form.stored(of_weight)).to(out), name)
            return
        left, right = pair
        scale, width = supports[0].scale.value, weight.shape[1]
        every, most = _cuts(*weight.shape), _PART // _CHUNK
        for cuts in (every[place : place + most] for place in range(0, len(every), most)):
            first, last = cuts[0].start, cuts[-1].stop
            found = torch.empty(last - first, width, dtype=out)
            for own in cuts:
                delta = left[own] @ right.t()
                delta = delta if scale == 1 else delta * scale
                found[own.start - first : own.stop - first].copy_(_sum(weight[own], delta))
            yield _finite(found, name)

    return rows


def _cuts(height: int, width: int) -> list[slice]:
    """Return rows to make at a time: whole blocks of a matrix product, whose bits stay the same."""
    step = max(1, _CHUNK // width // _ROWS) * _ROWS
    ends = [*range(step, height, step), height]
    if len(ends) > 1 and ends[-1] - ends[-2] < _ROWS:
        del ends[-2]
    return [slice(*own) for own in itertools.pairwise((0, *ends))]


def _product(site: Site, supports: Sequence[Support]) -> tuple[Tensor, Tensor] | None:
    """Return the two blocks whose product an update is, so that some rows can be made alone."""
    own = supports[0]
    term = own.operands.term
    alone = len(supports) == 1 and own.plain and site.form.plain and term is not None
    if not alone or term is None or len(term.operands) != 2:
        return None
    one, two = term.operands
    # Rows and rank, columns and rank: what the contraction multiplies as it is.
    labels = one.labels[-1:] == two.labels[-1:] and len(one.labels) == len(two.labels) == 2
    if not (labels and one.whole and two.whole):
        return None
    left, right = own.given(own.operands, site.held.parameter.device)
    return left, right


def _bias_of(site: Site, supports: Sequence[Support], out: torch.dtype) -> Rows:
    @torch.no_grad()
    def rows() -> Iterator[Tensor]:
        _, of_bias = changed_by(site.base, supports, Support.delta)
        assert of_bias is not None
        if site.bias is None:
            yield of_bias.to(site.held.parameter.dtype).to(out)
        else:
            yield _finite(_sum(site.bias, of_bias).to(out), supports[0].name)

    return rows


def _sum(own: Tensor, delta: Tensor) -> Tensor:
    """Return a sum in the wider dtype; in the memory of `delta` where it can be."""
    return delta.to(torch.promote_types(own.dtype, delta.dtype)).add_(own.detach())


def _finite(found: Tensor, name: str) -> Tensor:
    if not is_finite(found):
        raise ValueError(f"weight + update of {name!r} must be finite to be merged")
    return found


def _description(base: Checkpoint, attached: Attached, made: Mapping[str, Made]) -> Merge:
    """Return what will be done."""
    adapter = attached.adapter
    named = [f"{adapter._selection.module_of(n)}.{s.held.key}" for n, s in adapter._sites.items()]
    weights = {attached.name(name.lstrip(".")) for name in named} & made.keys()
    replaced = (
        set() if adapter.replaced is None else set(map(attached.name, adapter.replaced.every))
    )
    # The adapter, as it is read and attached, and three parts: written, made, and being made. An
    # allocator may hold as much again of what was freed.
    peak = 2 * sum(own.nbytes for own in adapter.state_dict().values())
    largest = 3 * 4 * _PART + 4 * 8 * _CHUNK
    for site in adapter._own:
        supports = [*site.links[adapter].supports]
        if _product(site, supports) is None:
            # The supports, what one is made from or scaled to, the sum of them, and the weight;
            # that of the next one while one is written.
            wide = max(own.blocks.dtype.itemsize for own in supports)
            each = (3 + len(supports)) * wide + 3 * site.held.dtype.itemsize
            largest = max(largest, math.prod(site.held.shape) * each)
    return Merge(
        tuple(name for name in base.tensors if name in weights),
        tuple(
            name
            for name in made
            if name.endswith("bias")
            and name not in weights | replaced
            and made[name].file is not None
        ),
        tuple(name for name in base.tensors if name in replaced),
        tuple(name for name in made if name not in base.tensors),
        sum(map(size_of, planned(base, made).values())),
        peak + 2 * largest,
    )
