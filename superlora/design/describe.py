"""The table that ``Plan.describe`` prints."""

from __future__ import annotations

import math
from collections import Counter

from superlora.design.cost_rule import FORMED, application
from superlora.design.factor_maps import unit_modes_of
from superlora.design.layout import Layout
from superlora.design.spec import Spec
from superlora.design.splits import Split
from superlora.design.supports import OF_BIAS

_GROUP = ("operations", "groups", "entries", "map", "fold", "splits (size:rank)")


def describe(layout: Layout) -> str:
    """Return a table of a layout's groups, its totals and what a user may not expect."""
    entries = [0] * len(layout.groups)
    for block, shape in layout.factor_shapes.items():
        entries[int(block.partition(".")[0])] += math.prod(shape)
    # Most groups of a large model are the same objects, which are quicker to tell apart.
    same: dict[tuple[int, int, str], list[int]] = {}
    for index, (group, own) in enumerate(zip(layout.groups, layout.specs, strict=True)):
        same.setdefault((id(group), id(own), _operations(layout, index)), []).append(index)
    alike: dict[tuple[str, ...], list[int]] = {}
    for (_, _, operations), found in same.items():
        alike.setdefault((operations, *_cells(layout, found[0])), []).extend(found)
    rows: list[tuple[str, ...]] = [(*_GROUP, "parameters", "applied")]
    for (operations, *cells, splits), found in alike.items():
        count, trained = str(len(found)), f"{sum([entries[index] for index in found]):,}"
        rows.append((operations, count, *cells, splits, trained, _applied(layout, found)))
    # Columns that say nothing are left out: one of operations, or of maps.
    columns = [own for own in zip(*rows, strict=True) if set(own[1:]) not in ({""}, {"Identity"})]
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    lines = ["  ".join(row).rstrip() for row in zip(*padded, strict=True)]
    share = layout.num_parameters / layout.num_dense
    lines.append(
        f"{len(layout.supports)} weights, {layout.num_parameters:,} trainable parameters for "
        f"{layout.num_dense:,} entries ({share:.4%})"
    )
    return "\n".join(lines + _notes(layout, list(same.values())))


def _operations(layout: Layout, group: int) -> str:
    """Return the merge operations whose supports a group holds, where there can be several."""
    if isinstance(layout.spec, Spec):
        return ""
    found = (name.partition(".")[0] for name in layout.grouping.members[group])
    return " + ".join(dict.fromkeys(found))


def _cells(layout: Layout, index: int) -> tuple[str, ...]:
    group, own = layout.groups[index], layout.specs[index]
    sign = " (x) " if own.combine == "kronecker" else " o "
    product = sign.join(map(_split_text, group.splits[: own.splits]))
    terms = f"{own.terms} terms: " if own.terms > 1 else ""
    fold = " x ".join(map(str, group.fold))
    return (f"{group.size:,}", type(own.map).__name__, fold, terms + product)


def _applied(layout: Layout, groups: list[int]) -> str:
    """Return how the weights of alike groups are applied: of each shape the first one."""
    firsts: dict[tuple[str, tuple[int, int]], str] = {}
    several = not isinstance(layout.spec, Spec)
    for group in groups:
        for name in layout.grouping.members[group]:
            operation = name.partition(".")[0] if several else ""
            firsts.setdefault((operation, layout.shapes[name]), name)
    found = [
        FORMED if operation in OF_BIAS else str(application(layout, name))
        for (operation, _), name in firsts.items()
    ]
    return " or ".join(dict.fromkeys(found))


def _split_text(split: Split) -> str:
    if split.core == "train":
        ranks = ", ".join(map(str, split.ranks))
        return f"{' x '.join(map(str, split.sizes))}, train of rank {ranks}"
    modes = " x ".join(
        f"{size}:{rank}" if factored else f"{size}"
        for size, rank, factored in zip(split.sizes, split.ranks, split.factored, strict=True)
    )
    return modes if split.core == "full" else f"{modes}, {split.core} core"


def _notes(layout: Layout, same: list[list[int]]) -> list[str]:
    notes = []
    capped = [own for own in same if any(s.capped for s in layout.groups[own[0]].splits)]
    if capped:
        ranks = {str(layout.specs[own[0]].rank) for own in capped}
        splits = [s for own in capped for s in layout.groups[own[0]].splits if s.capped]
        lowered = {split.core == "train" or all(split.factored) for split in splits}
        how = " or ".join(("un-factored", "lowered")[low] for low in sorted(lowered, reverse=True))
        notes.append(
            f"note: rank {' or '.join(sorted(ranks))} is too large for a mode in "
            f"{sum(map(len, capped))} of {len(layout.groups)} groups; it is {how} there"
        )
    before = after = 0
    for index, group in enumerate(layout.groups):
        if layout.in_place(index) or layout.specs[index].map.keeps_size:
            before += math.prod(group.fold)
            after += group.size
    if before > after:
        notes.append(f"note: the folds cover {before:,} entries; {before - after:,} are cropped")
    notes += _ratios(layout)
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
    degenerate = unit_modes_of(layout.groups, layout.specs)
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
