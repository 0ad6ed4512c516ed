"""Row slices: one weight's part of a folded group, as plain slices of the factors.

A group's vector is read in row-major order over the digits of its modes, split 1
most significant within each mode. A range of it is a few boxes of digits, and a
box of a Kronecker product of Tucker tensors is the same expression with sliced
factors. So one weight is formed without the group. Integers only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from superlora.design.fold_shape import ceil_divide

Box = tuple[tuple[int, int], ...]

# A range may be formed this fraction wider at each end, if that saves boxes.
_WASTE = 8


@dataclass(frozen=True)
class Slice:
    """The boxes that hold a range of a group's vector, and a little around it."""

    boxes: tuple[Box, ...]  # one after the other, each read in row-major order
    skip: int  # entries before the range
    size: int  # of the range


def slice_of(radices: Sequence[int], start: int, stop: int) -> Slice:
    """Plan the boxes that hold ``start <= position < stop``."""
    size = stop - start
    leading, stride = 0, math.prod(radices)
    # Cut at the coarsest digit that fits the range, or nearly does.
    while (start % stride or stop % stride) and stride * _WASTE > size:
        stride //= radices[leading]
        leading += 1
    rest = tuple((0, radix) for radix in radices[leading:])
    first, last = start // stride, ceil_divide(stop, stride)
    found = tuple((*box, *rest) for box in boxes(radices[:leading], first, last))
    return Slice(found, start - first * stride, size)


def boxes(radices: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Cut a range of flat positions into boxes of mixed-radix digits."""
    if not radices:
        yield ()
        return
    stride = math.prod(radices[1:])
    while start < stop:
        digit, skipped = divmod(start, stride)
        if not skipped and start + stride <= stop:
            last = stop // stride
            yield ((digit, last), *((0, radix) for radix in radices[1:]))
            start = last * stride
            continue
        end = min(stop, (digit + 1) * stride)
        for box in boxes(radices[1:], skipped, end - digit * stride):
            yield ((digit, digit + 1), *box)
        start = end
