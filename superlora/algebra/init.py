"""Initial factors: exactly one zero block a product, the others random."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from typing import Any

import numpy

from superlora._backend import Array, from_numpy
from superlora.design.layout import Layout
from superlora.design.splits import Split, is_last
from superlora.random import check_seed, normal

# The deviation of numbers in ±0.02, which Uni-LoRA starts its vector with.
_SHARED_VECTOR = 0.02 / math.sqrt(3)


def zero_block(layout: Layout, group: int, term: int = 0) -> str:
    """Return the name of the block that starts at zero."""
    count = layout.specs[group].splits
    candidates = [
        (index, leaf)
        for index, split in reversed([*enumerate(layout.terms(group)[term])])
        for leaf in (reversed(split.block_shapes) if split.core == "train" else split.block_shapes)
        if layout.block(group, term * count + index, leaf) in layout.trainable
    ]
    tied = layout.specs[group].tied
    if tied:
        first = term * count
        alike = layout.alike(layout.first_group(group))
        common = [
            (i, leaf)
            for i, leaf in candidates
            if all(leaf in item.splits[first + i].block_shapes for item in alike)
        ]
        own = [(i, leaf) for i, leaf in common if f"{i}.{leaf}" not in tied]
        shared = [(i, leaf) for i, leaf in candidates if f"{i}.{leaf}" in tied]
        candidates = own or shared or candidates
    index, leaf = candidates[0]
    return layout.block(group, term * count + index, leaf)


def init_factors(layout: Layout, seed: int = 0, like: Any = numpy.float32) -> dict[str, Array]:
    """Draw initial factors for which every update is zero, but with one vector for two factors."""
    from_numpy(numpy.zeros(()), like)  # refuses a wrong dtype before anything is drawn
    return {name: from_numpy(values, like) for name, values in each_factor(layout, seed)}


def each_factor(
    layout: Layout, seed: int, skipped: Container[str] = ()
) -> Iterator[tuple[str, numpy.ndarray]]:
    """Draw what `init_factors` returns, one block at a time."""
    check_seed(seed)
    deviations: dict[str, float] = {}
    multiplied: set[str] = set()  # vectors that two blocks of one product are made of
    for group in range(len(layout.groups)):
        trained = layout.specs[group].trained_terms
        for term, blocks in enumerate(layout.term_blocks(group)[:trained]):
            zero = zero_block(layout, group, term)
            drawn = [name for name in blocks if name in layout.trainable and name != zero]
            variance = _variance(layout, group, term)
            for name in drawn:
                deviations.setdefault(name, variance ** (0.5 / len(drawn)))
            deviations[zero] = 0.0
            vectors = [layout.inner[block].name for block in blocks if block in layout.inner]
            multiplied |= {name for name in vectors if vectors.count(name) > 1}
    for block, inner in layout.inner.items():
        gain = inner.map.gain(inner.before, inner.size)
        own = deviations[block] * gain**-0.5 if gain else 0.0
        # At zero a vector has no gradient where two blocks of one product are made of it.
        deviations[inner.name] = _SHARED_VECTOR if inner.name in multiplied else own
    for stream, (name, shape) in enumerate(layout.factor_shapes.items()):
        if name in skipped:
            continue
        deviation = deviations[name]
        yield name, normal(seed, stream, shape) * deviation if deviation else numpy.zeros(shape)


def frozen_variance(source: str, shape: tuple[int, ...], last: bool) -> float:
    """Return the variance of a frozen block's entries, 1 where it is not known beforehand."""
    if source == "random":
        return 1 / shape[-2 if last else -1]
    return 1 / shape[0] if source.startswith("singular") else 1.0


def _variance(layout: Layout, group: int, term: int) -> float:
    """Return what the variances of a product's trainable random blocks multiply to."""
    members = layout.grouping.members[group]
    width = sum(layout.shapes[name][1] for name in members) / len(members)
    count = layout.specs[group].splits
    splits = layout.terms(group)[term]
    terms, largest = layout.specs[group].terms, 1
    item = layout.groups[group]
    # Where modes are mapped on their own, every split has maps of its own.
    fixed = layout.maps[group].joined([(own.sizes, own.shape) for own in item.splits[:count]])
    known = fixed.gain(item.before, item.size)
    for index, split in enumerate(splits):
        terms *= _summed(split)
        for leaf, shape in split.block_shapes.items():
            source = layout.frozen.get(layout.block(group, term * count + index, leaf))
            if source is not None:
                known *= frozen_variance(source, shape, is_last(split, leaf))
            elif leaf != "core":  # of a factor its rank, of a train's core those on both sides
                largest = max(largest, *(shape[::2] if split.core == "train" else shape[1:]))
    return largest / (width * terms * known)


def _summed(split: Split) -> int:
    """Return the number of products that sum to one entry of a split."""
    if split.core == "train":
        return math.prod(split.ranks)
    ranks = [rank for rank, factored in zip(split.ranks, split.factored, strict=True) if factored]
    return math.prod(ranks if split.core == "full" else ranks[:1])
