"""Least squares on the networks of some groups, one block after the other.

With all blocks but one held, a group's tensor is linear in this block, and the derivative for the
block is the network without it. So the normal equations of a block are small networks themselves.
Where they are not, as behind a map that mixes a group's entries, the products with the derivative
and its adjoint are enough for LSQR (Paige and Saunders 1982).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy
from scipy.sparse.linalg import LinearOperator, lsqr

from superlora._backend import backend_of
from superlora.algebra.contract import run
from superlora.algebra.form import form, run_term, source_array, source_arrays, take, with_blocks
from superlora.design.contraction import Labels, contract
from superlora.design.layout import Layout
from superlora.design.network import Network, Source, Term, group_network
from superlora.maps import Map

Blocks = dict[str, numpy.ndarray]
Tensors = dict[int, numpy.ndarray]

_NUMPY = backend_of(numpy.empty(0))
# Steps of LSQR for one block; a later sweep goes on from there.
_STEPS = 60
# Tries to damp a step of all blocks that one vector makes, until the error falls.
_DAMPINGS = 12


@dataclass
class Target:
    """What the tensors of some groups should be, maybe behind a map."""

    groups: Sequence[int]
    map: Map | None  # of the groups' entries; None where they are compared themselves
    wanted: numpy.ndarray  # the vector of the entries that are compared, 0 where they are not
    seen: numpy.ndarray | None  # which entries are compared; None for all
    weight: float = 1.0  # of the squared error
    gain: float = 1.0  # at least the largest eigenvalue of F^T F


@dataclass
class Use:
    """One place of a block in the network of a group."""

    target: int
    group: int
    term: int
    place: int  # among the term's operands


@dataclass
class Problem:
    """Groups that share what is trained, what they should be, and the present values.

    Attributes
    ----------
    layout : Layout
        What lies where.
    targets : list of Target
        Every group is in one.
    trained : list of str
        Names of what may change, in the order in which it is solved for.
    values : dict of str to numpy.ndarray
        Blocks and vectors by name, frozen ones too.
    """

    layout: Layout
    targets: list[Target]
    trained: list[str]
    values: Blocks
    floor: float = 0.0  # of the squared error
    damping: dict[str, float] = field(default_factory=dict)

    @functools.cached_property
    def networks(self) -> dict[int, Network]:
        """The network of every group's tensor."""
        groups = (group for target in self.targets for group in target.groups)
        return {group: group_network(self.layout, group) for group in groups}

    @functools.cached_property
    def uses(self) -> dict[str, list[Use]]:
        """Where every block is used."""
        found: dict[str, list[Use]] = {}
        for index, target in enumerate(self.targets):
            for group in target.groups:
                for number, term in enumerate(self.terms(group)):
                    for place, _ in enumerate(term.operands):
                        use = Use(index, group, number, place)
                        found.setdefault(self.source(use).block, []).append(use)
        return found

    @functools.cached_property
    def blocks_of(self) -> dict[str, list[str]]:
        """The blocks that are made of what is trained."""
        inner = self.layout.inner
        found: dict[str, list[str]] = {name: [] for name in self.trained}
        for block in self.uses:
            name = inner[block].name if block in inner else block
            if name in found:
                found[name].append(block)
        return found

    def terms(self, group: int) -> Sequence[Term]:
        """Return the products that are summed to a group's tensor."""
        return self.networks[group].runs[0].boxes[0]

    def source(self, use: Use) -> Source:
        """Return what an operand is taken of."""
        network = self.networks[use.group]
        return network.sources[self.terms(use.group)[use.term].operands[use.place].source]

    def arrays(self, group: int, values: Mapping[str, numpy.ndarray]) -> list[numpy.ndarray]:
        """Return what the operands of a group's network are slices of."""
        return source_arrays(self.layout, values, self.networks[group].sources)

    # --- the error

    def tensor(
        self, group: int, values: Mapping[str, numpy.ndarray] | None = None
    ) -> numpy.ndarray:
        """Return a group's tensor, raveled."""
        values = self.values if values is None else values
        formed: numpy.ndarray = form(self.networks[group], self.arrays(group, values))
        return formed.reshape(-1)

    def compared(self, target: Target, tensors: Mapping[int, numpy.ndarray]) -> numpy.ndarray:
        """Return the entries that a target compares, of the groups' raveled tensors."""
        if target.map is None:
            (group,) = target.groups
            found = tensors[group]
        elif len(target.groups) == 1:
            found = target.map.apply(tensors[target.groups[0]], len(target.wanted))
        else:
            sizes = [self.layout.groups[group].size for group in target.groups]
            parts = [
                tensors[group][:size] for group, size in zip(target.groups, sizes, strict=True)
            ]
            found = target.map.apply(numpy.concatenate(parts), len(target.wanted))
        return found if target.seen is None else numpy.where(target.seen, found, 0.0)

    def residuals(self, values: Mapping[str, numpy.ndarray] | None = None) -> list[numpy.ndarray]:
        """Return for every target the root of its weight times what is left of it."""
        found = []
        for target in self.targets:
            tensors = {group: self.tensor(group, values) for group in target.groups}
            left = target.wanted - self.compared(target, tensors)
            found.append(left * target.weight**0.5)
        return found

    def error(self) -> float:
        """Return the root of the squared error of all targets."""
        return math.sqrt(self.floor + sum(float(own @ own) for own in self.residuals()))

    def size(self) -> float:
        """Return the error of no update at all."""
        squares = (float(own.wanted @ own.wanted) * own.weight for own in self.targets)
        return math.sqrt(self.floor + sum(squares))

    # --- one block or vector after the other

    def sweep(self) -> None:
        """Solve for each of what is trained in turn."""
        wanted: Tensors = {}
        for target in self.targets:
            wanted |= self._majorised(target)
        parts = [part for target in self.targets for part in (target.map, target.seen)]
        # LSQR solves for one block; steps along the gradient come near slowly.
        linear = len(self.trained) == 1 and any(part is not None for part in parts)
        for name in self.trained:
            if self._is_closed(name) and not linear:
                self.values[name] = self._solved(name, wanted)
            else:
                self.step(name)

    def _majorised(self, target: Target) -> Tensors:
        """Return tensors, distances from which bound the error of the groups of a target."""
        # Entries that are not compared are taken as they are. Behind a map, a step along the
        # gradient leads to these tensors: what is nearer to them than the present ones lowers the
        # error, if the step is no longer than the largest eigenvalue of F^T F allows.
        if target.map is None and target.seen is None:
            return {target.groups[0]: target.wanted}
        tensors = {group: self.tensor(group) for group in target.groups}
        left = self.pulled(target, target.wanted - self.compared(target, tensors))
        return {group: tensors[group] + left[group] / target.gain for group in target.groups}

    def _is_closed(self, name: str) -> bool:
        """Return whether the normal equations are formed, in no more memory than the tensors."""
        if name in self._mapped or name not in self.uses:
            return False
        entries = sum(math.prod(self.networks[use.group].shape) for use in self.uses[name])
        shape = self.values[name].shape
        _, summed, apart = self._axes(name)
        equations = math.prod(shape[axis] for axis in apart)
        return bool(equations * math.prod(shape[axis] for axis in summed) ** 2 <= entries)

    def _others(self, use: Use) -> set[int]:
        """Return the labels of a term's other operands."""
        operands = enumerate(self.terms(use.group)[use.term].operands)
        return {label for place, own in operands if place != use.place for label in own.labels}

    @functools.cached_property
    def _mapped(self) -> set[str]:
        """The blocks whose modes some map takes."""
        return {
            block
            for block, uses in self.uses.items()
            if any(self.source(use).modes for use in uses)
        }

    def _axes(self, name: str) -> tuple[list[int], list[int], list[int]]:
        """Return a block's axes that are modes, those that are summed, and modes that count."""
        # Equations differ along the last: other operands have them too, as in Hadamard products,
        # or some group uses a part.
        shape = self.values[name].shape
        uses = self.uses[name]
        labels = [self._labels(use) for use in uses]
        outputs = [{*self.terms(use.group)[use.term].contraction.output} for use in uses]
        others = [self._others(use) for use in uses]
        summed = [
            a
            for a in range(len(shape))
            if any({*own[a]} - out for own, out in zip(labels, outputs, strict=True))
        ]
        kept = [a for a in range(len(shape)) if a not in summed]
        apart = [
            a
            for a in kept
            if any({*own[a]} & rest for own, rest in zip(labels, others, strict=True))
            or any(self.source(use).shape[a] < shape[a] for use in uses)
        ]
        return kept, summed, apart

    def _labels(self, use: Use) -> list[Labels]:
        """Return the labels of every axis of a block, those of size 1 left out."""
        term = self.terms(use.group)[use.term]
        sizes, left = term.contraction.sizes, list(term.operands[use.place].labels)
        found = []
        for size in self.source(use).shape:
            own: list[int] = []
            while math.prod(sizes[label] for label in own) < size:
                own.append(left.pop(0))
            found.append(tuple(own))
        return found

    def _without(
        self, use: Use, arrays: Sequence[numpy.ndarray]
    ) -> Iterator[tuple[Labels, numpy.ndarray]]:
        """Yield labels and arrays of a term's other operands."""
        operands = self.terms(use.group)[use.term].operands
        for place, own in enumerate(operands):
            if place != use.place:
                yield own.labels, take(_NUMPY, arrays[own.source], own)

    def _solved(self, name: str, wanted: Mapping[int, numpy.ndarray]) -> numpy.ndarray:
        """Return a block that solves its normal equations."""
        shape = self.values[name].shape
        kept, summed, apart = self._axes(name)
        sums = [shape[axis] for axis in summed]
        right = numpy.zeros([*(shape[axis] for axis in kept), *sums])
        gram = numpy.zeros([*(shape[axis] if axis in apart else 1 for axis in kept), *sums, *sums])
        for use in self.uses[name]:
            sizes = self.terms(use.group)[use.term].contraction.sizes
            output = self.terms(use.group)[use.term].contraction.output
            weight = self.targets[use.target].weight * self.targets[use.target].gain
            arrays = self.arrays(use.group, self.values)
            others = list(self._without(use, arrays))
            labels = self._labels(use)
            modes, ranks = [labels[axis] for axis in kept], [labels[axis] for axis in summed]
            tensor = wanted[use.group].reshape([sizes[label] for label in output])
            for number, term in enumerate(self.terms(use.group)):
                if number != use.term:
                    tensor = tensor - run_term(term, arrays)
            found = _contracted([(output, tensor), *others], itertools.chain(*modes, *ranks), sizes)
            # A group may use the leading slices of a block that it shares.
            used = self.source(use).shape
            part = tuple(slice(used[axis]) for axis in (*kept, *summed))
            right[part] += weight * found.reshape(right[part].shape)
            rows = [slice(used[axis] if axis in apart else None) for axis in kept]
            part = (*rows, *(slice(used[axis]) for axis in (*summed, *summed)))
            gram[part] += weight * _gram(others, (modes, ranks), output, sizes)
        order = [*kept, *summed]
        old = self.values[name].transpose(order)
        return _normal_solution(gram, right, old, len(kept)).transpose(numpy.argsort(order))

    # --- through maps, and where normal equations are large

    def step(self, name: str) -> None:
        """Change what one name holds by a solution of the linearised problem, maybe damped."""
        residual = numpy.concatenate(self.residuals())
        derivative = self._derivative(name)
        old, best = self.values[name], float(residual @ residual)
        nonlinear = self._is_nonlinear(name)
        damp = self.damping.get(name, 1e-3) * nonlinear
        # Damping is of the size of the derivative, whatever the size of the updates is.
        now = old.reshape(-1)
        size = float(numpy.linalg.norm(derivative @ now) / (numpy.linalg.norm(now) or 1.0)) or 1.0
        for _ in range(_DAMPINGS if nonlinear else 1):  # Levenberg and Marquardt
            change, *_, left = lsqr(
                derivative, residual, damp * size, iter_lim=_STEPS, atol=1e-12, btol=1e-12
            )[:4]
            self.values[name] = old + change.reshape(old.shape)
            # The share that is gained of what the linearised problem promises.
            share = (best - (self.error() ** 2 - self.floor)) / ((best - left**2) or 1.0)
            if not nonlinear or share > 0.1:
                damp *= 0.25 if share > 0.75 else 4.0 if share < 0.25 else 1.0
                # Not without end, or the tries after a bad step would not reach a good one.
                self.damping[name] = max(damp, 1e-4)
                return
            damp = damp * 4
        self.values[name] = old

    def _is_nonlinear(self, name: str) -> bool:
        """Return whether some product has two of the blocks that are made of one name."""
        blocks = self.blocks_of[name]
        terms = [(use.group, use.term) for block in blocks for use in self.uses[block]]
        return len(set(terms)) < len(terms)

    def _derivative(self, name: str) -> LinearOperator:
        """Return the derivative of all residuals, but for their sign, for one name."""
        arrays = {group: self.arrays(group, self.values) for group in self.networks}
        rows = [len(target.wanted) for target in self.targets]
        blocks, shape = self.blocks_of[name], self.values[name].shape

        def forward(change: numpy.ndarray) -> numpy.ndarray:
            moved = {**self.values, name: change.reshape(shape)}
            changed = with_blocks(self.layout, moved, blocks)
            tensors = {
                group: numpy.zeros(math.prod(network.shape))
                for group, network in self.networks.items()
            }
            for block in blocks:
                for use in self.uses[block]:
                    term = self.terms(use.group)[use.term]
                    own = source_array(self.layout, self.source(use), changed[block])
                    operands = [
                        take(_NUMPY, arrays[use.group][each.source], each) for each in term.operands
                    ]
                    operands[use.place] = take(_NUMPY, own, term.operands[use.place])
                    tensors[use.group] += run(term.contraction, operands, _NUMPY).reshape(-1)
            made = [self.compared(target, tensors) * target.weight**0.5 for target in self.targets]
            return numpy.concatenate(made)

        def backward(left: numpy.ndarray) -> numpy.ndarray:
            found = numpy.zeros(shape)
            parts = numpy.split(left.reshape(-1), numpy.cumsum(rows)[:-1])
            cotangents: Tensors = {}
            for target, part in zip(self.targets, parts, strict=True):
                cotangents |= self.pulled(target, part * target.weight**0.5)
            for block in blocks:
                gradient = numpy.zeros(self.layout.block_shapes[block])
                for use in self.uses[block]:
                    contraction = self.terms(use.group)[use.term].contraction
                    tensor = cotangents[use.group].reshape(
                        [contraction.sizes[own] for own in contraction.output]
                    )
                    part = _contracted(
                        [(contraction.output, tensor), *self._without(use, arrays[use.group])],
                        contraction.operands[use.place],
                        contraction.sizes,
                    )
                    slices = tuple(map(slice, self.source(use).shape))
                    gradient[slices] += self._unmapped(use, part)
                found += self._outer_gradient(name, block, gradient)
            return found.reshape(-1)

        width = math.prod(shape)
        return LinearOperator((sum(rows), width), matvec=forward, rmatvec=backward, dtype=float)

    def pulled(self, target: Target, left: numpy.ndarray) -> Tensors:
        """Return the adjoint of `compared`."""
        if target.seen is not None:
            left = numpy.where(target.seen, left, 0.0)
        if target.map is None:
            return {target.groups[0]: left}
        groups = [self.layout.groups[group] for group in target.groups]
        if len(groups) == 1:
            return {target.groups[0]: target.map.adjoint(left, groups[0].before)}
        sizes = [group.size for group in groups]
        whole = target.map.adjoint(left, sum(sizes))
        parts = numpy.split(whole, numpy.cumsum(sizes)[:-1])
        return {
            group: numpy.pad(part, (0, item.before - item.size))
            for group, item, part in zip(target.groups, groups, parts, strict=True)
        }

    def _unmapped(self, use: Use, part: numpy.ndarray) -> numpy.ndarray:
        """Return the gradient of a block's slice, of that of an operand."""
        source = self.source(use)
        made = list(source.shape)
        for axis, _, size in source.modes:
            made[axis] = size
        part = part.reshape(made)
        for axis, index, _ in source.modes:
            fixed = self.layout.maps[source.group]
            part = fixed.map_mode(part, axis, index, source.shape[axis], adjoint=True)
        return part

    def _outer_gradient(self, name: str, block: str, gradient: numpy.ndarray) -> numpy.ndarray:
        """Return the gradient of what a block is made of."""
        if name == block:
            return gradient
        inner = self.layout.inner[block]
        whole = numpy.zeros(inner.size)
        whole[inner.start : inner.stop] = gradient.reshape(-1)
        found: numpy.ndarray = inner.map.adjoint(whole, inner.before)
        return found


