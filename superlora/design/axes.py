"""`Axes`: of what kind each axis of a weight is."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from superlora.checks import check_count, hashable


@dataclass(frozen=True, init=False)
class Axes:
    """The axes of a weight by their kind, in the order (stack, out, in, window).

    Parameters
    ----------
    out, in_ : int
        Output and input width.
    window : int or tuple of int
        Axes of a convolution's window.
    stack : int or tuple of int
        Axes along which whole weights lie side by side: experts, or heads kept apart.

    Raises
    ------
    TypeError, ValueError
        If a size is not an integer of at least 1.

    Notes
    -----
    Inside, a weight is the matrix to which row-major order reshapes it: the rows are the outputs
    of one entry of the stack after another, the columns inputs and window.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.Axes(stack=8, out=64, in_=32).shape, sl.Axes(out=64, in_=3, window=(7, 7)).matrix
    ((8, 64, 32), (64, 147))
    >>> plan = sl.Plan(sl.lora(rank=4), {"experts": sl.Axes(stack=8, out=64, in_=32)})
    >>> len(plan.factor_shapes), plan.delta(plan.init(), "experts").shape
    (16, (8, 64, 32))
    """

    out: int
    in_: int
    window: tuple[int, ...]
    stack: tuple[int, ...]

    def __init__(
        self,
        out: int,
        in_: int,
        window: int | Sequence[int] = (),
        stack: int | Sequence[int] = (),
    ) -> None:
        for name, size in (("out", out), ("in_", in_)):
            object.__setattr__(self, name, check_count(name, hashable(size)))
        for name, sizes in (("window", window), ("stack", stack)):
            several = hashable(sizes if isinstance(sizes, Sequence) else (sizes,))
            object.__setattr__(self, name, tuple(check_count(name, size) for size in several))

    @classmethod
    def of(cls, shape: object, name: str = "shape") -> Axes:
        """Return the axes that a shape has without saying it.

        Parameters
        ----------
        shape : (int, int), (int, int, int, int) or Axes
            (out, in), or (out, in, window, window).
        name : str
            What an error message calls it.

        Returns
        -------
        Axes
            Those given as they are.

        Raises
        ------
        TypeError
            If a size is not an integer.
        ValueError
            If the shape has another number of axes, or a size is below 1.

        Examples
        --------
        >>> Axes.of((64, 3, 7, 7))
        Axes(out=64, in_=3, window=(7, 7), stack=())
        """
        if isinstance(shape, Axes):
            return shape
        sizes: Any = hashable(shape) if isinstance(shape, (tuple, list)) else ()
        if len(sizes) not in (2, 4):
            raise ValueError(
                f"{name} must be (output width, input width) or (output, input, window, window): "
                f"got {shape!r}{_hint(sizes)}"
            )
        for index, size in enumerate(sizes):
            check_count(f"{name}[{index}]", size)
        return _axes(*sizes[:2], sizes[2:])

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """The sizes of all axes, in order."""
        return (*self.stack, self.out, self.in_, *self.window)

    @functools.cached_property
    def matrix(self) -> tuple[int, int]:
        """The shape as a matrix."""
        return self.matrices * self.out, self.in_ * math.prod(self.window)

    @functools.cached_property
    def matrices(self) -> int:
        """How many weights the stack holds, 1 without one."""
        return math.prod(self.stack)

    @functools.cached_property
    def plain(self) -> bool:
        """Whether there are just outputs and inputs."""
        return not self.window and not self.stack

    @functools.cached_property
    def entries(self) -> int:
        """Entries of the weight."""
        return math.prod(self.shape)


# Most weights of a large model are alike.
_axes = functools.lru_cache(maxsize=4096)(Axes)


def _hint(sizes: Sequence[object]) -> str:
    """Say what to write for axes that could be of several kinds."""
    if len(sizes) == 3:
        one, two, three = sizes
        return (
            f"; write superlora.Axes(stack={one}, out={two}, in_={three}) or "
            f"superlora.Axes(out={one}, in_={two}, window={three})"
        )
    return "; say which axes they are, as superlora.Axes(stack=…, out=…, in_=…)" * (len(sizes) > 4)
