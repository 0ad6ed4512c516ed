"""No row is a test that cannot fail: a broken version of our side fails every check."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import numpy
import pytest
import torch
from torch import Tensor

import superlora as sl
from superlora import maps
from superlora.algebra import form
from superlora.algebra.form import run_term
from superlora.design.network import Factorisation, Term
from superlora.maps import permutations
from tests.reductions.cases import (
    Case,
    Ours,
    check_count,
    check_forward,
    check_gradients,
    check_updates,
)
from tests.reductions.rows import ROWS

pytestmark = pytest.mark.filterwarnings("ignore:no Kronecker structure")
every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


@functools.cache
def example(name: str) -> Case:
    """Return one case of a row for all tests, which works out once what the peer gives."""
    return ROWS[name].build(ROWS[name].example)


def backwards(values: Tensor) -> Tensor:
    return values.reshape(-1).flip(0).reshape(values.shape)


def misread(values: Tensor) -> Tensor:
    """Read a block's memory in the other order of its modes."""
    return values.permute(*reversed(range(values.dim()))).reshape(values.shape)


def negated(values: Tensor) -> Tensor:
    return -values


def changed_scale(spec: sl.Spec, factor: float) -> sl.Spec:
    if spec.alpha is not None:
        return spec.replace(alpha=spec.alpha * factor)
    return spec.replace(scale=spec.scaling * factor)


def reversed_kronecker(product: Factorisation) -> tuple[Term, ...]:
    """The last split's digit of every mode is the most significant one."""
    splits = product.layout.specs[product.group].splits
    modes = [
        product.digits[first : first + splits] for first in range(0, len(product.digits), splits)
    ]
    output = tuple(label for mode in modes for digit in reversed(mode) for label in digit)
    return tuple(
        product.contracted([], [*own, *last], output) for own, last, _ in product.products()
    )


def squared(term: Term, arrays: Sequence[Any], first: Sequence[Any] = ()) -> Any:
    """Every entry of a product is multiplied by itself."""
    return run_term(term, arrays, first) ** 2


def is_even(spec: sl.Spec) -> bool:
    """Whether all blocks are one vector's, two in each product: -theta gives the same update."""
    return spec.factor_map is not None and spec.factor_scope == "all"


def checks_of(ours: Ours, block: str) -> list[Callable[[Case, Ours], None]]:
    """Return the checks that a wrong block must fail.

    The update is linear in every block, whose own gradient thus does not depend on it, and a
    sum over the groups that a weight is cut from.
    """
    name = next(name for name in ours.plan.shapes if block in ours.plan.blocks_of(name))
    group = block.partition(".")[0]
    others = {
        other
        for other in ours.plan.blocks_of(name)
        if other in ours.plan.factor_shapes and other != block
        if other.startswith(f"{group}.") or other.partition(".")[2] in ours.plan.spec.tied
    }
    return [check_updates, check_forward, *([check_gradients] if others else [])]


def has_one_reading(values: Tensor, wrong: Callable[[Tensor], Tensor]) -> bool:
    """Whether a block is a vector, or for another order of entries a number."""
    most = {misread: max(values.shape), backwards: 1}
    return wrong in most and values.numel() == most[wrong]


@contextlib.contextmanager
def failing(what: str) -> Iterator[None]:
    try:
        yield
    except AssertionError:
        return
    pytest.fail(f"{what} was not noticed")


@every_row
@pytest.mark.parametrize("factor", [0.5, -1.0])
def test_a_wrong_scale_is_noticed(row, factor):
    case = example(row.name)
    ours = case.ours(changed_scale(case.spec, factor))
    for check in (check_updates, check_forward, check_gradients):
        with failing(f"{check.__name__}: a scale times {factor}"):
            check(case, ours)


@every_row
@pytest.mark.parametrize("wrong", [backwards, misread, negated])
def test_a_wrong_block_is_noticed(row, wrong):
    case = example(row.name)
    ours = case.ours()
    tried = 0
    for block, take in ours.takes.items():
        values = take.values()
        if has_one_reading(values, wrong) or torch.equal(wrong(values), values):
            continue
        tried += 1
        ours.put(block, wrong(values))
        if wrong is negated and is_even(case.spec):
            check_updates(case, ours)
            check_forward(case, ours)
            continue
        for check in checks_of(ours, block):
            with failing(f"{check.__name__}: {block} {wrong.__name__}"):
                check(case, ours)
        ours.put(block, values)
    assert tried or all(has_one_reading(take.values(), wrong) for take in ours.takes.values())


