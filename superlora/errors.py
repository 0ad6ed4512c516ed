"""The one exception of our own, and what messages share."""

from collections.abc import Iterable


class AdapterError(RuntimeError):
    """An adapter was used out of order: merged twice, attached under a name in use."""


def some(items: Iterable[str], most: int = 5) -> str:
    """Return a list for a message, cut short.

    Parameters
    ----------
    items : iterable of str
        What to list.
    most : int
        How many to name.

    Returns
    -------
    str
        ``"a, b and 7 more"``.
    """
    listed = list(items)
    rest = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest
