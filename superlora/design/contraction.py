"""In which order the operands of a network are contracted, and what it costs. Integers only.

The order is found from shapes: by trying all for a few operands, by opt_einsum for many. Every step
of it is prepared as a transpose, a reshape and a matrix product, so that nothing is searched or
counted where arrays are at hand.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import opt_einsum

Labels = tuple[int, ...]

# The label of the tokens, whose number is known only where inputs are at hand.
TOKENS = -1
# Multiplications that a processor does while it moves one entry: the order of magnitude of CPUs
# and GPUs alike. It ranks ways to apply an update; no result depends on it.
BALANCE = 16
# Up to as many operands all orders are tried.
_SEARCHED_WHOLLY = 7


@dataclass(frozen=True)
class Cost:
    """What an expression costs, as a number that every token adds to.

    Attributes
    ----------
    multiplications, moved : int
        Multiplications, and entries that are read or written, however many tokens there are.
    each_multiplications, each_moved : int
        The same for every token.
    """

    multiplications: int = 0
    moved: int = 0
    each_multiplications: int = 0
    each_moved: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*map(operator.add, vars(self).values(), vars(other).values()))

    def __mul__(self, times: int) -> Cost:
        return Cost(*(times * number for number in vars(self).values()))

    def at(self, tokens: int) -> Cost:
        """Return the cost with so many tokens."""
        multiplied = self.multiplications + tokens * self.each_multiplications
        return Cost(multiplied, self.moved + tokens * self.each_moved)

    def of(self, tokens: int) -> int:
        """Return one number to compare ways by: multiplications, and moves in their terms."""
        return self.once + tokens * self.each

    @property
    def once(self) -> int:
        """That number of no tokens."""
        return self.multiplications + BALANCE * self.moved

    @property
    def each(self) -> int:
        """What every token adds to it."""
        return self.each_multiplications + BALANCE * self.each_moved


@dataclass(frozen=True)
class Arranged:
    """How an operand becomes a stack of matrices: transposed, reshaped, its last axes swapped."""

    axes: Labels | None
    shape: Labels | None
    swapped: Labels | None


@dataclass(frozen=True)
class Pair:
    """One contraction of two operands."""

    left: Arranged | None  # how the operand is arranged; None as it is
    right: Arranged | None
    # None for a matrix product. Else the two are multiplied entry by entry, and the product is
    # summed over these axes.
    summed: Labels | None
    turned: bool  # whether the right operand is the first of the matrix product
    shape: Labels | None  # what the result is reshaped to
    axes: Labels | None  # how it is transposed at last
    labels: Labels  # of the result
    adds: bool  # whether another array can be added to it: a product of two plain matrices


def pair(
    left: Labels,
    right: Labels,
    output: Labels,
    sizes: Mapping[int, int],
    *,
    exact: bool = False,
) -> Pair:
    """Prepare the contraction of two operands."""
    common = [label for label in left if label in right]
    batch = [label for label in common if label in output]
    summed = [label for label in common if label not in output]
    free = [[label for label in own if label not in common] for own in (left, right)]
    if not summed:
        one, other = (_spread(own, output, sizes) for own in (left, right))
        return Pair(one, other, (), False, None, None, tuple(output), False)
    if batch and not all(free):
        # As many matrix products of a single column would cost more than the passes over entries.
        order = left if len(left) >= len(right) else right
        one, other = (_spread(own, order, sizes) for own in (left, right))
        places = tuple(order.index(label) for label in summed)
        kept = tuple(label for label in order if label not in summed)
        axes = _axes(kept, output) if exact else None
        return Pair(one, other, places, False, None, axes, tuple(output) if axes else kept, False)
    orders = [(*batch, *free[turned], *free[1 - turned]) for turned in (0, 1)]
    # With the tokens in front, else as near to the order asked for as can be.
    turned = TOKENS in free[1]
    if orders[0] == tuple(output) or orders[1] == tuple(output):
        turned = orders[1] == tuple(output)
    elif TOKENS not in (*free[0], *free[1]):
        turned = _inversions(orders[1], output) < _inversions(orders[0], output)
    labels = orders[turned]
    arranged = (
        _arrange(left, batch, free[0], summed, sizes, columns=not turned),
        _arrange(right, batch, free[1], summed, sizes, columns=turned),
    )
    plain = len(free[0]) == 1 == len(free[1]) and len(batch) <= 1
    shape = None if plain else tuple(sizes[label] for label in labels)
    axes = _axes(labels, output) if exact else None
    labels = tuple(output) if axes else labels
    adds = not batch and axes is None
    return Pair(*arranged, None, turned, shape, axes, labels, adds)


def _inversions(labels: Sequence[int], wanted: Sequence[int]) -> int:
    places = [wanted.index(label) for label in labels]
    return sum(one > other for one, other in itertools.combinations(places, 2))


def _axes(labels: Sequence[int], wanted: Sequence[int]) -> Labels | None:
    found = tuple(labels.index(label) for label in wanted)
    return None if found == tuple(range(len(found))) else found


def _arranged(
    axes: Labels | None, shape: Labels | None, swapped: Labels | None = None
) -> Arranged | None:
    nothing = axes is None and shape is None and swapped is None
    return None if nothing else Arranged(axes, shape, swapped)


def _spread(labels: Labels, order: Sequence[int], sizes: Mapping[int, int]) -> Arranged | None:
    """Arrange an operand so that it broadcasts to the labels of `order`."""
    axes = _axes(labels, [label for label in order if label in labels])
    shape = tuple(sizes[label] if label in labels else 1 for label in order)
    return _arranged(axes, None if len(labels) == len(order) else shape)


def _arrange(
    labels: Labels,
    batch: Sequence[int],
    free: Sequence[int],
    summed: Sequence[int],
    sizes: Mapping[int, int],
    *,
    columns: bool,
) -> Arranged | None:
    """Arrange an operand as (batch, free, summed), or (batch, summed, free) if not `columns`."""
    first, second = (free, summed) if columns else (summed, free)
    groups = ([batch] if batch else []) + [list(first), list(second)]
    swapped = bool(first and second) and tuple(labels) == (*batch, *second, *first)
    if swapped:
        groups[-2:] = [list(second), list(first)]
    axes = None if swapped else _axes(labels, [label for group in groups for label in group])
    shape = tuple(_entries(group, sizes) for group in groups)
    unchanged = all(len(group) == 1 for group in groups)
    last = ((0, 2, 1) if batch else (1, 0)) if swapped else None
    return _arranged(axes, None if unchanged else shape, last)


def _entries(labels: Sequence[int], sizes: Mapping[int, int]) -> int:
    return -1 if TOKENS in labels else math.prod(sizes[label] for label in labels)


@dataclass(frozen=True)
class Step:
    """One contraction of a path."""

    left: int  # among the operands and the results of earlier steps
    right: int
    pair: Pair
    entries: int  # of the result
    each: int  # of every token


@dataclass(frozen=True)
class Contraction:
    """A network's contraction, prepared.

    Attributes
    ----------
    operands : tuple of tuples of int
        The labels of every operand.
    output : tuple of int
        Those of the result.
    sizes : dict of int to int
        Sizes of the labels.
    steps : tuple of Step
        In order; the last one gives the result, but for `axes`.
    labels : tuple of tuples of int
        Of every value: the operands and the results of the steps.
    axes : tuple of int, or None
        How the last value is transposed.
    cost : Cost
        Of the forward pass.
    largest : int
        Entries of the largest intermediate result, of one token.
    """

    operands: tuple[Labels, ...]
    output: Labels
    sizes: Mapping[int, int]
    steps: tuple[Step, ...]
    labels: tuple[Labels, ...]
    axes: Labels | None
    cost: Cost
    largest: int

    def __str__(self) -> str:
        terms = ",".join(map(letters, self.operands))
        known = [(label, size) for label, size in self.sizes.items() if label != TOKENS]
        listed = " ".join(f"{letters([label])}={size}" for label, size in known)
        return f"{terms}->{letters(self.output)}" + (f"  {listed}" if listed else "")

    @functools.cached_property
    def pulls(self) -> tuple[tuple[Pair, Pair], ...]:
        """For every step the contractions that give the gradients of its two operands."""
        found = []
        for index, step in enumerate(self.steps):
            left, right = self.labels[step.left], self.labels[step.right]
            own = self.labels[len(self.operands) + index]
            found.append(
                (
                    pair(own, right, left, self.sizes, exact=True),
                    pair(own, left, right, self.sizes, exact=True),
                )
            )
        return tuple(found)

    @functools.cached_property
    def cheap(self) -> Labels:
        """The results of steps that a backward pass keeps, as they cost more than to be read.

        Matrix products that are no larger than what they stand between: inputs and outputs, or the
        largest operand without tokens.
        """
        count = len(self.operands)
        ends = (_split(own, self.sizes)[1] for own in (self.operands[0], self.output))
        most = max(ends), max(_split(own, self.sizes)[0] for own in self.operands)
        return tuple(
            count + index
            for index, step in enumerate(self.steps[:-1])
            if step.pair.summed is None and step.each <= most[0] and step.entries <= most[1]
        )


def letters(labels: Sequence[int]) -> str:
    """Return labels as einsum writes them; the tokens are ``t``, which is no other label."""
    return "".join(
        "t" if label == TOKENS else opt_einsum.get_symbol(label + (label >= _T)) for label in labels
    )


_T = 19


def contract(
    operands: Sequence[Labels],
    output: Labels,
    sizes: Mapping[int, int],
    tokens: int = 0,
    frozen: frozenset[int] = frozenset(),
) -> Contraction:
    """Find the order of a network's contraction and prepare its steps."""
    known = {label: sizes[label] for own in operands for label in own if label != TOKENS}
    return _contract(tuple(operands), output, tuple(known.items()), tokens, frozen)


