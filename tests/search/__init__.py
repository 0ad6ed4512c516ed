"""Tests of GLoRA: the space, the supernet, and the search in it."""
