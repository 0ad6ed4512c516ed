"""The fastfood projection: two Walsh–Hadamard transforms around random numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy

from superlora._backend import Array, backend_of, take
from superlora.maps._seeded import (
    CHECKED,
    NORMALIZE,
    NORMALS,
    ROWS,
    SeededMap,
    chunks,
    joined,
    scale_of,
)
from superlora.maps.index_maps import padded, position_type
from superlora.maps.permutations import check_size
from superlora.maps.walsh_hadamard import next_power_of_two, transform_cropped, transform_padded

_CHUNK = 1 << 18  # entries of stacked blocks that are worked out at once


def _run(width: int) -> int:
    return max(1, _CHUNK // width) * width


@dataclass(frozen=True, kw_only=True)
class Fastfood(SeededMap):
    """SuperLoRA's projection, ``vec(x) H' diag(G) Π H diag(B)``.

    Parameters
    ----------
    seed : int
        In [0, 2**64).
    shared : bool
        Whether all groups of one size have the same map.
    order : {"paper", "le"}
        Where the signs B are: on the outputs (SuperLoRA [1]_), which leaves norms as they
        are, or on the inputs (Le et al. [2]_), which spreads inputs that have a structure.
    blocks : {"single", "stacked"}
        One transform of at least as many entries as outputs, cropped (SuperLoRA); or one of at
        least as many as inputs for each run of outputs (Le et al.), in which a slice of the
        outputs needs only its blocks.
    values : {"normal", "sign"}
        G: Gaussian, or random signs, for which F is better conditioned.
    normalize : {"isometric", "variance", None}
        Divide so that ``E |F x|² = |x|²``, so that ``E y_i²`` is the inputs' mean square, or
        not at all.
    stored : bool
        Whether Π, G and B are kept in memory, or drawn anew each time.
    version, substream : int
        As in every map with a seed.

    Raises
    ------
    TypeError, ValueError
        If a field is out of its range.

    Notes
    -----
    With n the next power of two, of the larger of ``before`` and ``size`` (single) or of
    ``before`` alone (stacked), and H the unnormalised Walsh–Hadamard matrix::

        paper:  y = c B ∘ (H Π (G ∘ (H pad(x))))[:size]
        le:     y = c (H (G ∘ (Πᵀ (H (B ∘ pad(x))))))[:size]

    ``c = 1 / sqrt(n size)`` is isometric in the mean over G, for every x, Π and B [1]_. The map
    of the paper from p to N is the transpose of that of Le et al. from N to p. The first
    transform costs ``d log d``, d the next power of two of the inputs: the rest repeats.

    References
    ----------
    .. [1] X. Chen et al., "SuperLoRA: Parameter-Efficient Unified Adaptation for
       Large Vision Models", 2024, Section 2.
    .. [2] Q. Le, T. Sarlós and A. Smola, "Fastfood: Approximating Kernel Expansions in
       Loglinear Time", 2013.

    Examples
    --------
    >>> import numpy as np
    >>> fixed = Fastfood(seed=0, values="sign")
    >>> y = fixed.apply(np.array([1.0, -2.0, 0.5]), 8)
    >>> float((y @ y).round(12)), float(fixed.adjoint(y, 3)[1].round(12))
    (5.25, -2.0)
    """

    order: str = "paper"
    blocks: str = "single"
    values: str = "normal"
    normalize: str | None = "isometric"
    stored: bool = True

    choices: ClassVar = {
        "order": ("paper", "le"),
        "blocks": ("single", "stacked"),
        "values": ("normal", "sign"),
        "normalize": NORMALIZE,
    }

    def mixes(self, before: int, size: int) -> bool:  # noqa: D102  (inherited)
        # Of a stack of transforms a slice takes those that it meets, whole.
        return super().mixes(before, size) or before > size

    @property
    def sliced(self) -> bool:  # type: ignore[override]
        """Whether a slice costs less than the whole."""
        return self.blocks == "stacked"

    def check(self, before: int, size: int) -> None:
        """Refuse a transform of more entries than there are permutations of."""
        check_size(self._blocks(before, size)[0])

    def gain(self, before: int, size: int) -> float:
        """Return the mean square of an output for inputs of mean square 1."""
        width = 1 if self.normalize else self._blocks(before, size)[0]
        return before * width * scale_of(self.normalize, before, size) ** 2

    def constants(self, before: int, size: int) -> dict[str, numpy.ndarray]:
        """Return the first entries of B, G and Π."""
        width, _ = self._blocks(before, size)
        most = min(width, CHECKED)
        return {
            "signs": self._draw_signs(0, most),
            "values": self._draw_values(0, most),
            "positions": self._order(width, ROWS).forward(0, most),
        }

    def operations(self, before: int, size: int) -> int:
        """Return about how many additions and multiplications `apply` takes."""
        width, count = self._blocks(before, size)
        small = next_power_of_two(before)
        first = small * small.bit_length() * (1 if self.order == "paper" else count)
        return first + count * width * width.bit_length() + 2 * count * width

    def nbytes(self, before: int, size: int) -> int:
        """Return how many bytes of Π, its inverse, G and B are kept."""
        width, count = self._blocks(before, size)
        each = 2 * position_type(width).itemsize + (4 if self.values == "normal" else 1) + 1
        return self.stored * each * width * count

    def _blocks(self, before: int, size: int) -> tuple[int, int]:
        """Return the entries of a transform and how many there are."""
        if self.blocks == "single":
            return next_power_of_two(max(before, size)), 1
        width = next_power_of_two(before)
        return width, -(-size // width)

    def _scales(self, before: int, size: int, width: int) -> tuple[float, float]:
        """Return what the first and the second transform are multiplied by."""
        if self.normalize is None:
            return 1.0, 1.0
        return float(width) ** -0.5, scale_of(self.normalize, before, size)

    def _forward(self, x: Array, size: int, start: int, stop: int) -> Array:
        width, count = self._blocks(x.shape[0], size)
        scales = self._scales(x.shape[0], size, width)
        on_outputs = self.order == "paper"
        spread = transform_padded(x, width, scales[0]) if on_outputs else None
        parts = []
        for first, last in chunks(_run(width), count * width, start, stop):
            end = min(last, size)
            if not on_outputs:
                signed = x * self._rows(x, "_draw_signs", width, first, last)[:, : x.shape[0]]
                spread = transform_padded(signed, width, scales[0])
            z = self._middle(spread, width, first, last, on_outputs)
            y = transform_cropped(z, min(width, size), scales[1])
            y = backend_of(x).reshape(y, (-1,))[: end - first]
            if on_outputs:
                y = y * self._fixed(x, "_draw_signs", first, end)
            parts.append(y[max(start - first, 0) : stop - first])
        return joined(parts)

    def _backward(self, y: Array, before: int) -> Array:
        size = y.shape[0]
        width, count = self._blocks(before, size)
        scales = self._scales(before, size, width)
        on_outputs = self.order == "paper"
        total = None
        for first, last in chunks(_run(width), count * width, 0, size):
            end = min(last, size)
            part = y[first:end]
            if on_outputs:
                part = part * self._fixed(y, "_draw_signs", first, end)
            if count > 1:
                part = backend_of(y).reshape(padded(part, last - first), (-1, width))
            z = transform_padded(part, width, scales[1])
            z = self._middle(z, width, first, last, not on_outputs)
            if not on_outputs:
                z = transform_cropped(z, before, scales[0])
                z = z * self._rows(y, "_draw_signs", width, first, last)[:, :before]
            row = z[0] if last - first == width else backend_of(y).sum(z, axis=0)
            total = row if total is None else total + row
        return transform_cropped(total, before, scales[0]) if on_outputs else total

    def _middle(self, z: Array, width: int, first: int, last: int, permuted: bool) -> Array:
        """Multiply rows by G and permute them by Π, or the other way round by its inverse."""
        library = backend_of(z)
        numbers = self._rows(z, "_draw_values", width, first, last)
        z = z * numbers if permuted else z
        blocks = first // width, last // width
        positions = self._fixed(z, "_draw_positions", width, *blocks, not permuted)
        z = library.reshape(take(library.reshape(z, (-1,)), positions), (-1, width))
        return z if permuted else z * numbers

    def _rows(self, like: Array, draw: str, width: int, first: int, last: int) -> Array:
        return self._fixed(like, draw, first, last).reshape((-1, width))

    def _draw_positions(self, width: int, first: int, last: int, inverse: bool) -> numpy.ndarray:
        rows = self._orders(width, first, last, inverse)
        rows = rows + numpy.arange(last - first)[:, None] * width
        return rows.reshape(-1).astype(position_type(rows.size))

    def _draw_values(self, start: int, stop: int) -> numpy.ndarray:
        draw = self._draw_normals if self.values == "normal" else self._draw_signs
        return draw(start, stop, NORMALS)
