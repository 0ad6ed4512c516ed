"""Factors whose updates come nearest to given ones."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from scipy.sparse.linalg import LinearOperator, eigsh, lsqr

from superlora._backend import Array, backend_of, check_floating, from_numpy, widened
from superlora.algebra.decompositions import is_randomised, start_group
from superlora.algebra.form import vectors, weight_delta
from superlora.algebra.init import each_factor
from superlora.algebra.least_squares import Blocks, Problem, Target
from superlora.design.layout import Layout
from superlora.errors import some
from superlora.maps import Map
from superlora.random import normal

# How good a start is: another one may end better, none does, or it is what is sought.
_UNSURE, _ALONE, _OPTIMAL = range(3)
# Sweeps after which the best of several starts is chosen.
_TRIED = 20
# Of the largest entry of updates, whose squares are summed.
_SMALLEST = 1e-120
# A relative error that is rounding.
_NOTHING = 1e-14
# Streams of the numbers by which maps are tried and random starts are drawn.
_PROBE, _STARTS = 1 << 61, 1 << 60


@dataclass(frozen=True)
class FitReport:
    """How near fitted factors come.

    Attributes
    ----------
    error : float
        Frobenius norm of what is left of all updates over that of the updates.
    errors : dict of str to float
        The same for each weight; 0 where both are, and infinite where the update is.
    seconds : float
        Wall time of the fit.
    history : dict of int to tuple of float
        For each part that is fitted on its own, by its first group, the error at the start and
        after every sweep. It never rises.
    converged : bool
        Whether every part stopped because a sweep did not lower its error any more.

    Examples
    --------
    >>> import numpy as np, superlora as sl
    >>> plan = sl.Plan(sl.lora(rank=1), {"q": (3, 2)})
    >>> _, report = plan.fit({"q": np.array([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])})
    >>> report.errors["q"] == report.error, report.converged
    (True, True)
    >>> round(report.error, 6)  # 3 of the singular values 4 and 3 is left, of a norm of 5
    0.6
    """

    error: float
    errors: dict[str, float]
    seconds: float
    history: dict[int, tuple[float, ...]]
    converged: bool

    def __str__(self) -> str:
        width = max(map(len, self.errors))
        lines = [f"{name:<{width}}  {error:.4g}" for name, error in self.errors.items()]
        sweeps = max(map(len, self.history.values())) - 1
        ended = "" if self.converged else ", not converged"
        lines.append(
            f"{'all':<{width}}  {self.error:.4g} in {self.seconds:.2g} s, {sweeps} sweeps{ended}"
        )
        return "\n".join(["relative error of each update", *lines])


@dataclass(frozen=True)
class Settings:
    """When a fit ends, and what it starts from."""

    restarts: int
    iterations: int
    tolerance: float
    seed: int


def fit(
    layout: Layout, deltas: Mapping[str, Array], frozen: Mapping[str, Array], settings: Settings
) -> tuple[dict[str, Array], FitReport]:
    """Fit all parts of a plan, one after the other."""
    began = time.perf_counter()
    like = widened(next(iter(deltas.values())))
    held = {name: as_numpy(block) for name, block in frozen.items()}
    found = {name: block for name, block in frozen.items() if name in layout.factor_shapes}
    history: dict[int, tuple[float, ...]] = {}
    made: Blocks = {}
    converged = True
    for groups in parts(layout, held):
        names = _inputs(layout, groups)
        free = [name for name in names if name not in held]
        values = {name: held[name] for name in names if name in held}
        targets, floor = _targets(layout, groups, deltas)
        problem = Problem(layout, targets, free, values, floor)
        size = problem.size()
        if size == 0:  # what is drawn makes no update, and can be trained
            history[groups[0]] = (0.0,)
            values |= dict(each_factor(layout, settings.seed, {*layout.factor_shapes} - {*free}))
        else:
            errors, ended = _fitted(problem, size, settings)
            history[groups[0]] = tuple(errors)
            converged &= ended
            values = problem.values
        made |= values
        found |= {name: from_numpy(values[name], like) for name in free}
    squares = _left(layout, deltas, made)
    left, whole = (math.sqrt(sum(own)) for own in zip(*squares.values(), strict=True))
    errors_of = {name: _ratio(*map(math.sqrt, squares[name])) for name in layout.shapes}
    ordered = {name: found[name] for name in layout.factor_shapes}
    seconds = time.perf_counter() - began
    return ordered, FitReport(_ratio(left, whole), errors_of, seconds, history, converged)


def _ratio(left: float, whole: float) -> float:
    return left / whole if whole else math.inf if left else 0.0


def as_numpy(array: Array) -> numpy.ndarray:
    """Return an array of any library in double precision."""
    wide = widened(array)
    return numpy.asarray(backend_of(wide).to_numpy(wide), dtype=numpy.float64)


def check_updates(
    deltas: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> None:
    """Refuse updates of other shapes, that are no numbers of one library, or all zero."""
    largest = 0.0
    first: Array = None
    for name, delta in deltas.items():  # which may be made, or read, one by one
        check_floating(f"deltas[{name!r}]", delta)
        got = tuple(delta.shape)
        if shapes is not None and got != shapes[name]:
            raise ValueError(f"deltas[{name!r}] must have shape {shapes[name]}: got {got}")
        first = delta if first is None else first
        backend_of(first, delta)
        values = as_numpy(delta)
        bad = ~numpy.isfinite(values)
        if bad.any():
            place = numpy.unravel_index(int(bad.argmax()), values.shape)
            raise ValueError(
                f"deltas[{name!r}] must be finite: got {values[place]} at {tuple(map(int, place))}"
            )
        largest = max(largest, float(numpy.abs(values).max()))
    if not largest:
        raise ValueError("deltas must differ from zero somewhere: all of them are zero")
    if not _SMALLEST < largest < 1 / _SMALLEST:
        raise ValueError(f"deltas must have squares that are numbers: got entries of {largest}")


def checked_deltas(layout: Layout, deltas: Mapping[str, Array]) -> None:
    """Refuse updates that are not those of a plan, or that it cannot have."""
    if not isinstance(deltas, Mapping):
        raise TypeError(f"deltas must map names to arrays: got {type(deltas).__name__}")
    for which, names in (
        ("lacks", [name for name in layout.shapes if name not in deltas]),
        ("has also", [str(name) for name in deltas if name not in layout.shapes]),
    ):
        if names:
            raise ValueError(
                f"deltas must have the plan's weights: it {which} {some(map(repr, names))}"
            )
    check_updates(deltas, {name: axes.shape for name, axes in layout.axes.items()})
    unscaled = [name for name in layout.shapes if layout.scaling(name) == 0]
    if unscaled:
        raise ValueError(
            f"scale must not be 0 where updates are fitted: it is for {some(map(repr, unscaled))}"
        )


def checked_frozen(layout: Layout, frozen: Mapping[str, Array], like: Array) -> None:
    """Refuse held blocks that the plan lacks, or of other shapes, and ones that are missing."""
    if not isinstance(frozen, Mapping):
        raise TypeError(f"frozen must map names to arrays: got {type(frozen).__name__}")
    for name, block in frozen.items():
        if name not in layout.input_shapes:
            raise ValueError(
                f"frozen must hold blocks of the plan: got {name!r}; it has "
                f"{some(map(repr, layout.input_shapes))}"
            )
        check_floating(f"frozen[{name!r}]", block)
        if name in layout.factor_shapes:  # it is returned with the others
            backend_of(like, block)
        expected, got = layout.input_shapes[name], tuple(block.shape)
        if got != expected:
            raise ValueError(f"frozen[{name!r}] must have shape {expected}: got {got}")
        if not numpy.isfinite(as_numpy(block)).all():
            raise ValueError(f"frozen[{name!r}] must be finite: it has NaN or inf")
    missing = [name for name in layout.frozen if name not in frozen]
    if missing:
        raise ValueError(
            f"frozen must hold {some(map(repr, missing))}, which the spec freezes: Plan.frozen "
            "makes them, singular vectors from the weights, but for stored blocks, which are yours"
        )


# --- which groups are fitted together, and to what


def parts(layout: Layout, held: Iterable[str]) -> list[list[int]]:
    """Return the groups that must be fitted together: what is trained, or a map, joins them."""
    held = {*held}
    first = list(range(len(layout.groups)))

    def root(group: int) -> int:
        while first[group] != group:
            first[group] = group = first[first[group]]
        return group

    owner: dict[str, int] = {}
    for group in first.copy():
        joined = [layout.joint(group).start]
        for name in _inputs(layout, [group]):
            if name not in held:
                joined.append(owner.setdefault(name, group))
        for other in joined:
            low, high = sorted((root(group), root(other)))
            first[high] = low
    found: dict[int, list[int]] = {}
    for group in range(len(first)):
        found.setdefault(root(group), []).append(group)
    return list(found.values())


def _inputs(layout: Layout, groups: Sequence[int]) -> list[str]:
    """Return the names of what some groups' tensors are made from."""
    inner, blocks = layout.inner, layout.blocks_of_groups(groups)
    return list(dict.fromkeys(inner[own].name if own in inner else own for own in blocks))