@every_row
def test_two_blocks_changed_for_each_other_are_noticed(row):
    case = example(row.name)
    ours = case.ours()
    blocks = [block for block in ours.plan.blocks_of("layers.a") if block in ours.takes]
    if len(blocks) == 1:
        trained = ("dense", "lora_xs", "fourierft", "waveft", "c3a", "did", "unilora", "miss")
        assert row.preset in trained or is_even(case.spec)
    for one, other in itertools.pairwise(blocks):
        first, second = (ours.takes[block].values() for block in (one, other))
        entries = torch.cat([second.reshape(-1), first.reshape(-1)])
        ours.put(one, entries[: first.numel()].reshape(first.shape))
        ours.put(other, entries[first.numel() :].reshape(second.shape))
        for check in (check_updates, check_forward):
            with failing(f"{check.__name__}: {one} and {other} changed for each other"):
                check(case, ours)
        ours.put(one, first)
        ours.put(other, second)


@every_row
def test_another_product_is_noticed(row):
    case = example(row.name)
    if case.spec.splits == 1:
        assert row.preset not in ("loha", "lokr", "krona", "lonkr", "vera")
        return
    patched = mock.patch.object(Factorisation, "closed", reversed_kronecker)
    # Hadamard products commute, and so do those that a selection takes.
    if case.spec.combine == "hadamard" or isinstance(case.spec.map, maps.Selection):
        patched = mock.patch.object(form, "run_term", squared)
    with patched, failing("another product"):
        check_updates(case, case.ours())


@every_row
def test_a_wrong_number_of_parameters_is_noticed(row):
    case = example(row.name)
    ours = case.ours()
    spec = case.spec.replace(terms=case.spec.terms + 1)
    if is_even(case.spec):  # as many numbers for any number of blocks
        spec = case.spec.replace(factor_size=case.spec.factor_size + 1)
    plan = sl.Plan(spec, ours.plan.shapes)
    with mock.patch.object(ours, "plan", plan), failing("one more number"):
        check_count(case, ours)


# -- the fixed maps

Change = Callable[[maps.Map], maps.Map]


def inside(change: Change) -> Change:
    """Apply a change to a map and to the maps that it is made of."""

    def changed(fixed: maps.Map) -> maps.Map:
        own = {}
        for item in dataclasses.fields(fixed):
            value = getattr(fixed, item.name)
            if isinstance(value, maps.Map):
                own[item.name] = changed(value)
            elif item.name == "parts":
                own[item.name] = tuple(map(changed, value))
        return change(dataclasses.replace(fixed, **own) if own else fixed)

    return changed


def with_maps(spec: sl.Spec, change: Change) -> sl.Spec:
    """Change every map of a spec, and of its overrides."""

    def fields(found: dict[str, Any]) -> dict[str, Any]:
        kept = {key: found.get(key) for key in ("map", "factor_map")}
        return {key: inside(change)(fixed) for key, fixed in kept.items() if fixed is not None}

    own = {pattern: dict(changes) for pattern, changes in spec.overrides}
    overrides = {pattern: {**changes, **fields(changes)} for pattern, changes in own.items()}
    return spec.replace(
        **fields({k: getattr(spec, k) for k in ("map", "factor_map")}), overrides=overrides
    )


def other(field: str, *pairs: tuple[object, object]) -> Change:
    """Change a field of any map that has it to what the pairs say."""
    known = {one: two for pair in pairs for one, two in (pair, pair[::-1])}

    def change(fixed: maps.Map) -> maps.Map:
        if field not in {item.name for item in dataclasses.fields(fixed)}:
            return fixed
        value = getattr(fixed, field)
        return dataclasses.replace(fixed, **{field: known[value]}) if value in known else fixed

    return change


def other_seed(fixed: maps.Map) -> maps.Map:
    seeded = isinstance(fixed, maps.Map) and hasattr(fixed, "seed")
    return dataclasses.replace(fixed, seed=fixed.seed + 1) if seeded else fixed


def rolled(fixed: maps.Map) -> maps.Map:
    """Move given positions by one place."""
    for field in ("positions", "frequencies"):
        places = getattr(fixed, field, None)
        if places:
            return dataclasses.replace(fixed, **{field: places[1:] + places[:1]})
    return fixed


def reordered(fixed: maps.Map) -> maps.Map:
    if isinstance(fixed, maps.Composed):
        return dataclasses.replace(fixed, first=fixed.second, second=fixed.first)
    if isinstance(fixed, maps.BlockDiagonal):
        return dataclasses.replace(fixed, parts=fixed.parts[::-1])
    return fixed


def first_mode_alone(fixed: maps.Map) -> maps.Map:
    separable = isinstance(fixed, maps.Separable)
    return maps.Separable(inner=fixed.inner, modes=(0,)) if separable else fixed


