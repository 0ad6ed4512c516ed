"""What an adapter's layers are in the formats of other libraries, exactly or nearly."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from superlora.algebra.form import with_blocks
from superlora.errors import AdapterError
from superlora.supports import Supports
from superlora.torch.adapter import Adapter
from superlora.torch.foreign import Layer, Matrix
from superlora.values import check_count


@dataclass
class Export:
    """What was written, and how near it is.

    Attributes
    ----------
    path : pathlib.Path
        File or folder.
    methods : dict of str to str
        The format of every layer: ``"lora"``, ``"lokr"``, ``"loha"`` or ``"full"``.
    errors : dict of str to float
        The Frobenius norm of what is missing of every layer's update, relative to the update;
        0 where the format says it exactly.
    """

    path: Path
    methods: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        width = max(map(len, self.errors), default=0)
        lines = [
            f"{name:{width}}  {self.methods[name]}  {f'error {error:.2e}' if error else 'exact'}"
            for name, error in self.errors.items()
        ]
        return "\n".join([f"wrote {self.path}", *lines])


def exact_layer(adapter: Adapter, name: str) -> Layer | None:
    """Return a layer's update if LoRA, LoKr, LoHa or a dense matrix says just this.

    Parameters
    ----------
    adapter : Adapter
        The adapter.
    name : str
        The layer.

    Returns
    -------
    Layer or None
        The factors themselves in double precision, not scaled.
    """
    layout = adapter.plan.layout
    pieces = layout.grouping.pieces[name]
    group = pieces[0].group
    own, item = layout.specs[group], layout.groups[group]
    alone = layout.grouping.members[group] == (name,) and len(pieces) == 1
    if not alone or own.terms > 1 or not layout.in_place(group):
        return None
    scale = adapter.scale_of(name)
    if own.splits == 1 and not any(item.splits[0].factored) and item.splits[0].core == "full":
        delta = adapter.plan.delta(_doubled(adapter, name), name, scale)
        return Layer("full", ((delta,),), 1.0)
    if own.splits > 2 or item.fold != layout.shapes[name]:
        return None
    blocks = _doubled(adapter, name)
    parts: list[Matrix] = []
    for index, split in enumerate(item.splits):
        found = {
            leaf: blocks[layout.block(group, index, leaf)][tuple(map(slice, shape))]
            for leaf, shape in split.block_shapes.items()
        }
        if split.sizes != split.shape:
            return None
        if split.core == "identity":
            parts.append((found["factor0"], found["factor1"].t()))
        elif not any(split.factored):
            parts.append((found["core"],))
    if len(parts) < own.splits:
        return None
    method = "lora" if own.splits == 1 else "lokr" if own.combine == "kronecker" else "loha"
    ranks = {part[0].shape[1] if len(part) == 2 else None for part in parts}
    if method == "loha" and (len(ranks) > 1 or None in ranks):
        return None
    return Layer(method, tuple(parts), scale)


def low_rank_layer(
    adapter: Adapter, name: str, rank: int | None, energy: float | None
) -> tuple[Layer, float]:
    """Return the LoRA that is nearest to a layer's update, and the relative error it leaves."""
    # The truncated singular value decomposition (Eckart and Young 1936). Where the fold is aligned
    # it is taken of the two thin factors, by way of their QR decompositions, and the update is
    # never formed.
    with torch.no_grad():
        blocks, scale = _doubled(adapter, name), adapter.scale_of(name)
        thin = adapter.plan.low_rank(blocks, name, scale)
        if thin is None:
            if rank is None and energy is None:
                layout = adapter.plan.layout
                fold = layout.groups[layout.grouping.pieces[name][0].group].fold
                raise ValueError(
                    f"rank or energy must be given: the update of {name!r}, of fold "
                    f"{fold}, is not exactly one of low rank"
                )
            delta = adapter.plan.delta(blocks, name, scale)
            left, numbers, right = torch.linalg.svd(delta, full_matrices=False)
        else:
            left, right = thin
            if rank is None and energy is None:
                return Layer("lora", ((left, right.t()),), 1.0), 0.0
            (first, upper), (second, lower) = torch.linalg.qr(left), torch.linalg.qr(right)
            left, numbers, right = torch.linalg.svd(upper @ lower.t(), full_matrices=False)
            left, right = first @ left, right @ second.t()
        squares = numbers.square()
        kept = _kept(squares, rank, energy)
        roots = numbers[:kept].sqrt()
        part = (left[:, :kept] * roots, roots[:, None] * right[:kept])
        missing, total = float(squares[kept:].sum()), float(squares.sum())
        error = math.sqrt(missing / total) if total else 0.0
    return Layer("lora", (part,), 1.0), error


def _kept(squares: Tensor, rank: int | None, energy: float | None) -> int:
    kept = len(squares) if rank is None else min(rank, len(squares))
    if energy is not None and float(squares.sum()):
        parts = squares.cumsum(0) / squares.sum()
        # Rounding may leave the whole a little below 1.
        reached = int((parts < min(energy, float(parts[-1]))).sum()) + 1
        kept = min(kept, reached)
    return max(kept, 1)


def _doubled(adapter: Adapter, name: str) -> dict[str, Tensor]:
    """Return a layer's blocks in double precision, apart from any gradient."""
    blocks, layout = adapter.factors(), adapter.plan.layout
    own = {block: blocks[block].detach().double() for block in layout.inputs_of(name)}
    return dict(with_blocks(layout, own, layout.blocks_of(name)))


def written(adapter: Adapter, values: Tensor) -> Tensor:
    """Return values as they are written: in the adapter's precision, single at least."""
    return values.to(torch.promote_types(adapter.dtype, torch.float32))


def check_export(adapter: Adapter, rank: int | None, energy: float | None) -> None:
    """Refuse an adapter that is on no model, and a rank or an energy that says nothing."""
    if rank is not None:
        check_count("rank", rank)
    if energy is not None and (
        isinstance(energy, bool) or not isinstance(energy, (int, float)) or not 0 < energy <= 1
    ):
        raise ValueError(f"energy must be in (0, 1]: got {energy!r}")
    if isinstance(adapter.plan.spec, Supports):
        raise ValueError(
            "an adapter must be of one spec, which only adds to weights, to be written for other "
            f"libraries: got a mapping of {list(adapter.plan.spec.operations)}; merge it instead"
        )
    if not adapter.attached:
        raise AdapterError("adapter must be attached to a model, whose layers the files name")


def product(matrix: Matrix) -> Tensor:
    """Return a matrix that may be given as two factors."""
    return matrix[0] if len(matrix) == 1 else matrix[0] @ matrix[1]


def as_the_peers_build(layer: Layer, both: bool) -> Layer:
    """Return a Kronecker product of the same value, in blocks that the peers would make.

    Parameters
    ----------
    layer : Layer
        A LoKr.
    both : bool
        Whether the first factor may be of low rank.

    Returns
    -------
    Layer
        Of low rank is a factor only below half of its larger side, and the first one only if
        the second one is of the same rank.
    """
    first, second = (
        part if len(part) == 2 and 2 * part[0].shape[1] < max(size) else (product(part),)
        for part, size in zip(layer.parts, layer.sizes, strict=True)
    )
    same = len(first) == len(second) == 2 and first[0].shape[1] == second[0].shape[1]
    if not (both and same):
        first = (product(first),)
    return Layer("lokr", (first, second), layer.scale)
