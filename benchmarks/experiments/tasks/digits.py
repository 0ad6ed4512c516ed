"""The demo's ViT-S/14 on few handwritten digits: query and value weights of all blocks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from smollm import cache_folder

from experiments.classification import SOURCES, Classification
from superlora.demo.data import Images, Splits, read_digits, split
from superlora.demo.fetch import MNIST, VIT, fetch
from superlora.demo.train import Classifier
from superlora.demo.vit import load_onnx

__all__ = ["SOURCES", "drawn", "load"]


def load(
    *,
    train: int,
    validation: int,
    test: int,
    resolution: int,
    targets: Sequence[str] = ("query", "value"),
    **training: Any,
) -> Classification:
    """Return the task; the model and the digits are fetched once."""
    cache = cache_folder()
    base = load_onnx(fetch(VIT, cache))
    digits = read_digits(fetch(MNIST, cache))

    @functools.cache
    def parts(seed: int) -> Splits:
        return drawn(digits, (train, validation, test), seed)

    return Classification(
        lambda classes: Classifier(base, classes, resolution), parts, targets, **training
    )


def drawn(digits: Images, sizes: tuple[int, int, int], seed: int) -> Splits:
    """Draw the parts of a seed: those to test of a pool of their own, and of no other seed's.

    The pool has three parts of the digits in five.
    """
    train, validation, test = sizes
    count = len(digits) * 3 // 5
    pool = split(digits, train=len(digits) - count - 10, validation=10, test=count, seed=0)
    made = split(pool.train, train=train, validation=validation, test=10, seed=seed)
    place = seed % (len(pool.test) // test)
    tested = pool.test[torch.arange(place * test, (place + 1) * test)]
    return Splits(made.train, made.validation, tested)