CHANGES: dict[str, Change] = {
    "seed": other_seed,
    "order": other("order", ("paper", "le")),
    "blocks": other("blocks", ("single", "stacked")),
    "values": other("values", ("normal", "sign")),
    "normalize": other("normalize", ("isometric", None)),
    "tiled": other("tiled", (True, False)),
    "signed": other("signed", (True, False)),
    "structured": other("structured", (True, False)),
    "scope": other("scope", ("group", "all")),
    "shared": other("shared", (True, False)),
    "along": other("along", ("inputs", "outputs")),
    "places": rolled,
    "order of parts": reordered,
    "modes": first_mode_alone,
}
GIVEN = [
    f"{method}-peft{kind}"
    for method in ("fourierft", "waveft")
    for kind in ("", "-conv1d", "-patterns")
]
# Rows in whose example a change has no effect, or cannot be made, and why.
EXEMPT = {
    "seed": dict.fromkeys(GIVEN, "its places are given"),
    "shared": {
        **dict.fromkeys(GIVEN, "its places are given"),
        "lora-paper-shuffle-all": "one permutation for all groups at once",
        "lorta-paper-fastfood": "one group",
        "lokr-paper-fastfood": "one group",
        "lorta-paper-separable": "one group",
        "unilora-paper": "one vector",
    },
    "scope": {"dense-paper-composed": "a part of another map is of one group"},
    "order of parts": {"dense-paper-composed": "a shuffle makes no larger vector"},
}


def mapped_rows() -> list[Any]:
    found = []
    for name, row in ROWS.items():
        spec = example(name).spec
        for what, change in CHANGES.items():
            if with_maps_differs(spec, change) and name not in EXEMPT.get(what, ()):
                found.append(pytest.param(row, change, id=f"{name}-{what}"))
    return found


def with_maps_differs(spec: sl.Spec, change: Change) -> bool:
    try:
        return with_maps(spec, change) != spec
    except ValueError:
        return True


@pytest.mark.parametrize(("row", "change"), mapped_rows())
def test_another_map_is_noticed(row, change):
    case = example(row.name)
    spec = with_maps(case.spec, change)
    for check in (check_updates, check_forward, check_gradients):
        with failing(f"{check.__name__}: another map"):
            check(case, case.ours(spec))


def no_signs(seed: int, stream: int, start: int, stop: int) -> numpy.ndarray:
    return numpy.ones(stop - start, numpy.int8)


def transposed_rows(*arguments: Any, inverse: bool = False) -> numpy.ndarray:
    return permutations.permutation_rows(*arguments, inverse=not inverse)


def kinds_of(spec: sl.Spec) -> set[str]:
    """Name the kinds of maps in a spec, those with signs twice."""
    found: set[str] = set()

    def note(fixed: maps.Map) -> maps.Map:
        name = type(fixed).__name__
        found.add(name)
        if isinstance(fixed, maps.Fastfood) or getattr(fixed, "signed", False):
            found.add("signs")
        if isinstance(fixed, maps.Fastfood) or getattr(fixed, "tiled", False):
            found.add("rows")
        return fixed

    with_maps(spec, note)
    return found


def patched(name: str, wrong: Any) -> Any:
    """Replace what all seeded maps draw with."""
    return mock.patch(f"superlora.maps._seeded.{name}", wrong)


BROKEN: dict[str, tuple[str, Callable[[], Any]]] = {
    "no signs": ("signs", lambda: patched("signs", no_signs)),
    "the permutation transposed": ("rows", lambda: patched("permutation_rows", transposed_rows)),
    "the shuffle transposed": (
        "Shuffle",
        lambda: mock.patch.multiple(
            permutations.Permutation,
            forward=permutations.Permutation.inverse,
            inverse=permutations.Permutation.forward,
        ),
    ),
    "the scale missing": ("Fastfood", lambda: mock.patch("superlora.maps.fastfood.scale_of", one)),
    "a Gaussian scale missing": (
        "Gaussian",
        lambda: mock.patch("superlora.maps.gaussian.scale_of", one),
    ),
}


def one(normalize: str | None, before: int, size: int) -> float:
    return 1.0


def broken_rows() -> list[Any]:
    found = []
    for name, row in ROWS.items():
        kinds = kinds_of(example(name).spec)
        for what, (kind, patch) in BROKEN.items():
            if kind in kinds:
                found.append(pytest.param(row, patch, id=f"{name}-{what}"))
    return found


@pytest.mark.parametrize(("row", "patch"), broken_rows())
def test_a_broken_map_is_noticed(row, patch):
    case = row.build(row.example)  # whose maps have kept nothing
    with patch():
        expected = [case.updates, case.outputs, case.gradients]  # of the peer, as it is
        assert all(map(len, expected))
        for check in (check_updates, check_forward, check_gradients):
            with failing(f"{check.__name__}: a broken map"):
                check(case, case.ours())
