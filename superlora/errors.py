"""The one exception of our own, and what messages share."""

from collections.abc import Iterable


class AdapterError(RuntimeError):
    """An adapter was used out of order: merged twice, attached under a name in use."""


def some(items: Iterable[str], most: int = 5) -> str:
    """Return a list for a message, cut short."""
    # A file may have written most of an item.
    listed = [own if len(own) <= 500 else f"{own[:400]} … {own[-80:]}" for own in items]
    rest = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest
