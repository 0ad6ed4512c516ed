"""Fixed maps of updates and of factors, with each map as a matrix of its own."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import tensorly
from hypothesis import strategies as st

import superlora as sl
from superlora import maps
from tests.reductions import matrices
from tests.reductions.cases import Net, Options, Row, options, same
from tests.reductions.paper import Arrays, Sizes, paper_row
from tests.reductions.paper_shared_rows import cut
from tests.reductions.paper_weight_rows import (
    numbered,
    numbered_views,
)
from tests.strategies import make_plan

Choices = Mapping[str, tuple[object, ...]]
NORMALIZE = ("isometric", "variance", None)
FASTFOOD = {"values": ("normal", "sign"), "shared": (True, False), "normalize": NORMALIZE}
ORDERED = {"order": ("paper", "le"), "blocks": ("single", "stacked"), **FASTFOOD}
ONE_HOT = {
    "tiled": (True, False),
    "signed": (True, False),
    "shared": (True, False),
    "normalize": NORMALIZE,
}
GAUSSIAN = {"structured": (False, True), "shared": (True, False), "normalize": NORMALIZE}
small = st.integers(2, 6)
UNLIKE = ((4, 5), (5, 3), (2, 6))  # 47 entries, which two groups share unequally


def count(choices: Choices) -> int:
    return math.prod(map(len, choices.values()))


def chosen(choices: Choices, index: int) -> dict[str, Any]:
    """Return one of all combinations of some fields, by its number."""
    found = {}
    for name, values in choices.items():
        index, place = divmod(index, len(values))
        found[name] = values[place]
    return found


def group_sizes(drawn: Options, groups: object) -> list[int]:
    each = [math.prod(shape) for shape in drawn.shapes]
    if groups == "weight":
        return each
    return [len(part) for part in numpy.array_split(numpy.arange(sum(each)), groups)]


def split_tensor(own: Arrays) -> numpy.ndarray:
    """Return a Tucker tensor, or the sum of outer products where there is no core."""
    planes = [own[leaf] for leaf in sorted(own) if leaf != "core"]
    if "core" not in own:
        return numpy.asarray(tensorly.cp_to_tensor((None, planes)))
    core = own["core"]
    sides = [own.get(f"factor{mode}", numpy.eye(size)) for mode, size in enumerate(core.shape)]
    return numpy.asarray(tensorly.tucker_to_tensor((core, sides)))


def split_tensors(arrays: Arrays, group: int) -> list[numpy.ndarray]:
    splits: dict[str, dict[str, numpy.ndarray]] = {}
    for block, array in arrays.items():
        number, split, leaf = block.split(".")
        if int(number) == group:
            splits.setdefault(split, {})[leaf] = array
    return [split_tensor(splits[split]) for split in sorted(splits)]


def group_entries(arrays: Arrays, group: int) -> numpy.ndarray:
    """Return the Kronecker product of a group's splits, row by row."""
    return functools.reduce(numpy.kron, split_tensors(arrays, group)).ravel()


def planned(spec: Callable[[Options], sl.Spec]) -> Callable[[Options], sl.Plan]:
    """Return what makes the plan of some options, of which only shapes are read."""
    return functools.lru_cache(maxsize=64)(lambda drawn: make_plan(spec(drawn), drawn.widths))


# Takes the drawn options, the entries of the fold, of the group, and the group's number.
Matrix = Callable[[Options, int, int, int], numpy.ndarray]


