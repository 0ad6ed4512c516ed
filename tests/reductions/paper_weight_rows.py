"""Papers whose formula is of one weight, or of one weight and blocks that all weights share."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import numpy
from hypothesis import strategies as st
from torch import Tensor

import superlora as sl
from tests.reductions.cases import Net, Options, options, same, transposed
from tests.reductions.paper import Arrays, Sizes, Views, paper_row, scaled
from tests.reductions.peft_rows import UNEQUAL


def per_weight(
    formula: Callable[..., numpy.ndarray],
) -> Callable[[Options, Net, Arrays], dict[str, numpy.ndarray]]:
    """Apply a formula of one weight's own arrays, which end in the weight's number."""

    def update(drawn: Options, net: Net, arrays: Arrays) -> dict[str, numpy.ndarray]:
        found = {}
        for index, (name, shape) in enumerate(drawn.widths.items()):
            own = {}
            for key, array in arrays.items():
                kind, _, number = key.partition(":")
                if number in ("", str(index)):
                    own[kind] = array
            weight = net.get_submodule(name).weight.detach().numpy()
            found[name] = drawn.scale * formula(shape, weight, own)
        return found

    return update


def numbered(drawn: Options, each: Callable[[int, int], Sizes]) -> Sizes:
    return {
        f"{key}:{index}": shape
        for index, widths in enumerate(drawn.shapes)
        for key, shape in each(*widths).items()
    }


def number_of(drawn: Options, name: str) -> int:
    return list(drawn.widths).index(name)


@functools.lru_cache
def divided(size: int, parts: int) -> tuple[int, ...]:
    """Find by trial the ascending factors of least sum."""
    tried = itertools.combinations_with_replacement(range(1, size + 1), parts)
    return min((found for found in tried if math.prod(found) == size), key=sum)


def per_split(drawn: Options, splits: int) -> list[list[tuple[int, int]]]:
    """List the splits of every weight, (outputs, inputs)."""
    return [
        list(zip(divided(rows, splits), divided(columns, splits), strict=True))
        for rows, columns in drawn.shapes
    ]


def kron_chain(_: object, weight: object, own: Arrays) -> numpy.ndarray:
    splits = len(own) // 2
    return functools.reduce(numpy.kron, [own[f"B{k}"] @ own[f"A{k}"] for k in range(splits)])


def singular(weight: numpy.ndarray, rank: int) -> tuple[numpy.ndarray, ...]:
    """Return the leading singular triplets, the largest entry of each left vector positive."""
    left, values, right = numpy.linalg.svd(weight, full_matrices=False)
    for column in range(rank):
        if left[numpy.argmax(numpy.abs(left[:, column])), column] < 0:
            left[:, column] *= -1
            right[column] *= -1
    return left[:, :rank], values[:rank], right[:rank]


def lora_xs_delta(_: object, weight: numpy.ndarray, own: Arrays) -> numpy.ndarray:
    left, values, right = singular(weight, len(own["R"]))
    return left @ numpy.diag(values) @ own["R"] @ right


def tinylora_delta(_: object, weight: numpy.ndarray, own: Arrays) -> numpy.ndarray:
    left, values, right = singular(weight, own["P"].shape[1])
    middle = sum(number * matrix for number, matrix in zip(own["v"], own["P"], strict=True))
    root = numpy.diag(numpy.sqrt(values))
    return left @ root @ middle @ root @ right


def vera_delta(shape: tuple[int, int], weight: object, own: Arrays) -> numpy.ndarray:
    rows, columns = shape
    wide = own["B"][:rows] @ numpy.diag(own["d"]) @ own["A"][:, :columns]
    return numpy.diag(own["b"]) @ wide


def shared_delta(shape: tuple[int, int], weight: object, own: Arrays) -> numpy.ndarray:
    rows, columns = shape
    return own["B"][:rows] @ own["A"][:, :columns]


def share_lora_sizes(which: str, drawn: Options) -> Sizes:
    widths = {"B": [do for do, _ in drawn.shapes], "A": [di for _, di in drawn.shapes]}
    found: Sizes = {}
    for key, each in widths.items():
        own = {key: max(each)} if key in which else {f"{key}:{i}": s for i, s in enumerate(each)}
        shapes = {k: (size, drawn.rank) for k, size in own.items()}
        found |= {k: shape[:: 1 if key == "B" else -1] for k, shape in shapes.items()}
    return found


def compacter_delta(_: object, weight: object, own: Arrays) -> numpy.ndarray:
    terms = sum(key.startswith("A") for key in own)
    return sum(
        numpy.kron(own[f"A{i}"], numpy.outer(own[f"s{i}"], own[f"t{i}"])) for i in range(terms)
    )


def compacter_sizes(drawn: Options) -> Sizes:
    terms = range(drawn.extra)
    found: Sizes = {f"A{term}": (2, 2) for term in terms}
    for term in terms:
        found |= numbered(drawn, lambda do, di, term=term: {f"s{term}": (do // 2,)})
        found |= numbered(drawn, lambda do, di, term=term: {f"t{term}": (di // 2,)})
    return found


def compacter_views(drawn: Options, name: str) -> Views:
    found: Views = {}
    for term in range(drawn.extra):
        found[f"{2 * term}.core"] = (f"A{term}", same)
        for mode, key in enumerate("st"):
            block = f"{key}{term}:{number_of(drawn, name)}"
            found[f"{2 * term + 1}.factor{mode}"] = (block, column)
    return found


def column(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(1)


def numbered_views(views: Views, shared: tuple[str, ...] = ()) -> Callable[..., Views]:
    """Name the arrays of one weight by its number, but those that all weights share."""
    return lambda drawn, name: {
        leaf: (key if key in shared else f"{key}:{number_of(drawn, name)}", view)
        for leaf, (key, view) in views.items()
    }


def composite(splits: int) -> st.SearchStrategy[Options]:
    sizes = st.sampled_from([8, 12, 16, 18, 27] if splits == 3 else [4, 6, 9, 12])
    return options(sizes=sizes, rank=st.integers(1, 2))


def lonkr_sizes(drawn: Options) -> Sizes:
    return {
        key: shape
        for index, splits in enumerate(per_split(drawn, 3))
        for k, (do, di) in enumerate(splits)
        for key, shape in (
            (f"B{k}:{index}", (do, drawn.rank)),
            (f"A{k}:{index}", (drawn.rank, di)),
        )
    }


def krona_sizes(drawn: Options) -> Sizes:
    return {
        f"X{k}:{index}": sizes
        for index, splits in enumerate(per_split(drawn, 2))
        for k, sizes in enumerate(splits)
    }


ROWS = [
    paper_row(
        "lonkr-paper",
        scaled(sl.lonkr, "rank"),
        lonkr_sizes,
        per_weight(kron_chain),
        lambda o, name: {
            block: (f"{key}{k}:{number_of(o, name)}", view)
            for k in range(3)
            for block, key, view in (
                (f"{k}.factor0", "B", same),
                (f"{k}.factor1", "A", transposed),
            )
        },
        composite(3),
        Options(((12, 18), (8, 12)), 2),
    ),
    paper_row(
        "krona-paper",
        scaled(sl.krona),
        krona_sizes,
        per_weight(lambda shape, weight, own: numpy.kron(own["X0"], own["X1"])),
        numbered_views({"0.core": ("X0", same), "1.core": ("X1", same)}),
        composite(2),
        Options(((12, 18), (8, 12))),
    ),
    paper_row(
        "lora_xs-paper",
        lambda o: sl.lora_xs(o.rank, alpha=o.alpha),
        lambda o: numbered(o, lambda do, di: {"R": (o.rank, o.rank)}),
        per_weight(lora_xs_delta),
        numbered_views({"0.core": ("R", same)}),
        options(),
        Options(UNEQUAL, 3),
    ),
    paper_row(
        "tinylora-paper",
        scaled(sl.tinylora, "rank", "extra"),
        lambda o: numbered(o, lambda do, di: {"v": (o.extra,), "P": (o.extra, o.rank, o.rank)}),
        per_weight(tinylora_delta),
        numbered_views({"0.factor0": ("v", lambda v: v.unsqueeze(0)), "0.core": ("P", same)}),
        options(extra=st.integers(1, 5)),
        Options(UNEQUAL, 2, extra=3),
        fixed=tuple(f"P:{index}" for index in range(3)),
    ),
    paper_row(
        "vera-paper",
        scaled(sl.vera, "rank"),
        lambda o: (
            {"B": (max(do for do, _ in o.shapes), o.rank)}
            | {"A": (o.rank, max(di for _, di in o.shapes))}
            | numbered(o, lambda do, di: {"b": (do,), "d": (o.rank,)})
        ),
        per_weight(vera_delta),
        numbered_views(
            {
                "0.factor0": ("B", same),
                "0.factor1": ("A", transposed),
                "0.core": ("d", same),
                "1.factor0": ("b", column),
            },
            shared=("A", "B"),
        ),
        options(),
        Options(UNEQUAL, 3),
        fixed=("B", "A"),
    ),
    paper_row(
        "tied_lora-paper",
        scaled(sl.tied_lora, "rank"),
        lambda o: (
            {"B": (max(do for do, _ in o.shapes), o.rank)}
            | {"A": (o.rank, max(di for _, di in o.shapes))}
            | numbered(o, lambda do, di: {"b": (do,), "d": (o.rank,)})
        ),
        per_weight(vera_delta),
        numbered_views(
            {
                "0.factor0": ("B", same),
                "0.factor1": ("A", transposed),
                "0.core": ("d", same),
                "1.factor0": ("b", column),
            },
            shared=("A", "B"),
        ),
        options(),
        Options(UNEQUAL, 3),
    ),
    paper_row(
        "dense-paper",
        scaled(sl.dense),
        lambda o: numbered(o, lambda do, di: {"delta": (do, di)}),
        per_weight(lambda shape, weight, own: own["delta"]),
        numbered_views({"0.core": ("delta", lambda delta: delta.reshape(-1))}),
        options(),
        Options(UNEQUAL),
    ),
    paper_row(
        "compacter-paper",
        lambda o: sl.Spec(
            rank=("full", 1), splits=2, terms=o.extra, tied=["0.core"], scale=o.scale
        ),
        compacter_sizes,
        per_weight(compacter_delta),
        compacter_views,
        options(sizes=st.sampled_from([4, 6, 10]), extra=st.integers(1, 3)),
        Options(((6, 4), (10, 6)), extra=3),
    ),
]
ROWS += [
    paper_row(
        f"share_lora-paper-{which}",
        scaled(sl.share_lora, "rank", which=which),
        functools.partial(share_lora_sizes, which),
        per_weight(shared_delta),
        numbered_views(
            {"0.factor0": ("B", same), "0.factor1": ("A", transposed)}, shared=tuple(which)
        ),
        options(),
        Options(UNEQUAL, 3),
    )
    for which in ("A", "B", "AB")
]
