"""The equation in plain nested loops over numpy floats: slow, and the truth.

Shapes may come from a plan's layout; every value, and where it goes, comes from here.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy

from superlora.maps import Identity, Place, Separable


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


def train(cores: Sequence[numpy.ndarray]) -> numpy.ndarray:
    """Return ``X[i] = sum_{a, b, …} G_0[0, i_0, a] G_1[a, i_1, b] … G_{M-1}[y, i_{M-1}, 0]``."""
    sizes = [core.shape[1] for core in cores]
    ranks = [core.shape[2] for core in cores[:-1]]
    assert [core.shape[0] for core in cores] == [1, *ranks]
    assert cores[-1].shape[2] == 1
    tensor = numpy.zeros(sizes)
    for index in indices(sizes):
        for inner in indices(ranks):
            ends = [0, *inner, 0]
            tensor[index] += math.prod(
                float(core[ends[mode], index[mode], ends[mode + 1]])
                for mode, core in enumerate(cores)
            )
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


def hadamard(tensors: Sequence[numpy.ndarray]) -> numpy.ndarray:
    """Return ``Z[i] = prod_k X_k[i]`` of tensors of one shape."""
    product = numpy.zeros(tensors[0].shape)
    for index in indices(product.shape):
        product[index] = math.prod(float(tensor[index]) for tensor in tensors)
    return product


def neighbours(shape: Sequence[int], order: int) -> tuple[int, ...]:
    """Join neighbouring modes so that `order` are left, the first ones of the most modes."""
    parts = numpy.array_split(numpy.array(shape), order)
    return tuple(math.prod(part.tolist()) for part in parts)


def fields_of(spec: object, name: str) -> dict[str, object]:
    """Return the fields that hold for one weight: those of the first override that matches."""
    fields = {item.name: getattr(spec, item.name) for item in dataclasses.fields(spec)}  # type: ignore[arg-type]
    overrides = fields.pop("overrides")
    ends = [name] + [name[dot + 1 :] for dot, letter in enumerate(name) if letter == "."]
    for pattern, changes in overrides:
        if any(re.fullmatch(pattern, end) for end in ends):
            changed = dict(changes)
            if changed.keys() & {"scale", "alpha"}:
                fields.update(scale=None, alpha=None)
            return {**fields, **changed}
    return fields


def scale_of(fields: Mapping[str, object]) -> float:
    """Return alpha by rank, the scale given, or one."""
    if fields["alpha"] is not None:
        (rank,) = set(integers_in(fields["rank"]))
        return float(fields["alpha"]) / rank  # type: ignore[arg-type]
    return 1.0 if fields["scale"] is None else fields["scale"]  # type: ignore[return-value]


def parts_of(plan: object) -> list[tuple[dict[str, object], list[list[tuple[str, int, int]]]]]:
    """List the designs in order of first appearance, each with the groups of its own weights."""
    spec, shapes = plan.spec, plan.layout.shapes  # type: ignore[attr-defined]
    parts: list[tuple[dict[str, object], dict[str, tuple[int, int]]]] = []
    for name, shape in shapes.items():
        fields = fields_of(spec, name)
        own = next((weights for other, weights in parts if other == fields), None)
        if own is None:
            parts.append((fields, {name: shape}))
        else:
            own[name] = shape
    return [
        (fields, groups_of(weights, fields["groups"], fields["cut"]))  # type: ignore[arg-type]
        for fields, weights in parts
    ]


def map_matrix(fixed: object, before: int, size: int) -> numpy.ndarray:
    """Return the matrix of a map, column by column; the maps have tests of their own."""
    if hasattr(fixed, "matrix"):
        return fixed.matrix(before, size)
    columns = [fixed.apply(column, size) for column in numpy.eye(before)]  # type: ignore[attr-defined]
    return numpy.stack(columns, axis=1)


def bound(
    fixed: object, group: int, listed: Sequence[tuple[str, int, int]], plan: object
) -> object:
    """Return the map of the group that holds these entries."""
    shapes = plan.layout.shapes  # type: ignore[attr-defined]
    names = list(dict.fromkeys(name for name, _, _ in listed))
    whole = len(listed) == sum(math.prod(shapes[name]) for name in names)
    place = Place(group, tuple(shapes[name] for name in names), whole)
    return fixed.bind(place)  # type: ignore[attr-defined]


def with_blocks(plan: object, factors: Mapping[str, numpy.ndarray]) -> dict[str, numpy.ndarray]:
    """Make the blocks that are mapped from vectors: theta, in the order of the blocks' names."""
    found, number = dict(factors), 0
    blocks = blocks_of(plan)
    for fields, held in parts_of(plan):
        numbers = range(number, number + len(held))
        own = [
            b for b, (_, source) in blocks.items() if int(b.split(".")[0]) in numbers and not source
        ]
        sizes = [math.prod(blocks[block][0]) for block in own]
        fixed, first, number = fields["factor_map"], number, numbers.stop
        if fixed is None:
            continue
        if fields["factor_scope"] == "all":
            theta = factors[f"{first}.0.theta"]
            fixed = fixed.bind(Place(first, (), False))  # type: ignore[attr-defined]
            vector = map_matrix(fixed, theta.size, sum(sizes)) @ theta
            parts = numpy.split(vector, numpy.cumsum(sizes)[:-1])
        else:
            parts = []
            for index, (block, size) in enumerate(zip(own, sizes, strict=True)):
                theta = factors[f"{block}_theta"]
                matrix = map_matrix(fixed.bind(Place(index, (), False)), theta.size, size)  # type: ignore[attr-defined]
                parts.append(matrix @ theta)
        found |= {b: part.reshape(blocks[b][0]) for b, part in zip(own, parts, strict=True)}
    return found


