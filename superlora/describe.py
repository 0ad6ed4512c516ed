"""The table that ``Plan.describe`` prints."""

from __future__ import annotations

import math
from collections import Counter

from superlora.layout import Layout
from superlora.maps import Identity
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
    rows = [("groups", "entries", "fold", "splits (size:rank)", "parameters")]
    for group, count in alike.items():
        rows.append(
            (
                str(count),
                f"{group.size:,}",
                " x ".join(map(str, group.fold)),
                " (x) ".join(map(_split_text, group.splits)),
                f"{count * group.num_parameters:,}",
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


def _split_text(split: Split) -> str:
    modes = " x ".join(
        f"{size}:{rank}" if factored else f"{size}"
        for size, rank, factored in zip(split.sizes, split.ranks, split.factored, strict=True)
    )
    return modes if split.trainable_core else f"{modes}, identity core"


def _notes(layout: Layout, alike: Counter[Group]) -> list[str]:
    notes = []
    capped = sum(count for group, count in alike.items() if any(s.capped for s in group.splits))
    if capped:
        notes.append(
            f"note: rank {layout.spec.rank} exceeds a mode in {capped} of {len(layout.groups)} "
            "groups; it is un-factored there"
        )
    before = sum(math.prod(group.fold) * count for group, count in alike.items())
    after = sum(group.size * count for group, count in alike.items())
    if isinstance(layout.spec.map, Identity):
        if before > after:
            notes.append(
                f"note: the folds cover {before:,} entries; {before - after:,} are cropped"
            )
    else:
        notes.append(f"note: realised ratio {before / after:.6g}, asked {layout.spec.ratio:.6g}")
    degenerate = layout.unit_modes()
    if degenerate:
        notes.append(f"note: {degenerate}")
    return notes
