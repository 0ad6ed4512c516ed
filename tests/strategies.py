"""Hypothesis strategies: weights, specs that fit them, and factors; and two maps of our own."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

import numpy
from hypothesis import reject
from hypothesis import strategies as st

import superlora as sl
from superlora._backend import backend_of, from_numpy
from superlora.design.fold_shape import divisors
from tests.oracles import integers_in

Shapes = dict[str, tuple[int, int]]

widths = st.integers(1, 12)


@dataclasses.dataclass(frozen=True)
class Mixing(sl.maps.Map):
    """A dense random matrix, which mixes all entries; `matrix` is its definition."""

    seed: int = 0

    def matrix(self, before: int, size: int) -> numpy.ndarray:
        return numpy.random.default_rng(self.seed).standard_normal((size, before))

    def apply(self, x: Any, size: int) -> Any:
        matrix = from_numpy(self.matrix(x.shape[0], size), like=x)
        return backend_of(x).tensordot(matrix, x, axes=([1], [0]))

    def adjoint(self, y: Any, size: int) -> Any:
        matrix = from_numpy(self.matrix(size, y.shape[0]), like=y)
        return backend_of(y).tensordot(matrix, y, axes=([0], [0]))


@dataclasses.dataclass(frozen=True)
class Permuting(sl.maps.Map):
    """A fixed permutation, tiled where there are more entries after it than before."""

    seed: int = 0

    def _sources(self, before: int, size: int) -> numpy.ndarray:
        return numpy.resize(numpy.random.default_rng(self.seed).permutation(before), size)

    def matrix(self, before: int, size: int) -> numpy.ndarray:
        return numpy.eye(before)[self._sources(before, size)]

    def apply(self, x: Any, size: int) -> Any:
        return x[self._sources(x.shape[0], size)]

    def adjoint(self, y: Any, size: int) -> Any:
        matrix = from_numpy(self.matrix(size, y.shape[0]), like=y)
        return backend_of(y).tensordot(matrix, y, axes=([0], [0]))


def make_plan(spec: sl.Spec, shapes: Mapping[str, tuple[int, int]]) -> sl.Plan:
    """Make a plan; splits that have size 1 in a mode are no surprise here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no Kronecker structure")
        return sl.Plan(spec, shapes)


def draw_factors(plan: sl.Plan, seed: int = 0) -> dict[str, numpy.ndarray]:
    """Draw dense float64 blocks, frozen ones too, none of them zero."""
    generator = numpy.random.default_rng(seed)
    shapes = plan.layout.block_shapes
    return {name: generator.standard_normal(shape) for name, shape in shapes.items()}


