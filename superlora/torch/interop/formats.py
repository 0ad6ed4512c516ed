"""The formats of other libraries: what a layer's tensors are here, and a layer's update there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from superlora.algebra.form import with_blocks
from superlora.checks import check_count
from superlora.design.supports import Supports
from superlora.errors import some
from superlora.torch.blocks import Blocks

# A matrix, or the two whose product it is: (output, r) and (r, input).
Matrix = tuple[Tensor, ...]
# The names of the tensors of a layer's matrices, and for each method the forms that it has.
Form = tuple[tuple[str, ...], ...]
Forms = Mapping[str, Sequence[Form]]
_COMMON_FORMS: Forms = {
    "loha": [(("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"))],
    "lokr": [
        (first, second)
        for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    ],
}
# By PEFT's name of the method in lower case.
PEFT_FORMS: Forms = {
    "lora": [(("lora_B.weight", "lora_A.weight"),)],
    **_COMMON_FORMS,
    "vera": [(("vera_lambda_b",), ("vera_lambda_d",))],
}
LYCORIS_FORMS: Forms = {
    "lora": [(("lora_up.weight", "lora_down.weight"),)],
    **_COMMON_FORMS,
    "full": [(("diff",),)],
}


@dataclass
class Layer:
    """One layer's update in a form that another library has.

    Attributes
    ----------
    method : str
        ``"lora"``, ``"lokr"``, ``"loha"`` or ``"full"``.
    parts : tuple of Matrix
        One pair (output, r) and (r, input) for LoRA; the two factors of LoKr; two pairs
        for LoHa; the update itself for full.
    scale : float
        The number in front.
    """

    method: str
    parts: tuple[Matrix, ...]
    scale: float

    @property
    def rank(self) -> int:
        """The inner dimension of the last product; 0 where there is none."""
        return self.parts[-1][0].shape[1] if len(self.parts[-1]) == 2 else 0

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Output and input width of every matrix."""
        return tuple((part[0].shape[0], part[-1].shape[1]) for part in self.parts)

    @property
    def shape(self) -> tuple[int, int]:
        """Output and input width of the update."""
        if self.method != "lokr":
            return self.sizes[0]
        rows, columns = zip(*self.sizes, strict=True)
        return math.prod(rows), math.prod(columns)


def names_of(forms: Sequence[Form]) -> list[set[str]]:
    """Return all tensors of each form."""
    return [set(itertools.chain(*form)) for form in forms]


def parts_of(found: Mapping[str, Tensor], forms: Sequence[Form]) -> tuple[Matrix, ...]:
    """Return a layer's matrices, or refuse others such as those of a convolution."""
    form = forms[names_of(forms).index(set(found))]
    wrong = [f"{leaf} of shape {tuple(t.shape)}" for leaf, t in found.items() if t.dim() != 2]
    if wrong:
        raise ValueError(f"must have matrices: got {some(wrong)}")
    return tuple(tuple(found[name] for name in matrix) for matrix in form)


def named(forms: Forms, layer: Layer) -> dict[str, Tensor]:
    """Return a layer's tensors by their names in a file."""
    lengths = list(map(len, layer.parts))
    form = next(form for form in forms[layer.method] if list(map(len, form)) == lengths)
    names, tensors = itertools.chain(*form), itertools.chain(*layer.parts)
    return dict(zip(names, tensors, strict=True))


def rank_of(parts: Iterable[Matrix]) -> int | None:
    """Return the inner width that products have in common, None if there is no product."""
    pairs = [part for part in parts if len(part) == 2]
    ranks = {size for left, right in pairs for size in (left.shape[1], right.shape[0])}
    if len(ranks) > 1:
        raise ValueError(f"must have one rank: got {sorted(ranks)}")
    return next(iter(ranks), None)


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


def exact_layer(blocks: Blocks, name: str) -> Layer | None:
    """Return a layer's update if LoRA, LoKr, LoHa or a dense matrix says just this."""
    layout = blocks.plan.layout
    pieces = layout.grouping.pieces[name]
    group = pieces[0].group
    own, item = layout.specs[group], layout.groups[group]
    alone = layout.grouping.members[group] == (name,) and len(pieces) == 1
    if not alone or own.terms > 1 or not layout.in_place(group):
        return None
    scale = blocks.scales[name].value
    if own.splits == 1 and not any(item.splits[0].factored) and item.splits[0].core == "full":
        delta = blocks.plan.delta(blocks_in_double(blocks, name), name, scale)
        return Layer("full", ((delta,),), 1.0)
    if own.splits > 2 or item.fold != layout.shapes[name]:
        return None
    doubled = blocks_in_double(blocks, name)
    parts: list[Matrix] = []
    for index, split in enumerate(item.splits):
        found = {
            leaf: doubled[layout.block(group, index, leaf)][tuple(map(slice, shape))]
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
    blocks: Blocks, name: str, rank: int | None, energy: float | None
) -> tuple[Layer, float]:
    """Return the LoRA that is nearest to a layer's update, and the relative error it leaves."""
    # The truncated singular value decomposition (Eckart and Young 1936). Where the fold is aligned
    # it is taken of the two thin factors, by way of their QR decompositions, and the update is
    # never formed; that of a Kronecker product is made of those of its factors.
    asked = rank is not None or energy is not None
    with torch.no_grad():
        doubled, scale = blocks_in_double(blocks, name), blocks.scales[name].value
        plain = blocks.plan.layout.axes[name].plain
        thin = blocks.plan.low_rank(doubled, name, scale) if plain else None
        if thin is not None and not asked:
            left, right = thin
            return Layer("lora", ((left, right.t()),), 1.0), 0.0
        exact = exact_layer(blocks, name) if thin is None else None
        if thin is not None:
            (first, upper), (second, lower) = map(torch.linalg.qr, thin)
            left, numbers, right = torch.linalg.svd(upper @ lower.t(), full_matrices=False)
            left, right = first @ left, right @ second.t()
        elif exact is not None and exact.method == "lokr":
            left, numbers, right = _kronecker_svd(exact)
        else:
            delta = blocks.plan.delta(doubled, name, scale).reshape(blocks.plan.layout.shapes[name])
            left, numbers, right = torch.linalg.svd(delta, full_matrices=False)
        squares = numbers.square()
        kept = _kept(squares, rank, energy) if asked else _low_rank(name, numbers, left, right)
        roots = numbers[:kept].sqrt()
        part = (left[:, :kept] * roots, roots[:, None] * right[:kept])
        error = _error(squares, kept) if asked else 0.0
    return Layer("lora", (part,), 1.0), error


