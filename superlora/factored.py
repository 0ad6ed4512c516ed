"""Multiply by an update that is never formed: the factors meet the inputs one by one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from superlora._backend import Array, backend_of, eye
from superlora.costs import thin
from superlora.kronecker import khatri_rao_columns, kronecker
from superlora.layout import Layout
from superlora.maps import Fourier
from superlora.reconstruct import joint_entries
from superlora.slicing import Slice
from superlora.terms import cut_blocks, joined, scaled, terms_of, with_blocks
from superlora.tucker import open_last_mode, tucker


def apply_factored(
    layout: Layout, factors: Mapping[str, Array], name: str, x: Array, scale: float, way: str
) -> Array:
    """Multiply by one weight's update without forming it.

    Parameters
    ----------
    layout : Layout
        What lies where.
    factors : mapping of str to array
        The blocks by name, frozen ones too.
    name : str
        The weight.
    x : array, (..., input width)
        Inputs of the layer.
    scale : float
        The number s in front of the equation.
    way : {"low_rank", "kronecker", "fourier"}
        One of ``layout.ways(name)``.

    Returns
    -------
    array, (..., output width)
        ``x @ ΔWᵀ``.
    """
    factors = with_blocks(layout, factors, layout.blocks_of(name))
    library = backend_of(x)
    rows, columns = layout.shapes[name]
    flat = x if len(x.shape) == 2 else library.reshape(x, (-1, columns))
    if way == "low_rank":
        left, right = low_rank_pair(layout, factors, name)
        y = apply_pair(scaled(left, scale), right, flat)
    elif way == "kronecker":
        y = scaled(_apply_kronecker(layout, factors, name, flat), scale)
    else:
        y = scaled(_apply_fourier(layout, factors, name, flat), scale)
    return y if len(x.shape) == 2 else library.reshape(y, (*x.shape[:-1], rows))


def apply_pair(left: Array, right: Array | None, x: Array) -> Array:
    """Multiply by ``left @ (I ⊗ right)ᵀ``.

    Parameters
    ----------
    left : array, (output width, q r)
        As `low_rank_pair` gives it.
    right : array, (g, r), or None
        None for the identity.
    x : array, (n, q g)
        Inputs.

    Returns
    -------
    array, (n, output width)
        Of the operands' library.
    """
    library = backend_of(left, x)
    if right is not None:
        x = library.matmul(library.reshape(x, (-1, right.shape[0])), right)
    x = library.reshape(x, (-1, left.shape[1]))
    return library.matmul(x, library.transpose(left))


def low_rank_pair(
    layout: Layout, factors: Mapping[str, Array], name: str
) -> tuple[Array, Array | None]:
    """Write one weight's update as a thin product, where its fold is aligned.

    Parameters
    ----------
    layout : Layout
        What lies where; ``layout.row_slice(name)`` must not be None.
    factors : mapping of str to array
        The blocks by name.
    name : str
        The weight.

    Returns
    -------
    left : array, (output width, q r)
        The last mode, of size g, divides the input width into q blocks. With its rank index
        left open, the rows of all other modes make a matrix of r columns, q to an output.
    right : array, (g, r), or None
        The last factors; None for the identity. ``ΔW = left @ (I_q ⊗ right)ᵀ``.
    """
    part = layout.row_slice(name)
    assert part is not None
    group = layout.grouping.pieces[name][0].group
    left = open_rows(layout, factors, group, part)
    height = layout.shapes[name][0]
    rows = backend_of(left).reshape(left, (height, -1))
    return rows, last_factor(layout, factors, group)


def open_rows(layout: Layout, factors: Mapping[str, Array], group: int, part: Slice) -> Array:
    """Reconstruct rows of all modes but the last, whose rank index stays open.

    Parameters
    ----------
    layout : Layout
        What lies where.
    factors : mapping of str to array
        The blocks by name.
    group : int
        Index of the group.
    part : Slice
        Which rows.

    Returns
    -------
    array, (rows, r)
        The ranks of all summed products one after the other.
    """
    product = layout.specs[group].combine == "kronecker"
    join = kronecker if product else khatri_rao_columns
    found = []
    for blocks in terms_of(layout, factors, group):
        parts = []
        for box in part.boxes:
            cuts = cut_blocks(layout, blocks, group, box)
            opened = join([open_last_mode(core, planes[:-1]) for core, planes in cuts])
            parts.append(backend_of(opened).reshape(opened, (-1, opened.shape[-1])))
        rows = joined(parts)
        whole = part.size == rows.shape[0]
        found.append(rows if whole else rows[part.skip : part.skip + part.size])
    return _beside(found)


def last_factor(layout: Layout, factors: Mapping[str, Array], group: int) -> Array | None:
    """Return the last factors of a group as one matrix.

    Parameters
    ----------
    layout : Layout
        What lies where.
    factors : mapping of str to array
        The blocks by name.
    group : int
        Index of the group.

    Returns
    -------
    array, (g, r), or None
        The columns of all summed products one after the other; None for the identity.
    """
    product = layout.specs[group].combine == "kronecker"
    terms = terms_of(layout, factors, group)
    if len(terms) == 1 and all(planes[-1] is None for _, planes in terms[0]) and product:
        return None
    found = []
    for blocks in terms:
        splits = layout.terms(group)[0]
        matrices = [
            _matrix_of(planes[-1], split.shape[-1], core if core is not None else planes[0])
            for (core, planes), split in zip(blocks, splits, strict=True)
        ]
        found.append(kronecker(matrices) if product else khatri_rao_columns(matrices))
    return _beside(found)


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
    left, last = low_rank_pair(layout, factors, name)
    columns = layout.shapes[name][1]
    group = layout.grouping.pieces[name][0].group
    right = _matrix_of(last, layout.groups[group].fold[-1], left)
    if columns > right.shape[0]:
        right = kronecker([eye(columns // right.shape[0], like=left), right])
    return scaled(left, scale), right


def _matrix_of(factor: Array | None, size: int, like: Array) -> Array:
    return eye(size, like=like) if factor is None else factor


def _beside(parts: Sequence[Array]) -> Array:
    return parts[0] if len(parts) == 1 else backend_of(*parts).concatenate(list(parts), axis=1)


def _apply_kronecker(layout: Layout, factors: Mapping[str, Array], name: str, x: Array) -> Array:
    """Contract the digits of the input width one after the other, (n, di) to (n, do)."""
    library = backend_of(x)
    group = layout.grouping.pieces[name][0].group
    total = None
    for blocks, splits in zip(terms_of(layout, factors, group), layout.terms(group), strict=True):
        sizes = [split.shape[1] for split in splits]
        y = x
        for index in layout.digit_order(group):
            core, planes = blocks[index]
            rows, columns = splits[index].shape
            before = y.shape[0] * math.prod(sizes[:index])
            after = math.prod(sizes[index + 1 :])
            y = library.reshape(y, (before, columns, after))
            if thin(splits[index]):
                left = open_last_mode(core, planes[:1])
                y = _matmul(left, _matmul(library.transpose(planes[1]), y))
            else:
                y = _matmul(tucker(core, planes), y)
            sizes[index] = rows
            y = library.reshape(y, (x.shape[0], math.prod(sizes)))
        total = y if total is None else total + y
    return total


def _matmul(matrix: Array, x: Array) -> Array:
    """Multiply along the middle axis, (n, columns, m) to (n, rows, m)."""
    library = backend_of(matrix, x)
    if x.shape[2] == 1:  # one product instead of n
        return library.matmul(x[:, :, 0], library.transpose(matrix))[:, :, None]
    # With a batch of its own torch copies nothing to take the matrix's gradient.
    return library.matmul(matrix[None], x)


def _apply_fourier(layout: Layout, factors: Mapping[str, Array], name: str, x: Array) -> Array:
    group = layout.grouping.pieces[name][0].group
    fixed = layout.maps[group]
    assert isinstance(fixed, Fourier)
    values, _ = joint_entries(layout, factors, group)
    return fixed.multiply(values, x)
