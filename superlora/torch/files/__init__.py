"""Files of adapters: written, read, and swapped into a model."""