def split_tensor(
    split: object, blocks: Mapping[str, numpy.ndarray], fixed: object, place: int
) -> numpy.ndarray:
    """Return one split, of the fold's modes, from its own blocks."""
    sizes, shape = split.sizes, split.shape  # type: ignore[attr-defined]
    separable = type(fixed).__name__ == "Separable"
    assert separable or sizes == neighbours(shape, len(sizes))
    planes = [blocks.get(f"factor{mode}") for mode in range(len(sizes))]
    core = blocks.get("core")
    if core is not None and core.ndim < len(sizes):
        numbers, core = core, numpy.zeros((len(core),) * len(sizes))
        for place, number in enumerate(numbers):
            core[(place,) * len(sizes)] = number
    if "core0" in blocks:
        tensor = train([blocks[f"core{mode}"] for mode in range(len(sizes))])
    else:
        tensor = canonical(planes) if core is None else tucker(core, planes)  # type: ignore[arg-type]
    assert tensor.shape == sizes
    if separable:
        for mode in fixed.mapped(len(shape)):  # type: ignore[attr-defined]
            one = fixed.mode(place * len(shape) + mode)  # type: ignore[attr-defined]
            matrix = map_matrix(one, sizes[mode], shape[mode])
            tensor = numpy.moveaxis(numpy.tensordot(matrix, tensor, ([1], [mode])), 0, mode)
        return tensor
    return fold(unfold(tensor, tensor.size), shape)


def group_vector(
    fields: Mapping[str, object],
    groups: Sequence[object],
    number: int,
    first: int,
    factors: Mapping[str, numpy.ndarray],
) -> numpy.ndarray:
    """Return the fold of a group, raveled: the products of its splits, summed.

    `groups` are all of the plan's; `first` is the number of the first one of this design.
    """
    group, count = groups[number], fields["splits"]
    assert len(group.splits) == count * fields["terms"]  # type: ignore[attr-defined,operator]
    total = numpy.zeros(group.fold)  # type: ignore[attr-defined]
    for term in range(fields["terms"]):  # type: ignore[call-overload]
        tensors = []
        for place in range(count):  # type: ignore[call-overload]
            index = term * count + place  # type: ignore[operator]
            split = group.splits[index]  # type: ignore[attr-defined]
            own = {}
            for leaf, shape in split.block_shapes.items():
                tied = f"{place}.{leaf}" in fields["tied"]  # type: ignore[operator]
                block = factors[f"{first if tied else number}.{index}.{leaf}"]
                own[leaf] = block[tuple(map(slice, shape))]
                assert own[leaf].shape == shape
                assert tied or block.shape == shape
            tensors.append(split_tensor(split, own, fields["map"], place))
        product = kronecker(tensors) if fields["combine"] == "kronecker" else hadamard(tensors)
        assert product.shape == total.shape
        total += product
    return unfold(total, total.size)


def deltas(plan: object, factors: Mapping[str, numpy.ndarray]) -> dict[str, numpy.ndarray]:
    """Return every weight's update: the whole equation.

    Of the plan this reads the shapes of the weights, the folds with their splits
    and ranks, and from the spec the grouping, the map and the scale.
    """
    layout = plan.layout  # type: ignore[attr-defined]
    updates = {name: numpy.full(shape, numpy.nan) for name, shape in layout.shapes.items()}
    number = 0
    factors = with_blocks(plan, factors)
    for fields, held in parts_of(plan):
        first, fixed = number, fields["map"]
        vectors = [
            group_vector(fields, layout.groups, first + index, first, factors)
            for index in range(len(held))
        ]
        if getattr(fixed, "scope", "group") == "all":
            vector = numpy.concatenate([v[: len(e)] for v, e in zip(vectors, held, strict=True)])
            vector = map_matrix(fixed, vector.size, vector.size) @ vector
            vectors = numpy.split(vector, numpy.cumsum([len(listed) for listed in held])[:-1])
            fixed = Identity()
        for listed, vector in zip(held, vectors, strict=True):
            if isinstance(fixed, (Identity, Separable)):
                vector = vector[: len(listed)]
            else:
                own = bound(fixed, number, listed, plan)
                vector = map_matrix(own, vector.size, len(listed)) @ vector
            for (name, row, column), value in zip(listed, vector, strict=True):
                updates[name][row, column] = scale_of(fields) * value
            number += 1
    assert number == len(layout.groups)
    assert not any(numpy.isnan(update).any() for update in updates.values())
    return updates


def blocks_of(plan: object) -> dict[str, tuple[tuple[int, ...], str | None]]:
    """Return shape and source (None: trainable) of every block, by the documented names."""
    found: dict[str, tuple[tuple[int, ...], str | None]] = {}
    number = 0
    for fields, held in parts_of(plan):
        first, frozen = number, dict(fields["frozen"])  # type: ignore[call-overload]
        for number in range(first, first + len(held)):
            splits = plan.layout.groups[number].splits  # type: ignore[attr-defined]
            for index, split in enumerate(splits):
                for leaf, shape in split.block_shapes.items():
                    key = f"{index % fields['splits']}.{leaf}"  # type: ignore[operator]
                    owner = first if key in fields["tied"] else number  # type: ignore[operator]
                    name = f"{owner}.{index}.{leaf}"
                    seen = found.get(name, (shape, None))[0]
                    largest = tuple(max(pair) for pair in zip(seen, shape, strict=True))
                    found[name] = (largest, frozen.get(key))
        number = first + len(held)
    return found


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
