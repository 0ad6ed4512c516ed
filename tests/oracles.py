"""The equation in plain nested loops over numpy floats: slow, and the truth.

Shapes may come from a plan's layout; every value, and where it goes, comes from here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy


def indices(shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield the indices of a tensor, the last mode fastest."""
    return itertools.product(*map(range, shape))


def tucker(core: numpy.ndarray, factors: Sequence[numpy.ndarray | None]) -> numpy.ndarray:
    """Return ``X[i] = sum_j C[j] prod_m A_m[i_m, j_m]``; a factor None is the identity."""
    sizes = [
        rank if factor is None else len(factor)
        for rank, factor in zip(core.shape, factors, strict=True)
    ]
    values, planes = core.tolist(), [None if plane is None else plane.tolist() for plane in factors]

    def total(part: object, index: tuple[int, ...], mode: int) -> float:
        if mode == len(planes):
            assert isinstance(part, float)
            return part
        assert isinstance(part, list)
        plane = planes[mode]
        if plane is None:
            return total(part[index[mode]], index, mode + 1)
        row = plane[index[mode]]
        return sum(row[j] * total(part[j], index, mode + 1) for j in range(len(row)))

    tensor = numpy.zeros(sizes)
    for index in indices(sizes):
        tensor[index] = total(values, index, 0)
    return tensor


def canonical(factors: Sequence[numpy.ndarray]) -> numpy.ndarray:
    """Return ``X[i] = sum_j prod_m A_m[i_m, j]``, the superdiagonal core of ones."""
    sizes = [len(factor) for factor in factors]
    planes = [factor.tolist() for factor in factors]
    tensor = numpy.zeros(sizes)
    for index in indices(sizes):
        rows = [plane[i] for plane, i in zip(planes, index, strict=True)]
        tensor[index] = sum(math.prod(term) for term in zip(*rows, strict=True))
    return tensor


def digits_of(index: int, radices: Sequence[int]) -> list[int]:
    """Return the digits of a number, the first most significant."""
    digits = []
    for radix in reversed(radices):
        digits.append(index % radix)
        index //= radix
    assert index == 0
    return digits[::-1]


def kronecker(tensors: Sequence[numpy.ndarray]) -> numpy.ndarray:
    """Return ``Z[i] = prod_k X_k[digit k of i_1, …, digit k of i_M]``."""
    order = tensors[0].ndim
    radices = [[tensor.shape[mode] for tensor in tensors] for mode in range(order)]
    shape = [math.prod(sizes) for sizes in radices]
    product = numpy.zeros(shape)
    for index in indices(shape):
        digits = [digits_of(i, sizes) for i, sizes in zip(index, radices, strict=True)]
        product[index] = math.prod(
            float(tensor[tuple(digit[k] for digit in digits)]) for k, tensor in enumerate(tensors)
        )
    return product


def fold(vector: numpy.ndarray, shape: Sequence[int]) -> numpy.ndarray:
    """Fill a tensor with a vector, the last mode fastest, and zeros after its end."""
    tensor = numpy.zeros(shape)
    for position, index in enumerate(indices(shape)):
        tensor[index] = vector[position] if position < len(vector) else 0.0
    return tensor


def unfold(tensor: numpy.ndarray, size: int) -> numpy.ndarray:
    """List the first entries of a tensor, the last mode fastest."""
    return numpy.array([tensor[index] for index in itertools.islice(indices(tensor.shape), size)])


def entries(shapes: Mapping[str, tuple[int, int]]) -> list[tuple[str, int, int]]:
    """List (weight, row, column) of every entry in the order of concatenation."""
    return [
        (name, row, column)
        for name, (rows, columns) in shapes.items()
        for row in range(rows)
        for column in range(columns)
    ]


def groups_of(
    shapes: Mapping[str, tuple[int, int]], groups: str | int, cut: str
) -> list[list[tuple[str, int, int]]]:
    """List the entries that each group holds, in its order."""
    listed = entries(shapes)
    if groups == "weight":
        return [[entry for entry in listed if entry[0] == name] for name in shapes]
    if groups == "layer":
        layers: dict[str, list[tuple[str, int, int]]] = {}
        for entry in listed:
            parts = entry[0].split(".")
            number = next(i for i, part in enumerate(parts) if part.isdigit())
            layers.setdefault(".".join(parts[: number + 1]), []).append(entry)
        return list(layers.values())
    assert isinstance(groups, int)
    if cut == "pad":
        width = math.ceil(len(listed) / groups)
        return [listed[width * index : width * (index + 1)] for index in range(groups)]
    parts = numpy.array_split(numpy.arange(len(listed)), groups)
    return [[listed[position] for position in part] for part in parts]


def integers_in(rank: object) -> list[int]:
    """List the integers of a nested rank."""
    if isinstance(rank, tuple):
        return [value for item in rank for value in integers_in(item)]
    return [rank] if isinstance(rank, int) else []


def deltas(plan: object, factors: Mapping[str, numpy.ndarray]) -> dict[str, numpy.ndarray]:
    """Return every weight's update: the whole equation.

    Of the plan this reads the shapes of the weights, the folds with their splits
    and ranks, and from the spec the grouping, the map and the scale.
    """
    layout, spec = plan.layout, plan.spec  # type: ignore[attr-defined]
    updates = {name: numpy.full(shape, numpy.nan) for name, shape in layout.shapes.items()}
    held = groups_of(layout.shapes, spec.groups, spec.cut)
    assert len(held) == len(layout.groups)
    if spec.alpha is not None:
        (rank,) = set(integers_in(spec.rank))
        scale = spec.alpha / rank
    else:
        scale = 1.0 if spec.scale is None else spec.scale
    for number, (listed, group) in enumerate(zip(held, layout.groups, strict=True)):
        tensors = []
        for index, split in enumerate(group.splits):
            prefix = f"{number}.{index}."
            planes = [factors.get(f"{prefix}factor{mode}") for mode in range(len(split.sizes))]
            core = factors.get(f"{prefix}core")
            tensor = canonical(planes) if core is None else tucker(core, planes)
            assert tensor.shape == split.sizes
            tensors.append(tensor)
        product = kronecker(tensors)
        assert product.shape == group.fold
        vector = unfold(product, product.size)
        if type(spec.map).__name__ == "Identity":
            vector = vector[: len(listed)]
        else:
            vector = spec.map.matrix(vector.size, len(listed)) @ vector
        for (name, row, column), value in zip(listed, vector, strict=True):
            updates[name][row, column] = scale * value
    assert not any(numpy.isnan(update).any() for update in updates.values())
    return updates


def jacobian_rank(function: object, blocks: Sequence[numpy.ndarray]) -> int:
    """Return the rank of a multilinear function's Jacobian, by its exact differences.

    The function is linear in every single entry of its blocks, so that changing
    one entry by one gives the derivative up to rounding.
    """
    base = function(blocks)  # type: ignore[operator]
    columns = []
    for number, block in enumerate(blocks):
        for index in indices(block.shape):
            changed = [other.copy() for other in blocks]
            changed[number][index] += 1.0
            columns.append((function(changed) - base).ravel())  # type: ignore[operator]
    return int(numpy.linalg.matrix_rank(numpy.array(columns), tol=1e-8))
