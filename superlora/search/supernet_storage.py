"""What a supernet stores for each layer and operation, and how an option reads it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy
from torch import Tensor

from superlora.design.supports import support_shape
from superlora.random import bits
from superlora.search.space import Option, Space

# Of one operation of one layer: the left factor and, where there are ranks, the right one.
Stored = tuple[Tensor, Tensor | None]
LEFT, RIGHT = "left", "right"


def stored_shapes(space: Space) -> dict[tuple[str, str, str], tuple[int, int]]:
    """Return the shapes of what a supernet of a space stores."""
    found = {}
    for layer, shape in dict(space.layers).items():
        for operation in dict(space.operations):
            options = space.options(layer, operation)
            ranks = [option for option in options if isinstance(option, int)]
            if set(options) <= {"none"}:
                continue
            height, width = support_shape(operation, shape)
            found[layer, operation, LEFT] = (height, max(ranks, default=1))
            if ranks:
                found[layer, operation, RIGHT] = (max(ranks), width)
    return found


def initial(space: Space, seed: int) -> Iterator[tuple[tuple[str, str, str], numpy.ndarray]]:
    """Draw what a supernet stores at the start, one tensor at a time."""
    for stream, (name, shape) in enumerate(stored_shapes(space).items()):
        if name[2] == LEFT:
            yield name, numpy.zeros(shape)
            continue
        words = bits(seed, stream, 0, math.prod(shape)) >> numpy.uint64(11)
        places = (words.astype(numpy.float64) + 0.5) * 2**-52 - 1  # in (-1, 1)
        yield name, math.sqrt(6 / sum(shape)) * places.reshape(shape)


def parts(option: Option, stored: Stored) -> tuple[Tensor, ...]:
    """Return the views of what is stored whose product an option's support is."""
    left, right = stored
    if option == "none":
        return ()
    if option == "constant":
        return (left[:1, :1],)
    if option == "vector":
        return (left[:, :1],)
    assert isinstance(option, int)
    assert right is not None
    return left[:, :option], right[:option]


def formed(parts: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Form a support tensor."""
    return (parts[0] @ parts[1] if len(parts) > 1 else parts[0]).expand(shape)