def _gram(
    others: Sequence[tuple[Labels, numpy.ndarray]],
    own: tuple[Sequence[Labels], Sequence[Labels]],
    output: Labels,
    sizes: Mapping[int, int],
) -> numpy.ndarray:
    """Return products of a block's derivatives, (modes, or 1 where all are alike, sums, sums)."""
    kept, summed = own
    sums = [label for labels in summed for label in labels]
    shape = [math.prod(sizes[label] for label in labels) for labels in summed]
    if not others:
        return numpy.ones([1] * len(kept) + shape * 2)
    shift = max(sizes) + 1
    second = {
        label: label + shift for labels, _ in others for label in labels if label not in output
    }
    doubled = {**sizes, **{second[label]: sizes[label] for label in second}}
    pairs = [
        *others,
        *((tuple(second.get(one, one) for one in labels), array) for labels, array in others),
    ]
    present = {label for labels, _ in others for label in labels}
    modes = [label for labels in kept for label in labels if label in present]
    found = _contracted(pairs, [*modes, *sums, *(second[label] for label in sums)], doubled)
    # A mode of which the others have some digits only has all of them in the result.
    spread: list[int] = []
    full: list[int] = []
    merged: list[int] = []
    for labels in kept:
        some = any(label in present for label in labels)
        spread += [sizes[label] if label in present else 1 for label in labels]
        full += [sizes[label] if some else 1 for label in labels]
        merged.append(math.prod(sizes[label] for label in labels) if some else 1)
    found = numpy.broadcast_to(found.reshape([*spread, *shape, *shape]), [*full, *shape, *shape])
    return found.reshape([*merged, *shape, *shape])


