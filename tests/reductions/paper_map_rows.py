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
from tests.reductions.paper import Arrays, Sizes, Views, paper_row
from tests.reductions.paper_shared_rows import cut
from tests.reductions.paper_weight_rows import (
    column,
    number_of,
    numbered,
    numbered_views,
    per_weight,
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
    return matrices.shuffle(size, size, drawn.seed + 1, group) @ first


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


# -- one map for each mode, which a group has so many streams for
MODES = 4096


def separable_fields(drawn: Options) -> dict[str, Any]:
    return chosen(ORDERED, drawn.extra)


def separable_update(
    spec: Callable[[Options], sl.Spec],
) -> Callable[[Options, Net, Arrays], dict[str, numpy.ndarray]]:
    """Multiply every mode of every split by a matrix of its own, then the splits."""

    plan = planned(spec)

    def update(drawn: Options, net: Net, arrays: Arrays) -> dict[str, numpy.ndarray]:
        own, runs = separable_fields(drawn), []
        shared = own.pop("shared")
        for group, size in enumerate(group_sizes(drawn, plan(drawn).spec.groups)):
            tensors = []
            for k, tensor in enumerate(split_tensors(arrays, group)):
                after = plan(drawn).layout.groups[group].splits[k].shape
                first = (0 if shared else MODES * group) + k * len(after)
                each = [
                    matrices.fastfood(old, new, drawn.seed, first + mode, **own)
                    for mode, (old, new) in enumerate(zip(tensor.shape, after, strict=True))
                ]
                tensors.append(tensorly.tenalg.multi_mode_dot(tensor, each))
            runs.append(functools.reduce(numpy.kron, tensors).ravel()[:size])
        return cut(drawn, numpy.concatenate(runs))

    return update


def separable(drawn: Options) -> maps.Map:
    return maps.Separable(inner=maps.Fastfood(seed=drawn.seed, **separable_fields(drawn)))


def separable_row(
    name: str, spec: Callable[[Options], sl.Spec], sizes: st.SearchStrategy[int], example: Options
) -> Row:
    plan = planned(spec)
    return paper_row(
        name,
        spec,
        lambda drawn: plan(drawn).factor_shapes,
        separable_update(spec),
        lambda drawn, weight: {block: (block, same) for block in plan(drawn).blocks_of(weight)},
        options(sizes=sizes, rank=st.integers(1, 2), extra=st.integers(0, count(ORDERED) - 1)),
        example,
    )


def separable_lora(drawn: Options) -> sl.Spec:
    return sl.lora(drawn.rank, map=separable(drawn), ratio=0.3, alpha=drawn.alpha)


def separable_lorta(drawn: Options) -> sl.Spec:
    fields = {"fold": "aligned", "alpha": drawn.alpha}
    return sl.lorta(drawn.rank, map=separable(drawn), ratio=0.3, **fields)


def separable_lokr(drawn: Options) -> sl.Spec:
    return sl.lokr(drawn.rank, map=separable(drawn), ratio=0.1, scale=drawn.scale)


ROWS += [
    separable_row("lora-paper-separable", separable_lora, small, Options(UNLIKE, 1, extra=8)),
    separable_row(
        "lorta-paper-separable",
        separable_lorta,
        st.sampled_from([4, 6, 8]),
        Options(((6, 8), (4, 8)), 2, extra=0),
    ),
    separable_row(
        "lokr-paper-separable",
        separable_lokr,
        st.sampled_from([6, 9, 12]),
        Options(((12, 9), (6, 12)), 1, extra=8),
    ),
]


# -- methods of few numbers


def fourier_delta(drawn: Options, net: Net, arrays: Arrays) -> dict[str, numpy.ndarray]:
    found = {}
    for index, (name, shape) in enumerate(drawn.widths.items()):
        numbers = arrays[f"c:{index}"]
        normalize = NORMALIZE[0] if drawn.rank > 2 else None
        matrix = matrices.fourier(len(numbers), shape, drawn.seed, normalize=normalize)
        found[name] = drawn.scale * (matrix @ numbers).reshape(shape)
    return found


def fourierft(drawn: Options) -> sl.Spec:
    fixed = maps.Fourier(seed=drawn.seed, normalize="isometric" if drawn.rank > 2 else None)
    return sl.fourierft(drawn.extra, drawn.scale, map=fixed)


def did_update(drawn: Options, net: Net, arrays: Arrays) -> dict[str, numpy.ndarray]:
    found = {}
    for index, (name, shape) in enumerate(drawn.widths.items()):
        matrix = le_fastfood(drawn, len(arrays["theta"]), shape, index)
        number = arrays[f"lambda:{index}"] if "lambda:0" in arrays else 1.0
        found[name] = drawn.scale * number * (matrix @ arrays["theta"]).reshape(shape)
    return found


def le_fastfood(drawn: Options, before: int, shape: tuple[int, int], index: int) -> numpy.ndarray:
    """Return the projection of one weight, independent of the others'."""
    return matrices.fastfood(before, math.prod(shape), drawn.seed, index, order="le")


def nola_update(drawn: Options, net: Net, arrays: Arrays) -> dict[str, numpy.ndarray]:
    """Sum random matrices: ``B = sum_j beta_j B_j`` times ``A = sum_i alpha_i A_i``."""
    found = {}
    for index, (name, (rows, columns)) in enumerate(drawn.widths.items()):
        left, right = (
            matrices.gaussian(drawn.extra, width * drawn.rank, drawn.seed, 2 * index + side)
            for side, width in enumerate((rows, columns))
        )
        beta, alpha = arrays[f"beta:{index}"], arrays[f"alpha:{index}"]
        b = sum(x * m.reshape(rows, -1) for x, m in zip(beta, left.T, strict=True))
        a = sum(x * m.reshape(columns, -1).T for x, m in zip(alpha, right.T, strict=True))
        found[name] = drawn.scale * b @ a
    return found


def factors_of(drawn: Options, vector: numpy.ndarray) -> dict[str, numpy.ndarray]:
    """Cut LoRA's factors, B then Aᵀ of one weight after the other, and multiply them."""
    found, start = {}, 0
    for name, widths in drawn.widths.items():
        pair = []
        for width in widths:
            stop = start + width * drawn.rank
            pair.append(vector[start:stop].reshape(width, drawn.rank))
            start = stop
        found[name] = drawn.scale * pair[0] @ pair[1].T
    assert start == len(vector)
    return found


def unilora_update(drawn: Options, net: Net, arrays: Arrays) -> dict[str, numpy.ndarray]:
    total = drawn.rank * sum(map(sum, drawn.shapes))
    matrix = matrices.one_hot(drawn.extra, total, drawn.seed, 0, False, False)
    return factors_of(drawn, matrix @ arrays["theta"])


def inner_spec(drawn: Options) -> sl.Spec:
    outer = maps.Fastfood(seed=drawn.seed)
    inner = maps.Fastfood(seed=drawn.seed + 1, order="le", blocks="stacked")
    return lora_mapped(drawn, outer, factor_map=inner, factor_size=drawn.extra)


bare_plan = planned(lambda drawn: inner_spec(drawn).replace(factor_map=None, factor_size=None))


def inner_update(drawn: Options, net: Net, arrays: Arrays) -> dict[str, numpy.ndarray]:
    """Map one vector to all blocks, and the product of each group's to its entries."""
    bare = bare_plan(drawn)
    shapes = bare.factor_shapes
    total = sum(map(math.prod, shapes.values()))
    theta = arrays["theta"]
    fields = {"order": "le", "blocks": "stacked"}
    entries = matrices.fastfood(len(theta), total, drawn.seed + 1, **fields) @ theta
    blocks, start = {}, 0
    for block, shape in shapes.items():
        blocks[block] = entries[start : start + math.prod(shape)].reshape(shape)
        start += math.prod(shape)
    runs = []
    for group, size in enumerate(group_sizes(drawn, bare.spec.groups)):
        x = group_entries(blocks, group)
        runs.append(matrices.fastfood(len(x), size, drawn.seed) @ x)
    return cut(drawn, numpy.concatenate(runs))


def selection(drawn: Options) -> sl.Spec:
    """Pick rows i (do + 1) and columns j (di + 1) of the Kronecker product of two matrices."""
    do, di = drawn.shapes[0]
    positions = tuple(i * (do + 1) * di**2 + j * (di + 1) for i in range(do) for j in range(di))
    fields = {"rank": (drawn.rank, drawn.rank), "splits": 2, "fold": ((do, di), (do, di))}
    return sl.Spec(map=maps.Selection(positions=positions), scale=drawn.scale, **fields)


def loha_sizes(drawn: Options) -> Sizes:
    rank = drawn.rank
    return numbered(
        drawn,
        lambda do, di: {
            key: ((do, di)[place % 2], rank) for place, key in enumerate(("B0", "A0", "B1", "A1"))
        },
    )


def named_views(views: Views) -> Callable[[Options, str], Views]:
    return lambda drawn, name: {
        leaf: (f"{key}:{number_of(drawn, name)}" if key != "theta" else key, view)
        for leaf, (key, view) in views.items()
    }


few = st.integers(1, 4)
ROWS += [
    paper_row(
        "fourierft-paper",
        fourierft,
        lambda o: numbered(o, lambda do, di: {"c": (o.extra,)}),
        fourier_delta,
        named_views({"0.core": ("c", same)}),
        options(sizes=small, extra=few, rank=few),
        Options(UNLIKE, 3, extra=4),
    ),
    paper_row(
        "did-paper",
        lambda o: sl.did(o.extra, o.seed, scale=o.scale),
        lambda o: {"theta": (o.extra,)},
        did_update,
        named_views({"0.core": ("theta", same)}),
        options(sizes=small, extra=st.integers(1, 9)),
        Options(UNLIKE, extra=5),
    ),
    paper_row(
        "said-paper",
        lambda o: sl.said(o.extra, o.seed, scale=o.scale),
        lambda o: {"theta": (o.extra,)} | numbered(o, lambda do, di: {"lambda": (1,)}),
        did_update,
        named_views({"0.factor0": ("lambda", column), "0.factor1": ("theta", column)}),
        options(sizes=small, extra=st.integers(1, 9)),
        Options(UNLIKE, extra=5),
    ),
    paper_row(
        "nola-paper",
        lambda o: sl.nola(o.extra, o.rank, o.seed, alpha=o.alpha),
        lambda o: numbered(o, lambda do, di: {"beta": (o.extra,), "alpha": (o.extra,)}),
        nola_update,
        named_views({"0.factor0_theta": ("beta", same), "0.factor1_theta": ("alpha", same)}),
        options(sizes=small, extra=few, rank=st.integers(1, 8)),
        Options(UNLIKE, 2, extra=3),
    ),
    paper_row(
        "unilora-paper",
        lambda o: sl.unilora(o.extra, o.rank, o.seed, alpha=o.alpha),
        lambda o: {"theta": (o.extra,)},
        unilora_update,
        named_views({"0.theta": ("theta", same)}),
        options(sizes=small, extra=few, rank=st.integers(1, 8)),
        Options(UNLIKE, 2, extra=7),
    ),
    paper_row(
        "lora-paper-both_maps",
        inner_spec,
        lambda o: {"theta": (o.extra,)},
        inner_update,
        named_views({"0.theta": ("theta", same)}),
        options(sizes=small, extra=few, rank=st.integers(1, 2)),
        Options(UNLIKE, 2, extra=7),
    ),
    paper_row(
        "loha-paper-selection",
        selection,
        loha_sizes,
        per_weight(
            lambda shape, weight, own: (own["B0"] @ own["A0"].T) * (own["B1"] @ own["A1"].T)
        ),
        named_views(
            {f"{k}.factor{mode}": (f"{'BA'[mode]}{k}", same) for k in (0, 1) for mode in (0, 1)}
        ),
        options(sizes=st.integers(2, 4), one_shape=True),
        Options(((4, 3),) * 2, 2),
    ),
    kronecker_row("lokr-paper-fastfood", 0),
]
