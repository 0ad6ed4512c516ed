"""The table that ``Plan.describe`` prints."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

from superlora.block_rules import unit_modes_of
from superlora.layout import Layout
from superlora.splitting import Group, Split
from superlora.supports import Supports


class Kind(NamedTuple):
    """What groups of one row have in common."""

    group: Group
    combine: str
    splits: int
    map: str
    operations: str


def describe(layout: Layout) -> str:
    """Return a table of a layout's groups, its totals and what a user may not expect.

    Parameters
    ----------
    layout : Layout
        What lies where.

    Returns
    -------
    str
        Alike groups share a row.
    """
    entries = [0] * len(layout.groups)
    for block, shape in layout.factor_shapes.items():
        entries[int(block.partition(".")[0])] += math.prod(shape)
    # Most groups of a large model are the same objects, which are quicker to tell apart.
    counts: Counter[tuple[int, int, str]] = Counter()
    trained: Counter[tuple[int, int, str]] = Counter()
    kinds: dict[tuple[int, int, str], Kind] = {}
    several = isinstance(layout.spec, Supports)
    for index, (group, own, number) in enumerate(
        zip(layout.groups, layout.specs, entries, strict=True)
    ):
        operations = _operations(layout, index) if several else ""
        key = (id(group), id(own), operations)
        if key not in kinds:
            kinds[key] = Kind(group, own.combine, own.splits, type(own.map).__name__, operations)
        counts[key] += 1
        trained[key] += number
    alike: Counter[Kind] = Counter()
    parameters: Counter[Kind] = Counter()
    groups: Counter[Group] = Counter()
    for key, kind in kinds.items():
        alike[kind] += counts[key]
        parameters[kind] += trained[key]
        groups[kind.group] += counts[key]
    mapped = any(kind.map != "Identity" for kind in alike)
    header = ("groups", "entries", "map", "fold", "splits (size:rank)", "parameters")
    first = ("operations",) if several else ()
    rows: list[tuple[str, ...]] = [(*first, *(header if mapped else (*header[:2], *header[3:])))]
    for kind, count in alike.items():
        rows.append(
            (
                *([kind.operations] if several else []),
                str(count),
                f"{kind.group.size:,}",
                *([kind.map] if mapped else []),
                " x ".join(map(str, kind.group.fold)),
                _splits_text(kind),
                f"{parameters[kind]:,}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    share = layout.num_parameters / layout.num_dense
    lines.append(
        f"{len(layout.supports)} weights, {layout.num_parameters:,} trainable parameters for "
        f"{layout.num_dense:,} entries ({share:.4%})"
    )
    return "\n".join(lines + _notes(layout, groups))


def _operations(layout: Layout, group: int) -> str:
    """Return the merge operations whose supports a group holds."""
    found = (name.partition(".")[0] for name in layout.grouping.members[group])
    return " + ".join(dict.fromkeys(found))


def _splits_text(kind: Kind) -> str:
    sign = " (x) " if kind.combine == "kronecker" else " o "
    terms = len(kind.group.splits) // kind.splits
    product = sign.join(map(_split_text, kind.group.splits[: kind.splits]))
    return product if terms == 1 else f"{terms} terms: {product}"


def _split_text(split: Split) -> str:
    if split.core == "train":
        ranks = ", ".join(map(str, split.ranks))
        return f"{' x '.join(map(str, split.sizes))}, train of rank {ranks}"
    modes = " x ".join(
        f"{size}:{rank}" if factored else f"{size}"
        for size, rank, factored in zip(split.sizes, split.ranks, split.factored, strict=True)
    )
    return modes if split.core == "full" else f"{modes}, {split.core} core"


def _how_capped(alike: Counter[Group]) -> str:
    capped = [split for group in alike for split in group.splits if split.capped]
    whole = {split.core == "train" or all(split.factored) for split in capped}
    return " or ".join(
        word for word, found in (("lowered", True), ("un-factored", False)) if found in whole
    )


def _notes(layout: Layout, alike: Counter[Group]) -> list[str]:
    notes = []
    capped = sum(count for group, count in alike.items() if any(s.capped for s in group.splits))
    if capped:
        pairs = zip(layout.groups, layout.specs, strict=True)
        ranks = {str(own.rank) for group, own in pairs if any(s.capped for s in group.splits)}
        notes.append(
            f"note: rank {' or '.join(sorted(ranks))} exceeds a mode in {capped} of "
            f"{len(layout.groups)} groups; it is {_how_capped(alike)} there"
        )
    notes += _cropped(layout) + _ratios(layout)
    kept = sum(fixed.nbytes(before, size) for fixed, before, size in layout.map_uses())
    if kept:
        notes.append(f"note: maps keep {kept / 1e6:,.1f} MB in memory, and nothing in a file")
    if layout.inner:
        makes = sum(math.prod(layout.trainable[block]) for block in layout.inner)
        vectors = {inner.name: inner for inner in layout.inner.values()}
        names = ", ".join(sorted({type(inner.map).__name__ for inner in vectors.values()}))
        takes = sum(inner.before for inner in vectors.values())
        notes.append(
            f"note: {makes:,} entries of {len(layout.inner)} blocks are made of {takes:,} "
            f"parameters: {names}"
        )
    if layout.frozen:
        entries = sum(math.prod(layout.block_shapes[block]) for block in layout.frozen)
        sources = ", ".join(sorted(set(layout.frozen.values())))
        notes.append(f"note: {entries:,} entries of {len(layout.frozen)} blocks frozen: {sources}")
    notes += _axes(layout)
    degenerate = unit_modes_of(layout)
    if degenerate:
        notes.append(f"note: {degenerate}")
    return notes


def _axes(layout: Layout) -> list[str]:
    """Say which matrices the weights are that have more axes than two."""
    notes = []
    for axes, count in Counter(a for a in layout.axes.values() if not a.plain).items():
        number = f"{axes.matrices} matrices" if axes.stack else "a matrix"
        notes.append(
            f"note: {count} of shape {axes.shape}, {'each ' * (count > 1)}as {number} of "
            f"{axes.out} x {axes.matrix[1]}"
        )
    return notes


def _cropped(layout: Layout) -> list[str]:
    """Say how many entries the folds have more than the groups that they cover."""
    covers = [
        (math.prod(group.fold), group.size)
        for index, group in enumerate(layout.groups)
        if layout.in_place(index) or layout.specs[index].map.keeps_size
    ]
    before, after = (sum(sizes) for sizes in zip(*covers, strict=True)) if covers else (0, 0)
    if before == after:
        return []
    return [f"note: the folds cover {before:,} entries; {before - after:,} are cropped"]


def _ratios(layout: Layout) -> list[str]:
    """Say what share of their entries the groups of every map and ratio have before it."""
    entries: dict[tuple[str, str], list[int]] = {}
    for index, (group, own) in enumerate(zip(layout.groups, layout.specs, strict=True)):
        if own.map.keeps_size:
            continue
        total = entries.setdefault((type(own.map).__name__, _asked(layout, index)), [0, 0])
        total[0] += group.before
        total[1] += group.size
    return [
        f"note: realised ratio {f'of {name} ' * (len(entries) > 1)}{before / after:.6g}{asked}"
        for (name, asked), (before, after) in entries.items()
    ]


def _asked(layout: Layout, group: int) -> str:
    """Return what the spec says of the entries before a map, if that decides."""
    own = layout.specs[group]
    if own.map.fixed_entries(layout.place(group)) is not None:
        return ", that of the map"
    if own.size is not None:
        return f", asked {own.size:,} entries"
    if isinstance(own.fold, tuple) and own.ratio == 1 and not layout.in_place(group):
        return ", that of the fold"
    return f", asked {own.ratio:.6g}"