def _targets(
    layout: Layout, groups: Sequence[int], deltas: Mapping[str, Array]
) -> tuple[list[Target], float]:
    """Return what groups should be, and the squared error that no tensor avoids."""
    targets: list[Target] = []
    floor = 0.0
    for first in dict.fromkeys(layout.joint(group).start for group in groups):
        joint, scale = layout.joint(first), layout.specs[first].scaling
        vectors, masks = zip(
            *(group_entries(layout, group, deltas, scale) for group in joint), strict=True
        )
        if layout.in_place(first):
            ((vector, seen),) = zip(vectors, masks, strict=True)
            targets.append(_plain(layout, first, vector, seen, scale**2))
            continue
        fixed, seen = layout.maps[first], numpy.concatenate(masks)
        wanted, before = numpy.concatenate(vectors), layout.joint_sizes(first)[0]
        gain = _isometry(fixed, before, len(wanted)) if seen.all() else 0.0
        if not gain:
            mask = None if seen.all() else seen
            largest = _largest(fixed, before, len(wanted))
            targets.append(Target(joint, fixed, wanted, mask, scale**2, largest))
            continue
        # F^T F is a multiple of 1: the tensors are compared themselves.
        entries = fixed.adjoint(wanted, before) / gain
        floor += scale**2 * max(0.0, float(wanted @ wanted - gain * (entries @ entries)))
        sizes = [len(entries)] if len(joint) == 1 else [layout.groups[own].size for own in joint]
        cuts = numpy.split(entries, numpy.cumsum(sizes)[:-1])
        for group, part in zip(joint, cuts, strict=True):
            seen = numpy.ones(len(part), bool)
            targets.append(_plain(layout, group, part, seen, scale**2 * gain))
    return targets, floor


