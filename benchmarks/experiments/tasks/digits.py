"""The demo's ViT-S/14 on few handwritten digits: query and value weights of all blocks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from smollm import cache_folder

from experiments.classification import SOURCES, Classification
from superlora.demo.data import read_digits, split
from superlora.demo.fetch import MNIST, VIT, fetch
from superlora.demo.train import Classifier
from superlora.demo.vit import load_onnx

__all__ = ["SOURCES", "load"]


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
    def parts(seed: int) -> Any:
        return split(digits, train=train, validation=validation, test=test, seed=seed)

    return Classification(
        lambda classes: Classifier(base, classes, resolution), parts, targets, **training
    )
