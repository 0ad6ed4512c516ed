"""The equation itself: factors to the update of a group, of a weight, of an output."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence

from superlora._backend import Array, backend_of
from superlora.folding import ravel
from superlora.kronecker import hadamard, khatri_rao_columns, kronecker
from superlora.layout import Layout
from superlora.maps import Map, Separable
from superlora.slicing import Box
from superlora.splitting import Split
from superlora.tucker import open_last_mode, tucker
from superlora.uses import joint_sizes

# One split's blocks: its core, None where it is the identity, and a factor a mode,
# None where un-factored.
Blocks = tuple[Array | None, list[Array | None]]


def group_tensor(layout: Layout, factors: Mapping[str, Array], group: int) -> Array:
    """Reconstruct a group's folded tensor: the products of its splits, summed.

    Parameters
    ----------
    layout : Layout
        What lies where.
    factors : mapping of str to array
        The blocks by name, frozen ones too; those of other groups are not read.
    group : int
        Index of the group.

    Returns
    -------
    array, (D_1, …, D_M)
        Before map and scale.
    """
    product = _product_of(layout, group)
    return _total(
        product([tucker(core, planes) for core, planes in term])
        for term in _blocks(layout, factors, group)
    )


def weight_delta(layout: Layout, factors: Mapping[str, Array], name: str, scale: float) -> Array:
    """Form one weight's update, from the rows of the factors that it needs.

    Parameters
    ----------
    layout : Layout
        What lies where.
    factors : mapping of str to array
        The blocks by name, frozen ones too; only those of the weight's groups are read.
    name : str
        The weight.
    scale : float
        The number s in front of the equation.

    Returns
    -------
    array, (output width, input width)
        Only a map that mixes all entries makes the whole group be formed.
    """
    factors = with_blocks(layout, factors, layout.blocks_of(name))
    runs = []
    for piece in layout.grouping.pieces[name]:
        if layout.identity(piece.group):
            blocks = _blocks(layout, factors, piece.group)
            part = layout.piece_slice(piece)
            parts = [ravel(_box_tensor(layout, blocks, piece.group, box)) for box in part.boxes]
            runs.append(_join(parts)[part.skip : part.skip + part.size])
        else:
            x, size = joint_entries(layout, factors, piece.group)
            runs.append(map_slice(layout.maps[piece.group], x, size, *layout.position(piece)))
    return scaled(backend_of(runs[0]).reshape(_join(runs), layout.shapes[name]), scale)


def map_slice(fixed: Map, x: Array, size: int, start: int, stop: int) -> Array:
    """Return some entries of a mapped vector, if the map keeps to what it has to be.

    Parameters
    ----------
    fixed : Map
        Maybe of the user's own.
    x : array, (before,)
        The entries before it.
    size : int
        Entries after it.
    start, stop : int
        Which of them.

    Returns
    -------
    array, (stop - start,)
        Library and dtype of `x`.

    Raises
    ------
    TypeError
        If the map returns an array of another library.
    ValueError
        If it returns another shape or dtype.
    """
    y = fixed.apply_slice(x, size, start, stop)
    backend_of(x, y)
    if tuple(y.shape) != (stop - start,) or y.dtype != x.dtype:
        raise ValueError(
            f"map={type(fixed).__name__}() must return {stop - start} entries of {x.dtype}: got "
            f"shape {tuple(y.shape)} of {y.dtype}"
        )
    return y


def joint_entries(layout: Layout, factors: Mapping[str, Array], group: int) -> tuple[Array, int]:
    """Return what a group's map takes, and how many entries it makes of it.

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
    array, (before,)
        The entries of the group, or of all groups that its map takes together.
    int
        The entries after the map.
    """
    joint = layout.joint(group)
    _, size = joint_sizes(layout, group)
    if len(joint) == 1:
        return ravel(group_tensor(layout, factors, group)), size
    tensors = (group_tensor(layout, factors, index) for index in joint)
    cropped = [
        ravel(tensor)[: layout.groups[index].size]
        for index, tensor in zip(joint, tensors, strict=True)
    ]
    return _join(cropped), size


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


def apply_factored(
    layout: Layout, factors: Mapping[str, Array], name: str, x: Array, scale: float
) -> Array:
    """Multiply by one weight's update without forming it, where the fold is aligned.

    Parameters
    ----------
    layout : Layout
        What lies where; ``layout.row_slice(name)`` must not be None.
    factors : mapping of str to array
        The blocks by name, frozen ones too.
    name : str
        The weight.
    x : array, (..., input width)
        Inputs of the layer.
    scale : float
        The number s in front of the equation.

    Returns
    -------
    array, (..., output width)
        ``x @ ΔWᵀ``.

    Notes
    -----
    The last mode, of size g, divides the input width. With its rank index left
    open, the weight's rows of all other modes make ``R``, (output width * input
    width / g, r_M); the input's blocks of g entries meet the last factors alone.
    """
    factors = with_blocks(layout, factors, layout.blocks_of(name))
    library = backend_of(x)
    outputs = layout.shapes[name][0]
    group = layout.grouping.pieces[name][0].group
    width = layout.groups[group].fold[-1]
    cut = library.reshape(x, (-1, width))
    total = None
    for term in range(layout.specs[group].terms):
        left = scaled(_open_rows(layout, factors, name, term), scale)
        reduced = _reduce_inputs(layout, group, _blocks(layout, factors, group)[term], cut)
        y = library.tensordot(library.reshape(reduced, (-1, left.shape[1])), left, axes=([1], [1]))
        total = y if total is None else total + y
    return library.reshape(total, (*x.shape[:-1], outputs))


def low_rank_factors(
    layout: Layout, factors: Mapping[str, Array], name: str, scale: float
) -> tuple[Array, Array] | None:
    """Write one weight's update as a product of two matrices, where its fold is aligned.

    Parameters
    ----------
    layout : Layout
        What lies where.
    factors : mapping of str to array
        The blocks by name.
    name : str
        The weight.
    scale : float
        The number s in front of the equation.

    Returns
    -------
    pair of arrays, (output width, q) and (input width, q), or None
        ``ΔW = left @ rightᵀ`` without ΔW being formed; None where the fold is not aligned
        or q would not be less than both widths.
    """
    if layout.inner_width(name) >= min(layout.shapes[name]):
        return None
    factors = with_blocks(layout, factors, layout.blocks_of(name))
    group = layout.grouping.pieces[name][0].group
    columns = layout.shapes[name][1]
    width = layout.groups[group].fold[-1]
    lefts, rights = [], []
    for term, blocks in enumerate(_blocks(layout, factors, group)):
        left = _open_rows(layout, factors, name, term)
        library = backend_of(left)
        right = _reduce_inputs(layout, group, blocks, library.eye(width, **library.context(left)))
        right = library.reshape(right, (width, -1))
        if columns > width:
            blocked = library.eye(columns // width, **library.context(left))
            right = kronecker([blocked, right])
        lefts.append(scaled(left, scale))
        rights.append(right)
    library = backend_of(*lefts)
    return library.concatenate(lefts, axis=1), library.concatenate(rights, axis=1)


def _open_rows(layout: Layout, factors: Mapping[str, Array], name: str, term: int) -> Array:
    """Return ``R``, (output width, input width / g * ranks), of one product of a weight."""
    rows = layout.row_slice(name)
    assert rows is not None
    group = layout.grouping.pieces[name][0].group
    blocks = _blocks(layout, factors, group)[term]
    join = kronecker if layout.specs[group].combine == "kronecker" else khatri_rao_columns
    parts = []
    for box in rows.boxes:
        cuts = _cut_blocks(layout, blocks, group, box)
        opened = join([open_last_mode(core, planes[:-1]) for core, planes in cuts])
        parts.append(backend_of(opened).reshape(opened, (-1, opened.shape[-1])))
    left = _join(parts)[rows.skip : rows.skip + rows.size]
    return backend_of(left).reshape(left, (layout.shapes[name][0], -1))


def scaled(x: Array, scale: float) -> Array:
    """Return ``scale * x``, and `x` itself where the scale is 1."""
    return x if scale == 1 else x * scale


def _reduce_inputs(layout: Layout, group: int, blocks: Sequence[Blocks], x: Array) -> Array:
    """Multiply by the last factors of one product, (…, g) to (…, ranks)."""
    library = backend_of(x)
    lasts = [planes[-1] for _, planes in blocks]
    if layout.specs[group].combine == "hadamard":
        eye = library.eye(x.shape[-1], **library.context(x))
        lasts = [khatri_rao_columns([eye if last is None else last for last in lasts])]
    if len(lasts) == 1:
        return x if lasts[0] is None else library.tensordot(x, lasts[0], axes=([1], [0]))
    splits = layout.terms(group)[0]
    x = library.reshape(x, (-1, *(split.shape[-1] for split in splits)))
    order = len(lasts)
    for axis, last in enumerate(lasts):
        if last is not None:
            x = library.tensordot(x, last, axes=([axis + 1], [0]))
            back = (*range(axis + 1), order, *range(axis + 1, order))
            x = library.transpose(x, back)
    return library.reshape(x, (x.shape[0], math.prod(x.shape[1:])))


def _product_of(layout: Layout, group: int) -> Callable[[Sequence[Array]], Array]:
    return kronecker if layout.specs[group].combine == "kronecker" else hadamard


def _total(terms: Iterable[Array]) -> Array:
    return functools.reduce(operator.add, terms)


def _blocks(layout: Layout, factors: Mapping[str, Array], group: int) -> list[list[Blocks]]:
    """Return the blocks of every split of each of a group's products."""
    found: list[list[Blocks]] = []
    fixed = layout.maps[group]
    for term, splits in enumerate(layout.terms(group)):
        found.append([])
        for place, split in enumerate(splits):
            index = term * len(splits) + place
            own = {
                leaf: _leading(factors[layout.block(group, index, leaf)], shape)
                for leaf, shape in split.block_shapes.items()
            }
            core = own.get("core")
            planes = [own.get(f"factor{mode}") for mode in range(len(split.sizes))]
            if isinstance(fixed, Separable):
                core, planes = _mapped_modes(fixed, split, place, core, planes)
            if split.joined:  # of lower order: its neighbouring modes are one
                tensor = tucker(core, planes)
                core = backend_of(tensor).reshape(tensor, split.shape)
                planes = [None] * len(split.shape)
            found[-1].append((core, planes))
    return found


