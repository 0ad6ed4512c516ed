"""The vectors that F_in maps to blocks. Integers only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from superlora.design.fold_shape import Shape
from superlora.design.spec import Spec
from superlora.design.splits import Group, check_memory, check_serves
from superlora.maps import Map, Place


@dataclass(frozen=True)
class Inner:
    """What a block is cut from."""

    name: str  # of the trained vector, a key of ``factor_shapes``
    map: Map  # F_in
    before: int  # entries of the vector
    size: int  # of what it is mapped to
    start: int  # of the block in that
    stop: int


def inner_vectors(
    trainable: Mapping[str, Shape],
    specs: Sequence[Spec],
    first_group: Callable[[int], int],
    dense: int,
) -> dict[str, Inner]:
    """Return the vector that every block that has one is mapped from."""
    parts: dict[int, dict[str, int]] = {}
    for block, shape in trainable.items():
        group = int(block.partition(".")[0])
        if specs[group].factor_map is not None:
            parts.setdefault(first_group(group), {})[block] = math.prod(shape)
    entries = sum(total for sizes in parts.values() for total in sizes.values())
    check_memory("factor_map must make blocks of", entries, dense)
    # Of all blocks, so that those of other overrides have other streams too.
    numbers = {block: index for index, block in enumerate(trainable)}
    found: dict[str, Inner] = {}
    for first, sizes in parts.items():
        own = specs[first]
        assert own.factor_map is not None
        assert own.factor_size is not None
        if own.factor_scope == "all":
            vectors = [(f"{first}.0.theta", first, sizes)]
        else:
            vectors = [(f"{b}_theta", numbers[b], {b: size}) for b, size in sizes.items()]
        for name, number, blocks in vectors:
            fixed, total = own.factor_map.bind(Place(number, (), False)), sum(blocks.values())
            called = name.removesuffix("_theta")
            check_serves(fixed, own.factor_size, total, f"factor_map for {called!r}")
            start = 0
            for block, size in blocks.items():
                found[block] = Inner(name, fixed, own.factor_size, total, start, start + size)
                start += size
    return found


def unit_modes_of(groups: Sequence[Group], specs: Sequence[Spec]) -> str:
    """Return what to say of splits that have size 1 in a mode of size above 1, if any."""
    bare = sorted(
        {
            (index, mode)
            for group, own in zip(groups, specs, strict=True)
            if not own.has_sizes  # else as asked for
            for index, split in enumerate(group.splits)
            for mode, size in enumerate(split.shape)
            if size == 1 < group.fold[mode]
        }
    )
    if not bare:
        return ""
    places = ", ".join(f"split {index} in mode {mode}" for index, mode in bare)
    return f"no Kronecker structure where a split has size 1: {places}"
