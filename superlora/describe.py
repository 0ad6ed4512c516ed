"""The table that ``Plan.describe`` prints."""

from __future__ import annotations

import math
from collections import Counter

from superlora.block_rules import unit_modes_of
from superlora.layout import Layout
from superlora.splitting import Group, Split


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
    alike = Counter(layout.groups)
    parameters: Counter[Group] = Counter()
    for block, shape in layout.factor_shapes.items():
        parameters[layout.groups[int(block.partition(".")[0])]] += math.prod(shape)
    rows = [("groups", "entries", "fold", "splits (size:rank)", "parameters")]
    for group, count in alike.items():
        rows.append(
            (
                str(count),
                f"{group.size:,}",
                " x ".join(map(str, group.fold)),
                _splits_text(layout, group),
                f"{parameters[group]:,}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    share = layout.num_parameters / layout.num_dense
    lines.append(
        f"{len(layout.shapes)} weights, {layout.num_parameters:,} trainable parameters for "
        f"{layout.num_dense:,} entries ({share:.4%})"
    )
    return "\n".join(lines + _notes(layout, alike))


def _splits_text(layout: Layout, group: Group) -> str:
    spec = layout.specs[layout.groups.index(group)]
    sign = " (x) " if spec.combine == "kronecker" else " o "
    terms = len(group.splits) // spec.splits
    product = sign.join(map(_split_text, group.splits[: spec.splits]))
    return product if terms == 1 else f"{terms} terms: {product}"


def _split_text(split: Split) -> str:
    modes = " x ".join(
        f"{size}:{rank}" if factored else f"{size}"
        for size, rank, factored in zip(split.sizes, split.ranks, split.factored, strict=True)
    )
    return modes if split.core == "full" else f"{modes}, {split.core} core"


def _how_capped(alike: Counter[Group]) -> str:
    capped = [split for group in alike for split in group.splits if split.capped]
    whole = {all(split.factored) for split in capped}
    return " or ".join(
        word for word, found in (("lowered", True), ("un-factored", False)) if found in whole
    )


def _notes(layout: Layout, alike: Counter[Group]) -> list[str]:
    notes = []
    capped = sum(count for group, count in alike.items() if any(s.capped for s in group.splits))
    if capped:
        notes.append(
            f"note: rank {layout.spec.rank} exceeds a mode in {capped} of {len(layout.groups)} "
            f"groups; it is {_how_capped(alike)} there"
        )
    before = sum(group.before * count for group, count in alike.items())
    after = sum(group.size * count for group, count in alike.items())
    if all(map(layout.identity, range(len(layout.groups)))):
        if before > after:
            notes.append(
                f"note: the folds cover {before:,} entries; {before - after:,} are cropped"
            )
    else:
        notes.append(f"note: realised ratio {before / after:.6g}, asked {layout.spec.ratio:.6g}")
    if layout.frozen:
        entries = sum(math.prod(layout.block_shapes[block]) for block in layout.frozen)
        sources = ", ".join(sorted(set(layout.frozen.values())))
        notes.append(f"note: {entries:,} entries of {len(layout.frozen)} blocks frozen: {sources}")
    degenerate = unit_modes_of(layout)
    if degenerate:
        notes.append(f"note: {degenerate}")
    return notes