@functools.cache
def _contract(
    operands: tuple[Labels, ...],
    output: Labels,
    known: tuple[tuple[int, int], ...],
    tokens: int,
    frozen: frozenset[int],
) -> Contraction:
    sizes = {**dict(known), TOKENS: -1}
    values = list(operands)
    steps: list[Step] = []
    cost = Cost()
    current = list(range(len(operands)))

    for chosen in _path(operands, output, sizes, tokens, frozen):
        taken = [current[index] for index in sorted(chosen)]
        current = [index for place, index in enumerate(current) if place not in chosen]
        while len(taken) > 1:
            left, right = taken[:2]
            rest = [values[index] for index in (*current, *taken[2:])]
            kept = _kept(values[left], values[right], output, rest)
            found = pair(values[left], values[right], kept, sizes)
            steps.append(Step(left, right, found, *_split(found.labels, sizes)))
            cost += _cost(values[left], values[right], found.labels, sizes)
            taken[:2] = [len(values)]
            values.append(found.labels)
        current += taken
    (last,) = current
    return Contraction(
        operands,
        output,
        sizes,
        tuple(steps),
        tuple(values),
        _axes(values[last], output),
        cost,
        max((step.entries + step.each for step in steps), default=0),
    )


def _kept(left: Labels, right: Labels, output: Labels, rest: Sequence[Labels]) -> Labels:
    """Return the labels that a contraction of two operands keeps, first those of the output."""
    if not rest:
        return output
    needed = {*output, *(label for own in rest for label in own)}
    kept = dict.fromkeys(label for label in (*left, *right) if label in needed)
    # In the output's order, so that the last contraction is transposed no further.
    return tuple(sorted(kept, key=lambda own: output.index(own) if own in output else len(output)))