def _contracted(
    pairs: Sequence[tuple[Labels, numpy.ndarray]],
    output: Iterator[int] | Sequence[int],
    sizes: Mapping[int, int],
) -> numpy.ndarray:
    path = contract([labels for labels, _ in pairs], tuple(output), sizes)
    found: numpy.ndarray = run(path, [array for _, array in pairs], _NUMPY)
    return found


def _normal_solution(
    gram: numpy.ndarray, right: numpy.ndarray, old: numpy.ndarray, kept: int
) -> numpy.ndarray:
    """Solve normal equations, of every entry of the first `kept` axes, by the least change."""
    # What the equations do not see stays: columns beyond the rank can then be trained.
    width = math.prod(right.shape[kept:])
    modes, shared = right.shape[:kept], gram.shape[:kept]
    matrices = gram.reshape(*shared, width, width)
    numbers, vectors = numpy.linalg.eigh(matrices)
    cutoff = numbers[..., -1:] * width * numpy.finfo(float).eps
    inverse = numpy.divide(1.0, numbers, out=numpy.zeros_like(numbers), where=numbers > cutoff)
    if math.prod(shared) == 1:  # one product of matrices for all rows
        matrices, vectors, inverse = (
            own.reshape(own.shape[kept:]) for own in (matrices, vectors, inverse)
        )
        rows = (-1, width)
    else:
        rows = (*modes, 1, width)
        inverse = inverse[..., None, :]
    left = right.reshape(rows) - old.reshape(rows) @ matrices
    change = ((left @ vectors) * inverse) @ numpy.swapaxes(vectors, -1, -2)
    found: numpy.ndarray = old + change.reshape(right.shape)
    return found
