"""Tables of the docs and the README that programs write, between markers ``<!-- name -->``."""

from __future__ import annotations


def between(text: str, name: str) -> str:
    """Return what stands between the markers of a table."""
    start, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"the page must have the markers of {name} once each")
    return text.split(start, 1)[1].split(end, 1)[0]


def replaced(text: str, name: str, table: str) -> str:
    """Return `text` with another table between the markers."""
    return text.replace(
        f"<!-- {name} -->\n{between(text, name)}\n<!-- /{name} -->",
        f"<!-- {name} -->\n{table}\n<!-- /{name} -->",
    )