def _plain(
    layout: Layout, group: int, vector: numpy.ndarray, seen: numpy.ndarray, weight: float
) -> Target:
    """Return the target of a group whose tensor is compared itself; what a cover crops is free."""
    more = math.prod(layout.groups[group].fold) - len(vector)
    if more:
        vector, seen = numpy.pad(vector, (0, more)), numpy.pad(seen, (0, more))
    return Target([group], None, vector, None if seen.all() else seen, weight)


def group_entries(
    layout: Layout, group: int, deltas: Mapping[str, Array], scale: float = 1.0
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return a group's vector, without the scale, and which of its entries some weight has."""
    vector = numpy.zeros(layout.groups[group].size)
    seen = numpy.zeros(len(vector), bool)
    for name, start, piece in layout.grouping.contents[group]:
        entries = as_numpy(deltas[name]).reshape(-1)[start : start + piece.stop - piece.start]
        vector[piece.start : piece.stop] = entries / scale
        seen[piece.start : piece.stop] = True
    return vector, seen


def _isometry(fixed: Map, before: int, size: int) -> float:
    """Return c where F^T F is c times 1, and 0 for other maps."""
    # A vector drawn at random is an eigenvector of nothing else.
    probe = normal(_PROBE, 0, (before,))
    found = fixed.adjoint(fixed.apply(probe, size), before)
    gain = float(probe @ found) / float(probe @ probe)
    same = numpy.linalg.norm(found - gain * probe) <= 1e-10 * numpy.linalg.norm(found)
    return gain if same else 0.0


def _operator(fixed: Map, before: int, size: int) -> LinearOperator:
    return LinearOperator(
        (size, before),
        matvec=lambda x: fixed.apply(x.reshape(-1), size),
        rmatvec=lambda y: fixed.adjoint(y.reshape(-1), before),
        dtype=float,
    )


def _largest(fixed: Map, before: int, size: int) -> float:
    """Return a number that is hardly above the largest eigenvalue of F^T F."""
    if before == 1:
        return float(fixed.apply(numpy.ones(1), size) @ fixed.apply(numpy.ones(1), size))
    operator = _operator(fixed, before, size)
    probe = normal(_PROBE, 0, (before,))
    found = eigsh(operator.H @ operator, k=1, v0=probe, tol=1e-3, return_eigenvectors=False)
    return 1.01 * float(found[0])


# --- one part


def _fitted(problem: Problem, size: float, settings: Settings) -> tuple[list[float], bool]:
    """Fit one part from one or several starts, of which the best is gone on with."""
    best: tuple[list[float], Blocks] | None = None
    for number in range(settings.restarts):
        problem.damping = {}
        good = _start(problem, number, settings.seed)
        errors = [problem.error() / size]
        if good == _OPTIMAL:
            _balance(problem)
            return errors, True
        if good == _UNSURE:
            _improve(problem, size, errors, _TRIED, settings.tolerance)
        if best is None or errors[-1] < best[0][-1]:
            best = errors, dict(problem.values)
        if good == _ALONE or errors[-1] < _NOTHING:
            break
    assert best is not None
    errors, problem.values = best
    ended = _improve(problem, size, errors, settings.iterations, settings.tolerance)
    _balance(problem)
    return errors, ended


def _improve(
    problem: Problem, size: float, errors: list[float], sweeps: int, tolerance: float
) -> bool:
    """Sweep until a sweep does not lower the error any more; return whether that came."""
    for _ in range(sweeps):
        if errors[-1] < _NOTHING:
            return True
        before = dict(problem.values)
        problem.sweep()
        error = problem.error() / size
        if error > errors[-1]:  # by rounding
            problem.values = before
            return True
        errors.append(error)
        if errors[-2] - error <= tolerance * error:
            return True
    return False


def _start(problem: Problem, number: int, seed: int) -> int:
    """Give a part its first values; return how good a start they are."""
    layout, values = problem.layout, problem.values
    good = _OPTIMAL if len(problem.networks) == 1 else _ALONE
    # What one vector makes is not linear in it: a start far off would take many steps.
    count = sum(len(target.wanted) for target in problem.targets)
    unit = (problem.size() / count**0.5) ** 0.5 if layout.inner else 1.0
    for index, name in enumerate(problem.trained):
        drawn = normal(seed, _STARTS + (number << 32) + index, layout.input_shapes[name])
        values[name] = drawn * unit
    if not problem.trained:
        return _OPTIMAL
    if len(problem.trained) == 1 and not layout.inner:
        return _ALONE  # a linear problem
    if number:  # there is another start only where the first was unsure
        return _UNSURE
    free = {*problem.trained}
    short = seed % 2**32  # more bits TensorLy does not take
    for target in problem.targets:
        wanted = target.wanted
        if target.map is not None:
            wanted = _least_squares(target.map, wanted, layout.joint_sizes(target.groups[0])[0])
        for group, tensor in _tensors(layout, target, wanted):
            blocks = [block for term in layout.term_blocks(group) for block in term]
            own = all(len({use.group for use in problem.uses[block]}) == 1 for block in blocks)
            if not own or not free.issuperset(blocks):
                good = _UNSURE
                continue
            # What is not compared starts at zero, near which there may be a bad place.
            if target.seen is not None:
                good = _UNSURE
            good = min(good, _quality(layout, group), _OPTIMAL if target.map is None else _ALONE)
            item, count = layout.groups[group], layout.specs[group].splits
            found = start_group(
                item.splits, count, layout.specs[group].combine, tensor, short, _pull(layout, group)
            )
            for index, parts_ in enumerate(found):
                values |= {layout.block(group, index, leaf): own for leaf, own in parts_.items()}
    return good


def _quality(layout: Layout, group: int) -> int:
    """Return how good the decompositions of a group's tensor are."""
    item, own = layout.groups[group], layout.specs[group]
    splits = item.splits
    dense = [split.core == "full" and not any(split.factored) for split in splits]
    if layout.maps[group].mapped(len(item.fold)):
        return _ALONE if len(splits) == 1 and splits[0].core != "identity" else _UNSURE
    if own.splits == 2 and own.combine == "kronecker" and all(dense):
        sizes = [math.prod(split.shape) for split in splits[:2]]
        return _ALONE if is_randomised(sizes, own.terms) else _OPTIMAL
    if own.terms > 1 or own.combine == "hadamard" or own.splits > 2:
        return _UNSURE
    if own.splits > 1:
        return _ALONE
    (split,) = splits
    if all(dense):
        return _OPTIMAL
    if split.core == "full" or (split.core != "train" and len(split.sizes) == 2):
        # A stationary point of the fit, if all singular vectors are made.
        several = len(split.sizes) > 2
        return _ALONE if several or is_randomised(split.sizes, split.ranks[0]) else _OPTIMAL
    return _ALONE if split.core == "train" else _UNSURE


def _least_squares(fixed: Map, wanted: numpy.ndarray, before: int) -> numpy.ndarray:
    """Return the entries that a map takes nearest to a vector."""
    operator = _operator(fixed, before, len(wanted))
    found: numpy.ndarray = lsqr(operator, wanted)[0]
    return found


def _tensors(
    layout: Layout, target: Target, entries: numpy.ndarray
) -> Iterable[tuple[int, numpy.ndarray]]:
    """Yield the folded tensors that some entries are, of all groups of a target."""
    start = 0
    for group in target.groups:
        item = layout.groups[group]
        count = len(entries) if len(target.groups) == 1 else item.size
        part = entries[start : start + count]
        start += count
        yield group, numpy.pad(part, (0, math.prod(item.fold) - count)).reshape(item.fold)


def _pull(layout: Layout, group: int) -> Any:
    """Return what takes a split's tensor to that before the map of single modes."""
    fixed, item = layout.maps[group], layout.groups[group]
    order = len(item.fold)

    def pulled(index: int, tensor: numpy.ndarray) -> numpy.ndarray:
        split = item.splits[index]
        for mode in fixed.mapped(order):
            identity = numpy.eye(split.sizes[mode])
            matrix = fixed.map_mode(identity, 0, index * order + mode, split.shape[mode])
            tensor = numpy.tensordot(numpy.linalg.pinv(matrix), tensor, axes=(1, mode))
            tensor = numpy.moveaxis(tensor, 0, mode)
        return tensor

    return pulled


def _balance(problem: Problem) -> None:
    """Give the trained blocks of every product equal norms, where no other product has them."""
    for group in problem.networks:
        for term in problem.layout.term_blocks(group):
            blocks = [block for block in term if block in problem.trained]
            if any(len(problem.uses[block]) > 1 for block in blocks):
                continue
            norms = [float(numpy.linalg.norm(problem.values[block])) for block in blocks]
            if len(blocks) > 1 and min(norms) > 0:
                mean = math.exp(sum(map(math.log, norms)) / len(norms))
                for block, norm in zip(blocks, norms, strict=True):
                    problem.values[block] = problem.values[block] * (mean / norm)


def _left(
    layout: Layout, deltas: Mapping[str, Array], values: Blocks
) -> dict[str, tuple[float, float]]:
    """Return for every weight the squares of what is left of its update, and of the update."""
    vector = vectors(layout, values, whole=True)
    found = {}
    for name in layout.shapes:
        delta = as_numpy(deltas[name]).reshape(-1)
        made = weight_delta(layout, values, name, layout.scaling(name), vector)
        left = delta - made.reshape(-1)
        found[name] = float(left @ left), float(delta @ delta)
    return found