def _path(
    terms: Sequence[Labels],
    output: Labels,
    sizes: Mapping[int, int],
    tokens: int,
    frozen: frozenset[int],
) -> list[tuple[int, ...]]:
    real = {**sizes, TOKENS: max(1, tokens)}
    if len(terms) <= _SEARCHED_WHOLLY:
        return _least_path(terms, output, real, frozen)
    equation = ",".join(map(letters, terms)) + "->" + letters(output)
    shapes = [tuple(real[label] for label in own) for own in terms]
    path, _ = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="auto")
    return list(path)


def _least_path(
    terms: Sequence[Labels], output: Labels, sizes: Mapping[int, int], frozen: frozenset[int]
) -> list[tuple[int, ...]]:
    """Return the order that costs least: multiplications, and among equal ones moves."""
    # Every pair of parts of every subset of the terms is tried: opt_einsum's searches miss the best
    # order where a label stands in more than two operands, as in products with a diagonal core. An
    # entry of a product entry by entry counts as one that is moved. So does one of a matrix product
    # that must be transposed; where there are tokens, inputs would have to be instead. The
    # gradients count as well, of both parts but of what is frozen.
    count = len(terms)
    trained = sum(1 << place for place in range(count) if place not in frozen)
    kept: list[frozenset[int]] = []
    for subset in range(1 << count):
        inside, outside = set[int](), set(output)
        for place, own in enumerate(terms):
            (inside if subset >> place & 1 else outside).update(own)
        kept.append(frozenset(inside & outside))
    entries = [math.prod(sizes[label] for label in own) for own in kept]
    # Of every subset the cost, and the first of its two parts; subsets of it come before it.
    best = [(0, 0, 0)] * (1 << count)
    for subset in range(1, 1 << count):
        first = subset & -subset
        part = rest = subset ^ first
        found = []
        while part:
            part = (part - 1) & rest
            one, other = first | part, rest ^ part
            work = math.prod(sizes[label] for label in kept[one] | kept[other])
            if _is_entrywise(kept[one], kept[other], kept[subset]):
                work *= BALANCE
            elif TOKENS not in kept[subset] and _is_copied(kept[one], kept[other], output):
                work += BALANCE * entries[subset]
            work *= 1 + bool(one & trained) + bool(other & trained)
            moved = entries[one] + entries[other] + entries[subset]
            for side in (one, other):
                work, moved = work + best[side][0], moved + best[side][1]
            found.append((work, moved, one))
        if found:
            best[subset] = min(found)
    current = [1 << place for place in range(count)]
    path: list[tuple[int, ...]] = []

    def follow(subset: int) -> None:
        one = best[subset][2]
        if one:
            parts = one, subset ^ one
            for part in parts:
                follow(part)
            path.append(tuple(sorted(map(current.index, parts))))
            current[:] = [each for each in current if each not in parts] + [subset]

    follow(len(best) - 1)
    return path


