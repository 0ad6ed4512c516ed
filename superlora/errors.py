"""The one exception of our own."""


class AdapterError(RuntimeError):
    """An adapter was used out of order: merged twice, attached under a name in use."""