def mapped_row(
    name: str,
    spec: Callable[[Options], sl.Spec],
    matrix: Matrix,
    extra: int,
    example: Options,
    *,
    joint: bool = False,
    rank: st.SearchStrategy[int] | None = None,
    one_shape: bool = False,
) -> Row:
    """Make a row of blocks by their own names, whose groups' entries meet a matrix.

    With `joint` it is one matrix for the entries of all groups.
    """

    plan = planned(spec)

    def update(drawn: Options, net: Net, arrays: Arrays) -> dict[str, numpy.ndarray]:
        sizes = group_sizes(drawn, plan(drawn).spec.groups)
        entries = [group_entries(arrays, group) for group in range(len(sizes))]
        if joint:
            whole = numpy.concatenate([x[:n] for x, n in zip(entries, sizes, strict=True)])
            return cut(drawn, matrix(drawn, len(whole), len(whole), 0) @ whole)
        runs = [
            matrix(drawn, len(x), n, group) @ x
            for group, (x, n) in enumerate(zip(entries, sizes, strict=True))
        ]
        return cut(drawn, numpy.concatenate(runs))

    return paper_row(
        name,
        spec,
        lambda drawn: plan(drawn).factor_shapes,
        update,
        lambda drawn, name: {block: (block, same) for block in plan(drawn).blocks_of(name)},
        options(
            sizes=small,
            one_shape=one_shape,
            rank=st.integers(1, 3) if rank is None else rank,
            extra=st.integers(0, extra - 1),
        ),
        example,
    )


def part_of(fields: Mapping[str, Any], group: int) -> int:
    return 0 if fields["shared"] else group


def seeded_row(
    name: str,
    kind: type[maps.Map],
    draw: Callable[..., numpy.ndarray],
    choices: Choices,
    make: Callable[..., sl.Spec],
    example: int,
    **fixed: Any,
) -> Row:
    """Make a row of a map with a seed, of which hypothesis draws the fields."""

    def fields(drawn: Options) -> dict[str, Any]:
        return {**fixed, **chosen(choices, drawn.extra)}

    def matrix(drawn: Options, before: int, size: int, group: int) -> numpy.ndarray:
        own = fields(drawn)
        part = part_of(own, group)
        del own["shared"]
        return draw(before, size, drawn.seed, part, **own)

    return mapped_row(
        name,
        lambda drawn: make(drawn, kind(seed=drawn.seed, **fields(drawn))),
        matrix,
        count(choices),
        Options(UNLIKE, 2, seed=3, extra=example),
    )


def lora_mapped(drawn: Options, fixed: maps.Map, **changes: Any) -> sl.Spec:
    fields = {"groups": min(2, len(drawn.shapes)), "ratio": 0.4, **changes}
    return sl.lora(drawn.rank, fold="balanced", map=fixed, alpha=drawn.alpha, **fields)


def lorta_mapped(drawn: Options, fixed: maps.Map) -> sl.Spec:
    return sl.lorta(drawn.rank, map=fixed, ratio=0.3, alpha=drawn.alpha)


def kronecker_mapped(drawn: Options, fixed: maps.Map) -> sl.Spec:
    rank = ("full", drawn.rank)
    fields = {"rank": rank, "splits": 2, "fold": ((2, 2), (3, 3)), "scale": drawn.scale}
    return sl.Spec(groups=1, ratio=1.0, map=fixed, **fields)


def dense_mapped(drawn: Options, fixed: maps.Map, ratio: float = 0.3) -> sl.Spec:
    return sl.dense(groups=min(2, len(drawn.shapes)), map=fixed, ratio=ratio, scale=drawn.scale)


# -- the order of both transforms, and how many there are: the other fields are drawn.
ROWS = [
    seeded_row(
        f"lora-paper-fastfood-{order}-{blocks}",
        maps.Fastfood,
        matrices.fastfood,
        FASTFOOD,
        lora_mapped,
        2,  # not shared
        order=order,
        blocks=blocks,
    )
    for order in ("paper", "le")
    for blocks in ("single", "stacked")
]
ROWS += [
    seeded_row("lorta-paper-fastfood", maps.Fastfood, matrices.fastfood, ORDERED, lorta_mapped, 0),
    seeded_row("dense-paper-rho", maps.Fastfood, matrices.fastfood, ORDERED, dense_mapped, 8),
    seeded_row("lora-paper-one_hot", maps.OneHot, matrices.one_hot, ONE_HOT, lora_mapped, 4),
    seeded_row("dense-paper-one_hot", maps.OneHot, matrices.one_hot, ONE_HOT, dense_mapped, 3),
    seeded_row("lora-paper-gaussian", maps.Gaussian, matrices.gaussian, GAUSSIAN, lora_mapped, 2),
]


def shuffled(scope: str) -> Row:
    return mapped_row(
        f"lora-paper-shuffle-{scope}",
        lambda drawn: lora_mapped(
            drawn, maps.Shuffle(seed=drawn.seed, scope=scope, shared=bool(drawn.extra)), ratio=1.0
        ),
        lambda drawn, before, size, group: matrices.shuffle(
            before, size, drawn.seed, 0 if drawn.extra or scope == "all" else group
        ),
        2,
        Options(UNLIKE, 2, seed=3, extra=0),
        joint=scope == "all",
    )


def kronecker_row(name: str, part: int) -> Row:
    """Kronecker products before the map; 36 entries for weights of 36 at least."""
    return mapped_row(
        name,
        lambda drawn: kronecker_mapped(drawn, maps.Fastfood(seed=drawn.seed)),
        lambda drawn, before, size, group: matrices.fastfood(before, size, drawn.seed, part),
        1,
        Options(((7, 6), (3, 9)), 2, extra=0),
        rank=st.integers(1, 2),
    )


PARTS = (
    lambda seed: maps.Fastfood(seed=seed, values="sign"),
    lambda seed: maps.OneHot(seed=seed),
    lambda seed: maps.Fastfood(seed=seed, order="le", shared=False),
)


def block_diagonal(drawn: Options, before: int, size: int, group: int) -> numpy.ndarray:
    rows, columns = (numpy.array_split(numpy.arange(total), 3) for total in (size, before))
    matrix = numpy.zeros((size, before))
    each = (
        functools.partial(matrices.fastfood, values="sign"),
        matrices.one_hot,
        functools.partial(matrices.fastfood, order="le"),
    )
    for index, make in enumerate(each):
        part = 3 * (group if index == 2 else 0) + index
        place = numpy.ix_(rows[index], columns[index])
        matrix[place] = make(len(columns[index]), len(rows[index]), drawn.seed, part)
    return matrix


def composed(drawn: Options, before: int, size: int, group: int) -> numpy.ndarray:
    first = matrices.fastfood(before, size, drawn.seed)
    # The second map of two has streams of its own, in each group.
    return matrices.shuffle(size, size, drawn.seed + 1, 2 * group + 1) @ first


ALONG = ("all", "inputs", "outputs")


def broadcast_update(drawn: Options, net: Net, arrays: Arrays) -> dict[str, numpy.ndarray]:
    """Return IA3-like vectors: one number an update, an output or an input."""
    found = {}
    for index, (name, (rows, columns)) in enumerate(drawn.widths.items()):
        vector, along = arrays[f"v:{index}"], ALONG[drawn.extra]
        whole = {
            "all": numpy.full((rows, columns), vector[0]),
            "inputs": vector[:, None] * numpy.ones(columns),
            "outputs": numpy.ones((rows, 1)) * vector,
        }
        found[name] = drawn.scale * whole[along]
    return found


def broadcast_row(along: str) -> Row:
    index = ALONG.index(along)

    def sizes(drawn: Options) -> Sizes:
        return numbered(drawn, lambda do, di: {"v": ((1, do, di)[drawn.extra],)})

    return paper_row(
        f"dense-paper-broadcast-{along}",
        lambda drawn: sl.dense(map=maps.Broadcast(along=ALONG[drawn.extra]), scale=drawn.scale),
        sizes,
        broadcast_update,
        numbered_views({"0.core": ("v", same)}),
        options(extra=st.just(index)),
        Options(((4, 4), (5, 3)), extra=index),
    )


ROWS += [
    shuffled("group"),
    shuffled("all"),
    mapped_row(
        "lora-paper-block_diagonal",
        lambda drawn: lora_mapped(
            drawn, maps.BlockDiagonal(parts=tuple(make(drawn.seed) for make in PARTS)), ratio=0.6
        ),
        block_diagonal,
        1,
        Options(((5, 6), (4, 7)), 2, extra=0),
    ),
    mapped_row(
        "dense-paper-composed",
        lambda drawn: dense_mapped(
            drawn,
            maps.Composed(
                first=maps.Fastfood(seed=drawn.seed),
                second=maps.Shuffle(seed=drawn.seed + 1, shared=False),
            ),
        ),
        composed,
        1,
        Options(UNLIKE, extra=0),
    ),
    *map(broadcast_row, ALONG),
]