@st.composite
def weight_shapes(
    draw: st.DrawFn, one_width: bool = False, one_shape: bool = False, multiple: int = 1
) -> Shapes:
    """Draw one to three layers of one or two weights, of widths 1 to 12."""
    columns = widths if multiple == 1 else st.integers(1, 12 // multiple).map(multiple.__mul__)
    common = (draw(widths), draw(columns))
    shapes = {}
    for layer in range(draw(st.integers(1, 3))):
        for part in draw(st.sampled_from(["q", "qv"])):
            rows = common[0] if one_shape else draw(widths)
            width = common[1] if one_shape or one_width else draw(columns)
            shapes[f"blocks.{layer}.{part}"] = (rows, width)
    return shapes


def bounds_of(total: int, groups: int, cut: str) -> list[int]:
    """Return where `groups` groups of `total` entries begin and end, padding included."""
    if cut == "pad":
        return [index * math.ceil(total / groups) for index in range(groups + 1)]
    parts = numpy.array_split(numpy.arange(total), groups)
    return list(itertools.accumulate(map(len, parts), initial=0))


@st.composite
def _integer_groups(draw: st.DrawFn, total: int, cut: str, divisor: int = 1) -> int:
    """Draw a number of groups, each of some entries and cut at multiples of `divisor`."""
    allowed = []
    for groups in range(1, min(total, 7) + 1):
        bounds = bounds_of(total, groups, cut)
        if bounds[-2] < total and all(bound % divisor == 0 for bound in bounds):
            allowed.append(groups)
    return draw(st.sampled_from(allowed))


@st.composite
def _designs(
    draw: st.DrawFn, mapped: bool, kinds: tuple[str, ...]
) -> tuple[dict[str, Any], Shapes]:
    """Draw weights, and the fields of a spec that decide the groups and their folds."""
    kind = draw(st.sampled_from(kinds))
    cut = draw(st.sampled_from(["even", "pad"]))
    order = draw(st.integers(1, 5))
    groups: Any = draw(st.sampled_from(["weight", "layer", "integer"]))
    divisor = 1
    if kind == "natural":
        shapes = draw(weight_shapes())
        groups = "weight"
    elif kind == "stack":
        order = draw(st.sampled_from([2, 3]))
        shapes = draw(weight_shapes(one_width=True, one_shape=order == 3))
        rows, columns = next(iter(shapes.values()))
        divisor = columns if order == 2 else rows * columns
        if order == 3:
            cut = "even"
    elif kind == "aligned":
        order = max(order, 2)
        divisor = draw(st.sampled_from([2, 3, 4, 6]))
        shapes = draw(weight_shapes(multiple=divisor))
    else:
        shapes = draw(weight_shapes(one_shape=kind == "explicit"))
        if kind == "explicit":
            groups = draw(st.sampled_from(["weight", "integer"]))
    total = sum(map(math.prod, shapes.values()))
    if groups == "integer":
        groups = draw(_integer_groups(total, cut, divisor))
    fields = {"order": order, "groups": groups, "cut": cut, "fold": kind}
    if mapped:
        fields["map"] = draw(st.sampled_from([Mixing(1), Permuting(2)]))
        fields["ratio"] = draw(st.sampled_from([1.0, 0.5, 0.3]))
    if kind == "explicit":
        fields["fold"] = draw(_explicit_folds(fields, shapes))
    return fields, shapes


def _trimmed(size: int, rest: list[int]) -> tuple[int, ...]:
    """Return a fold of `size` entries that ends in `rest`, with no slice to spare."""
    fold = [size, *rest]
    for mode in range(len(fold)):
        fold[mode] = math.ceil(size / math.prod(fold[mode + 1 :]))
        if fold[mode] > 1:
            break
    return tuple(fold)


@st.composite
def _explicit_folds(draw: st.DrawFn, fields: dict[str, Any], shapes: Shapes) -> tuple[int, ...]:
    """Draw a fold that covers every group and has no slice to spare in any."""
    ratio = fields.get("ratio", 1.0)
    total = sum(map(math.prod, shapes.values()))
    count = len(shapes) if fields["groups"] == "weight" else fields["groups"]
    sizes = numpy.diff(bounds_of(total, count, fields["cut"]))
    before = [math.ceil(ratio * int(size)) for size in sizes]
    rest = [draw(st.integers(1, 4)) for _ in range(fields["order"] - 1)]
    if _trimmed(min(before), rest) != _trimmed(max(before), rest):
        # One fold does not serve both sizes that an even cut makes.
        fields["groups"] = 1
        before = [math.ceil(ratio * total)]
    return _trimmed(before[0], rest)


@st.composite
def _ranks(draw: st.DrawFn, fields: dict[str, Any], groups: tuple[Any, ...]) -> Any:
    """Draw a rank that the splits of `groups` allow: an integer, "full", or nested."""
    order, splits = fields["order"], fields["splits"]
    most = 3 if order <= 3 else 2
    form = draw(st.sampled_from(["integer", "split", "mode", "full"]))
    if splits == 1 and form == "split":
        form = "mode"
    if form == "integer":
        return draw(st.integers(1, 5 if order <= 2 else most))
    if form == "full":
        return "full"
    ranks: list[Any] = []
    for index in range(splits):
        if splits > 1 and (form == "split" or draw(st.booleans())):
            ranks.append(draw(st.one_of(st.integers(1, most), st.just("full"))))
            continue
        least = [min(group.splits[index].sizes[mode] for group in groups) for mode in range(order)]
        if order == 1:
            ranks.append((draw(st.sampled_from([1, "full"])),))
        elif fields["core"] == "identity":
            bound = min(most, *least) if order == 2 else most
            ranks.append((draw(st.integers(1, bound)),) * order)
        else:
            ranks.append(
                tuple(
                    draw(st.one_of(st.integers(1, min(most, size)), st.just("full")))
                    for size in least
                )
            )
    return tuple(ranks)


@st.composite
def plans(draw: st.DrawFn, mapped: bool = False, kinds: tuple[str, ...] | None = None) -> sl.Plan:
    """Draw a plan with a fold of these kinds; if `mapped`, a map moves its entries."""
    if kinds is None:
        own = () if mapped else ("natural", "stack", "aligned")
        kinds = ("balanced", "explicit", *own)
    fields, shapes = draw(_designs(mapped, kinds))
    fields["core"] = draw(st.sampled_from([None, "identity", "full"]))
    # A prime mode cannot be split: take as many splits as there are factors.
    for splits in range(draw(st.integers(1, 4)), 0, -1):
        fields["splits"] = splits
        try:
            groups = make_plan(sl.Spec(**{**fields, "rank": "full"}), shapes).layout.groups
            break
        except ValueError as error:
            if splits == 1 or "splits must leave every split" not in str(error):
                raise
    fields["rank"] = draw(_ranks(fields, groups))
    if len(set(integers_in(fields["rank"]))) == 1 and draw(st.booleans()):
        fields["alpha"] = draw(st.sampled_from([1, 16.0]))
    else:
        fields["scale"] = draw(st.sampled_from([None, 0.5, -3]))
    return make_plan(sl.Spec(**fields), shapes)


CORES = (None, "identity", "diagonal", "full")
SOURCES = ("random", "ones", "stored")  # singular vectors need weights


@st.composite
def _nested(draw: st.DrawFn, fold: tuple[int, ...], splits: int) -> tuple[tuple[int, ...], ...]:
    """Draw the sizes of every split of a fold."""
    sizes = []
    for _ in range(splits - 1):
        split = tuple(draw(st.sampled_from(divisors(mode))) for mode in fold)
        fold = tuple(mode // size for mode, size in zip(fold, split, strict=True))
        sizes.append(split)
    return (*sizes, fold)


@st.composite
def _extended_rank(draw: st.DrawFn, fields: dict[str, Any]) -> Any:
    """Draw a rank for splits of orders of their own; a Tucker rank may not fit and be refused."""
    small = st.integers(1, 2)
    orders = fields["order"]
    orders = orders if isinstance(orders, tuple) else (orders,) * fields["splits"]
    each = [
        draw(
            st.one_of(
                st.integers(1, 5 if order <= 2 else 2),
                st.just("full"),
                small.map(lambda rank, order=order: (rank if order > 1 else 1,) * order),
                st.tuples(*[st.one_of(small, st.just("full"))] * order),
            )
        )
        for order in orders
    ]
    return draw(st.sampled_from([tuple(each), draw(st.integers(1, 4)), "full"]))


@st.composite
def _blocks(draw: st.DrawFn, plan: sl.Plan) -> dict[str, Any]:
    """Draw which blocks of a plan are tied and which are frozen."""
    leaves = sorted(
        {
            f"{index % own.splits}.{leaf}"
            for own, group in zip(plan.layout.specs, plan.layout.groups, strict=True)
            for index, split in enumerate(group.splits)
            for leaf in split.block_shapes
        }
    )
    some = st.lists(st.sampled_from(leaves), unique=True, max_size=2)
    frozen = {block: draw(st.sampled_from(SOURCES)) for block in draw(some)}
    return {"tied": draw(some), "frozen": frozen}


@st.composite
def _overrides(draw: st.DrawFn, shapes: Shapes) -> dict[str, dict[str, Any]]:
    """Draw other fields for some weights, by whole name, by end, or by an expression."""
    name = draw(st.sampled_from(sorted(shapes)))
    patterns = [re.escape(name), name[-1], r"[01]\.q", ".*2.*", "q|v"]
    changes: list[dict[str, Any]] = [
        {"scale": -0.5},
        {"alpha": 3, "rank": 2},
        {"rank": "full"},
        {"terms": 2},
        {"groups": "weight", "fold": "balanced"},
        {"groups": 2, "fold": "balanced", "order": 2, "rank": 2, "splits": 1, "core": None},
        {},
    ]
    chosen = draw(st.lists(st.sampled_from(patterns), unique=True, max_size=2))
    return {pattern: draw(st.sampled_from(changes)) for pattern in chosen}


@st.composite
def extended_plans(draw: st.DrawFn) -> sl.Plan:
    """Draw a plan of any field at all; what cannot be is refused in words, and drawn anew."""
    mapped = draw(st.booleans())
    own = () if mapped else ("natural", "stack", "aligned")
    fields, shapes = draw(_designs(mapped, ("balanced", "explicit", *own)))
    splits = fields["splits"] = draw(st.integers(1, 3))
    fields["combine"] = draw(st.sampled_from(["kronecker", "hadamard"]))
    fields["terms"] = draw(st.integers(1, 3))
    fields["dense_from"] = draw(st.sampled_from(["rank", "half"]))
    fields["core"] = draw(
        st.one_of(st.sampled_from(CORES), st.tuples(*[st.sampled_from(CORES)] * splits))
    )
    if splits > 1 and draw(st.booleans()):
        orders = [draw(st.integers(1, fields["order"])) for _ in range(splits)]
        orders[draw(st.integers(0, splits - 1))] = fields["order"]
        fields["order"] = tuple(orders)
    if splits > 1 and fields["combine"] == "kronecker":
        fields["first_split"] = draw(st.one_of(st.none(), st.integers(1, 6)))
        if isinstance(fields["fold"], tuple) and draw(st.booleans()):
            fields["fold"] = draw(_nested(fields["fold"], splits))
    fields["rank"] = draw(_extended_rank(fields))
    fields["scale"] = draw(st.sampled_from([None, 0.5, -3]))
    try:
        plan = make_plan(sl.Spec(**fields), shapes)
        fields |= draw(_blocks(plan))
        fields["overrides"] = draw(_overrides(shapes))
        return make_plan(sl.Spec(**fields), shapes)
    except ValueError as error:
        if not re.search(r" must .*(: got | has | matched none )", str(error)):
            raise  # in no words of ours
        reject()


@st.composite
def problems(draw: st.DrawFn, kind: str = "plain") -> tuple[sl.Plan, dict[str, Any]]:
    """Draw a plan with float64 factors: "plain", "mapped", or "extended"."""
    plan = draw(extended_plans() if kind == "extended" else plans(kind == "mapped"))
    return plan, draw_factors(plan, draw(st.integers(0, 9)))
