"""The equation itself: factors to the update of a group, of a weight, of an output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from superlora._backend import Array, backend_of
from superlora.folding import ravel
from superlora.kronecker import kronecker
from superlora.layout import Layout
from superlora.maps import Identity
from superlora.slicing import Box
from superlora.splitting import Split
from superlora.tucker import open_last_mode, tucker

# One split's blocks: its core, None where superdiagonal, and a factor a mode,
# None where un-factored.
Blocks = tuple[Array | None, list[Array | None]]


def group_tensor(layout: Layout, factors: Mapping[str, Array], group: int) -> Array:
    """Reconstruct a group's folded tensor, the Kronecker product of its splits.

    Parameters
    ----------
    layout : Layout
        What lies where.
    factors : mapping of str to array
        The trainable blocks by name; those of other groups are not read.
    group : int
        Index of the group.

    Returns
    -------
    array, (D_1, …, D_M)
        Before map and scale.
    """
    return kronecker([tucker(core, planes) for core, planes in _blocks(layout, factors, group)])


def weight_delta(layout: Layout, factors: Mapping[str, Array], name: str, scale: float) -> Array:
    """Form one weight's update, from the rows of the factors that it needs.

    Parameters
    ----------
    layout : Layout
        What lies where.
    factors : mapping of str to array
        The trainable blocks by name; only those of the weight's groups are read.
    name : str
        The weight.
    scale : float
        The number s in front of the equation.

    Returns
    -------
    array, (output width, input width)
        Only a map that mixes all entries makes the whole group be formed.
    """
    runs = []
    for piece in layout.grouping.pieces[name]:
        if isinstance(layout.spec.map, Identity):
            blocks = _blocks(layout, factors, piece.group)
            part = layout.piece_slice(piece)
            parts = [ravel(_box_tensor(layout, blocks, piece.group, box)) for box in part.boxes]
            runs.append(_join(parts)[part.skip : part.skip + part.size])
        else:
            runs.append(group_vector(layout, factors, piece.group)[piece.start : piece.stop])
    return scaled(backend_of(runs[0]).reshape(_join(runs), layout.shapes[name]), scale)


def group_vector(layout: Layout, factors: Mapping[str, Array], group: int) -> Array:
    """Form a whole group's vector after the map, before the scale.

    Parameters
    ----------
    layout : Layout
        What lies where.
    factors : mapping of str to array
        The trainable blocks by name.
    group : int
        Index of the group.

    Returns
    -------
    array, (size,)
        What the weights of the group are cut from.
    """
    tensor = group_tensor(layout, factors, group)
    return layout.spec.map.apply(ravel(tensor), layout.groups[group].size)


def apply_factored(
    layout: Layout, factors: Mapping[str, Array], name: str, x: Array, scale: float
) -> Array:
    """Multiply by one weight's update without forming it, where the fold is aligned.

    Parameters
    ----------
    layout : Layout
        What lies where; ``layout.row_slice(name)`` must not be None.
    factors : mapping of str to array
        The trainable blocks by name.
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
    rows = layout.row_slice(name)
    assert rows is not None
    group = layout.grouping.pieces[name][0].group
    blocks = _blocks(layout, factors, group)
    library = backend_of(x)
    outputs = layout.shapes[name][0]
    width = layout.groups[group].fold[-1]
    parts = []
    for box in rows.boxes:
        opened = kronecker(_open_box(layout, blocks, group, box))
        parts.append(library.reshape(opened, (-1, opened.shape[-1])))
    left = _join(parts)[rows.skip : rows.skip + rows.size]
    left = scaled(library.reshape(left, (outputs, -1)), scale)
    reduced = _reduce_inputs(
        library, layout.groups[group].splits, blocks, library.reshape(x, (-1, width))
    )
    y = library.tensordot(library.reshape(reduced, (-1, left.shape[1])), left, axes=([1], [1]))
    return library.reshape(y, (*x.shape[:-1], outputs))


def scaled(x: Array, scale: float) -> Array:
    """Return ``scale * x``, and `x` itself where the scale is 1."""
    return x if scale == 1 else x * scale


def _reduce_inputs(
    library: Array, splits: Sequence[Split], blocks: Sequence[Blocks], x: Array
) -> Array:
    if len(splits) == 1:
        last = blocks[0][1][-1]
        return x if last is None else library.tensordot(x, last, axes=([1], [0]))
    x = library.reshape(x, (-1, *(split.sizes[-1] for split in splits)))
    order = len(splits)
    for axis, (_, planes) in enumerate(blocks):
        if planes[-1] is not None:
            x = library.tensordot(x, planes[-1], axes=([axis + 1], [0]))
            back = (*range(axis + 1), order, *range(axis + 1, order))
            x = library.transpose(x, back)
    return x


def _blocks(layout: Layout, factors: Mapping[str, Array], group: int) -> list[Blocks]:
    found: list[Blocks] = []
    for index, split in enumerate(layout.groups[group].splits):
        prefix = f"{group}.{index}."
        core = factors[prefix + "core"] if split.trainable_core else None
        planes = [
            factors[f"{prefix}factor{mode}"] if factored else None
            for mode, factored in enumerate(split.factored)
        ]
        found.append((core, planes))
    return found


def _box_tensor(layout: Layout, blocks: Sequence[Blocks], group: int, box: Box) -> Array:
    return kronecker([tucker(*cut) for cut in _cut_blocks(layout, blocks, group, box)])


def _open_box(layout: Layout, blocks: Sequence[Blocks], group: int, box: Box) -> list[Array]:
    cuts = _cut_blocks(layout, blocks, group, box)
    return [open_last_mode(core, planes[:-1]) for core, planes in cuts]


def _cut_blocks(layout: Layout, blocks: Sequence[Blocks], group: int, box: Box) -> list[Blocks]:
    """Slice every split's blocks to its digits of a box over the leading modes."""
    splits = layout.groups[group].splits
    cuts = []
    for index, (core, planes) in enumerate(blocks):
        digits = box[index :: len(splits)]
        planes = list(planes)
        for mode, (first, last) in enumerate(digits):
            if last - first == splits[index].sizes[mode]:
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