def _kronecker_svd(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular value decomposition of a Kronecker product, up to its rank."""
    first, second = (torch.linalg.svd(product(part), full_matrices=False) for part in layer.parts)
    numbers, order = torch.outer(first.S, second.S).flatten().sort(descending=True, stable=True)
    kept = _numeric_rank(numbers, max(layer.shape))
    row, column = order[:kept] // len(second.S), order[:kept] % len(second.S)
    left = torch.einsum("ir,jr->ijr", first.U[:, row], second.U[:, column]).flatten(0, 1)
    right = torch.einsum("ri,rj->rij", first.Vh[row], second.Vh[column]).flatten(1)
    return left * math.copysign(1, layer.scale), numbers[:kept] * abs(layer.scale), right


def _numeric_rank(numbers: Tensor, width: int) -> int:
    """Return how many singular values, largest first, are above what rounding makes of zero."""
    bound = 4 * width * torch.finfo(numbers.dtype).eps * float(numbers[0])
    return max(int((numbers > bound).sum()), 1)


def _low_rank(name: str, numbers: Tensor, left: Tensor, right: Tensor) -> int:
    """Return the rank of an update that is one of low rank, or say what its truncation costs."""
    rows, columns = len(left), right.shape[1]
    rank = _numeric_rank(numbers, max(rows, columns))
    bound = rows * columns // (rows + columns)
    if rank <= bound:
        return rank
    squares = numbers.square()
    errors = [
        f"{_error(squares, kept):.2g} at rank {kept}" for kept in (1, 4, 16, 64) if kept < rank
    ]
    reached = [
        f"{error:g} takes rank {_kept(squares, None, 1 - error**2)}" for error in (0.1, 0.01)
    ]
    raise ValueError(
        f"rank or energy must be given: the update of {name!r} is not exactly one of low rank: its "
        f"rank is {rank}, where a LoRA of {rows} x {columns} is smaller than the matrix up to rank "
        f"{bound}; the nearest LoRA has a relative error of {', '.join(errors)}; an error of "
        f"{', of '.join(reached)}"
    )


def _error(squares: Tensor, kept: int) -> float:
    """Return the relative error of keeping so many of the singular values with these squares."""
    missing, total = float(squares[kept:].sum()), float(squares.sum())
    return math.sqrt(missing / total) if total else 0.0


def _kept(squares: Tensor, rank: int | None, energy: float | None) -> int:
    kept = len(squares) if rank is None else min(rank, len(squares))
    if energy is not None and float(squares.sum()):
        parts = squares.cumsum(0) / squares.sum()
        # Rounding may leave the whole a little below 1.
        reached = int((parts < min(energy, float(parts[-1]))).sum()) + 1
        kept = min(kept, reached)
    return max(kept, 1)


def blocks_in_double(blocks: Blocks, name: str) -> dict[str, Tensor]:
    """Return a layer's blocks in double precision, apart from any gradient."""
    layout = blocks.plan.layout
    own = {block: blocks[block].detach().double() for block in layout.inputs_of(name)}
    return dict(with_blocks(layout, own, layout.blocks_of(name)))


def written(blocks: Blocks, values: Tensor) -> Tensor:
    """Return values as they are written: in the adapter's precision, single at least."""
    return values.to(torch.promote_types(blocks.dtype, torch.float32))


def check_export(blocks: Blocks, rank: int | None, energy: float | None) -> None:
    """Refuse updates of other operations, and a rank or an energy that says nothing."""
    if rank is not None:
        check_count("rank", rank)
    if energy is not None and (
        isinstance(energy, bool) or not isinstance(energy, (int, float)) or not 0 < energy <= 1
    ):
        raise ValueError(f"energy must be in (0, 1]: got {energy!r}")
    if isinstance(blocks.plan.spec, Supports):
        raise ValueError(
            "an adapter must be of one spec, which only adds to weights, to be written for other "
            f"libraries: got a mapping of {list(blocks.plan.spec.operations)}; merge it instead"
        )


def with_scale_one(layer: Layer) -> Layer:
    """Return the same update with its scale in a factor: readers make it of alpha differently."""
    (first, *others), *parts = layer.parts
    return Layer(layer.method, ((layer.scale * first, *others), *parts), 1.0)


def of_one_rank(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """Return LoRAs of scale 1 and of the largest rank of them all, by rows and columns of zeros."""
    rank = max(layer.rank for layer in layers.values())
    padded = {}
    for name, layer in layers.items():
        ((left, right),) = with_scale_one(layer).parts
        missing = rank - layer.rank
        pair = nn.functional.pad(left, (0, missing)), nn.functional.pad(right, (0, 0, 0, missing))
        padded[name] = Layer("lora", (pair,), 1.0)
    return padded


def product(matrix: Matrix) -> Tensor:
    """Return a matrix that may be given as two factors."""
    return matrix[0] if len(matrix) == 1 else matrix[0] @ matrix[1]


def as_the_peers_build(layer: Layer, both: bool) -> Layer:
    """Return a Kronecker product of the same value, in blocks that the peers would make."""
    first, second = (
        part if len(part) == 2 and 2 * part[0].shape[1] < max(size) else (product(part),)
        for part, size in zip(layer.parts, layer.sizes, strict=True)
    )
    same = len(first) == len(second) == 2 and first[0].shape[1] == second[0].shape[1]
    if not (both and same):
        first = (product(first),)
    return Layer("lokr", (first, second), layer.scale)