def _mapped_modes(
    fixed: Separable, split: Split, place: int, core: Array | None, planes: list[Array | None]
) -> Blocks:
    """Apply the map of every mode to its factor, or to the core where it has none."""
    modes = len(split.shape)
    for mode in fixed.mapped(modes):
        index, size = place * modes + mode, split.shape[mode]
        plane = planes[mode]
        if plane is not None:
            planes[mode] = fixed.map_mode(plane, 0, index, size)
        else:
            core = fixed.map_mode(core, mode, index, size)
    return core, planes


def _leading(block: Array, shape: tuple[int, ...]) -> Array:
    """Return a tied block's leading slices, the block itself where it is of that shape."""
    if tuple(block.shape) == shape:
        return block
    return block[tuple(slice(size) for size in shape)]


def _box_tensor(layout: Layout, blocks: Sequence[Sequence[Blocks]], group: int, box: Box) -> Array:
    product = _product_of(layout, group)
    return _total(
        product([tucker(*cut) for cut in _cut_blocks(layout, term, group, box)]) for term in blocks
    )


def _cut_blocks(layout: Layout, blocks: Sequence[Blocks], group: int, box: Box) -> list[Blocks]:
    """Slice every split's blocks to its digits of a box over the leading modes."""
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


def _join(parts: Sequence[Array]) -> Array:
    return parts[0] if len(parts) == 1 else backend_of(*parts).concatenate(list(parts), axis=0)
