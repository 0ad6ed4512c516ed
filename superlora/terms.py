"""What each product of a group is made of: its blocks, mapped, sliced and in order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from superlora._backend import Array, backend_of
from superlora.layout import Layout
from superlora.maps import Separable
from superlora.slicing import Box
from superlora.tucker import tucker

# One split's blocks: its core, None where it is the identity, and a factor a mode,
# None where un-factored.
Blocks = tuple[Array | None, list[Array | None]]


def with_blocks(
    layout: Layout, factors: Mapping[str, Array], blocks: Iterable[str]
) -> Mapping[str, Array]:
    """Add the blocks that F_in makes from the vectors among the factors.

    Parameters
    ----------
    layout : Layout
        What lies where.
    factors : mapping of str to array
        What is trained, and frozen blocks.
    blocks : iterable of str
        The blocks that are wanted.

    Returns
    -------
    mapping of str to array
        `factors` itself where nothing is missing.
    """
    inner = layout.inner
    missing = [block for block in blocks if block in inner and block not in factors]
    if not missing:
        return factors
    found = dict(factors)
    whole: dict[str, Array] = {}
    for block in missing:
        item = inner[block]
        theta = factors[item.name]
        if item.map.sliced:
            part = item.map.apply_slice(theta, item.size, item.start, item.stop)
        else:
            if item.name not in whole:
                whole[item.name] = item.map.apply(theta, item.size)
            part = whole[item.name][item.start : item.stop]
        found[block] = backend_of(part).reshape(part, layout.block_shapes[block])
    return found


class Mapped(dict[str, Array]):
    """Blocks of one group to which its map of single modes was applied."""


def mapped_blocks(
    layout: Layout, factors: Mapping[str, Array], group: int, *, adjoint: bool = False
) -> Mapped:
    """Apply a map of single modes to a group's factors, or to cores where they have none.

    Parameters
    ----------
    layout : Layout
        What lies where.
    factors : mapping of str to array
        Blocks of the group by name, frozen ones too.
    group : int
        Index of the group.
    adjoint : bool
        Whether the adjoint is applied, to what has the shapes after the map.

    Returns
    -------
    Mapped
        The same blocks.
    """
    fixed = layout.maps[group]
    assert isinstance(fixed, Separable)
    found = Mapped()
    for index, split in enumerate(layout.groups[group].splits):
        modes = len(split.shape)
        place = index % layout.specs[group].splits
        sizes = split.sizes if adjoint else split.shape
        for leaf, shape in split.block_shapes.items():
            name = layout.block(group, index, leaf)
            if name not in factors:
                continue
            block = factors[name] if adjoint else _leading(factors[name], shape)
            for mode in fixed.mapped(modes):
                own = (f"factor{mode}", 0) if split.factored[mode] else ("core", mode)
                if own[0] == leaf:
                    which = place * modes + mode
                    block = fixed.map_mode(block, own[1], which, sizes[mode], adjoint=adjoint)
            found[name] = block
    return found


def terms_of(layout: Layout, factors: Mapping[str, Array], group: int) -> list[list[Blocks]]:
    """Return the blocks of every split of each of a group's products.

    Parameters
    ----------
    layout : Layout
        What lies where.
    factors : mapping of str to array
        The blocks by name, frozen ones too.
    group : int
        Index of the group.

    Returns
    -------
    list of list of (core, factors)
        As `tucker` takes them, a map of single modes applied.
    """
    if isinstance(layout.maps[group], Separable) and not isinstance(factors, Mapped):
        factors = mapped_blocks(layout, factors, group)
    found: list[list[Blocks]] = []
    for term, splits in enumerate(layout.terms(group)):
        found.append([])
        for place, split in enumerate(splits):
            own = {}
            for leaf, shape in split.block_shapes.items():
                block = factors[layout.block(group, term * len(splits) + place, leaf)]
                own[leaf] = block if isinstance(factors, Mapped) else _leading(block, shape)
            core = own.get("core")
            planes = [own.get(f"factor{mode}") for mode in range(len(split.sizes))]
            if split.joined:  # of lower order: its neighbouring modes are one
                tensor = tucker(core, planes)
                core = backend_of(tensor).reshape(tensor, split.shape)
                planes = [None] * len(split.shape)
            found[-1].append((core, planes))
    return found


def cut_blocks(layout: Layout, blocks: Sequence[Blocks], group: int, box: Box) -> list[Blocks]:
    """Slice every split's blocks to its digits of a box over the leading modes.

    Parameters
    ----------
    layout : Layout
        What lies where.
    blocks : sequence of (core, factors)
        Of one product.
    group : int
        Index of the group.
    box : sequence of (int, int)
        A range a digit.

    Returns
    -------
    list of (core, factors)
        Views where the library has them.
    """
    splits = layout.terms(group)[0]
    product = layout.specs[group].combine == "kronecker"
    cuts = []
    for index, (core, planes) in enumerate(blocks):
        digits = box[index :: len(splits)] if product else box
        planes = list(planes)
        for mode, (first, last) in enumerate(digits):
            if last - first == splits[index].shape[mode]:
                continue
            plane = planes[mode]
            if plane is not None:
                planes[mode] = plane[first:last]
            elif core is not None:
                core = core[(slice(None),) * mode + (slice(first, last),)]
        cuts.append((core, planes))
    return cuts


def joined(parts: Sequence[Array]) -> Array:
    """Concatenate arrays along the first axis; one alone is returned as it is."""
    return parts[0] if len(parts) == 1 else backend_of(*parts).concatenate(list(parts), axis=0)


def scaled(x: Array, scale: Any) -> Array:
    """Return ``scale * x``, and `x` itself where the scale is 1."""
    return x if isinstance(scale, (int, float)) and scale == 1 else x * scale


def _leading(block: Array, shape: tuple[int, ...]) -> Array:
    """Return a tied block's leading slices, the block itself where it is of that shape."""
    if tuple(block.shape) == shape:
        return block
    return block[tuple(slice(size) for size in shape)]