def _is_entrywise(one: Set[int], other: Set[int], kept: Set[int]) -> bool:
    """Return whether two operands are multiplied entry by entry, as `pair` prepares them."""
    common = one & other
    return common <= kept or (bool(common & kept) and (one <= common or other <= common))


def _is_copied(one: Set[int], other: Set[int], output: Labels) -> bool:
    """Return whether a matrix product must be transposed to have the output's order."""
    owners = [(label in one) + 2 * (label in other) for label in output]
    runs = [owner for owner, _ in itertools.groupby(owner for owner in owners if owner)]
    return len(runs[runs[:1] == [3] :]) > 2 or 3 in runs[1:]


def _split(labels: Labels, sizes: Mapping[int, int]) -> tuple[int, int]:
    """Return the entries of a value, and those of every token."""
    count = math.prod(sizes[label] for label in labels if label != TOKENS)
    return (0, count) if TOKENS in labels else (count, 0)


def _cost(left: Labels, right: Labels, result: Labels, sizes: Mapping[int, int]) -> Cost:
    multiplied, each_multiplied = _split(tuple(dict.fromkeys((*left, *right))), sizes)
    entries = [_split(own, sizes) for own in (left, right, result)]
    moved, each_moved = (sum(side) for side in zip(*entries, strict=True))
    return Cost(multiplied, moved, each_multiplied, each_moved)
