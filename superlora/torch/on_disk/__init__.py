"""Checkpoints and adapters as files: read and written a tensor at a time, without a model."""
