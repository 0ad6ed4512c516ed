"""Every output is one input: a map of gathers alone, and exactly isometric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy

from superlora._backend import Array, cast, scatter_add, take
from superlora.checks import check_count
from superlora.maps._seeded import (
    CHECKED,
    NORMALIZE,
    ROWS,
    SeededMap,
    check_enough,
    chunks,
    joined,
)
from superlora.maps.index_maps import position_type

_CHUNK = 1 << 19  # entries whose constants are made at once


@dataclass(frozen=True, kw_only=True)
class OneHot(SeededMap):
    """A matrix with one entry in each row, shared out evenly over the columns.

    Parameters
    ----------
    seed : int
        In [0, 2**64).
    shared : bool
        Whether all groups of one size have the same map.
    tiled : bool
        Whether every run of ``before`` outputs has each input once (the transpose of a
        count-sketch), or the inputs are dealt out over all outputs at random (Uni-LoRA [1]_).
    signed : bool
        Whether every output has a random sign.
    normalize : {"isometric", "variance", None}
        ``"isometric"`` divides each column by its norm, so that ``FᵀF = I`` exactly; with
        ``"variance"``, as with None, the entries are 1 or -1, and outputs are as large as
        inputs.
    stored : bool
        Whether positions and signs are kept in memory, 5 bytes an output, or drawn anew each
        time.
    window : int, optional
        Deal about so many inputs at a time out to as many outputs as take them, so that near
        outputs read near inputs, which a cache holds; `tiled` says nothing then.
    version, substream : int
        As in every map with a seed.

    Raises
    ------
    TypeError, ValueError
        If a field is out of its range.

    Notes
    -----
    ``y_i = s_i x_j(i) / sqrt(n_j(i))``, where input j is taken n_j times, which is
    ``size // before`` or one more. A slice of the outputs needs only its own. With a window the
    inputs lie one after the other, each n_j times, and every run of ``window (size // before)``
    of these outputs is permuted in itself: it reads at most ``window + 1`` consecutive inputs.

    References
    ----------
    .. [1] K. Li et al., "Uni-LoRA: One Vector is All You Need", 2025.

    Examples
    --------
    >>> import numpy as np
    >>> fixed = OneHot(seed=0, normalize=None)
    >>> fixed.apply(np.arange(1.0, 4.0), 6)
    array([-1., -3.,  2., -1., -2., -3.])
    >>> fixed.adjoint(fixed.apply(np.arange(1.0, 4.0), 6), 3)
    array([2., 4., 6.])
    """

    tiled: bool = True
    signed: bool = True
    normalize: str | None = "isometric"
    stored: bool = True
    window: int | None = None

    sliced: ClassVar[bool] = True
    reads: ClassVar[bool] = True
    choices: ClassVar = {"normalize": NORMALIZE}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None:
            check_count("window", self.window)

    def to_dict(self) -> dict[str, Any]:
        """Return the map's name and fields as plain JSON values."""
        fields = super().to_dict()
        if self.window is None:
            del fields["window"]
        return fields

    def mixes(self, before: int, size: int) -> bool:  # noqa: D102  (inherited)
        return True  # inputs are normalised for any slice

    def check(self, before: int, size: int) -> None:
        """Refuse fewer outputs than inputs."""
        check_enough(before, size, "OneHot")

    def gain(self, before: int, size: int) -> float:
        """Return the mean square of an output for inputs of mean square 1."""
        return before / size if self.normalize == "isometric" else 1.0

    def constants(self, before: int, size: int) -> dict[str, numpy.ndarray]:
        """Return the first positions and signs."""
        most = min(size, CHECKED)
        tile = self._tile(before, size)
        if (self.tiled or self.window) and tile > most:
            sources = self._dealt(self._order(tile, ROWS).forward(0, most), before, size)
        else:
            sources = self._sources(before, size, 0, most)
        return {"sources": sources} | ({"signs": self._draw_signs(0, most)} if self.signed else {})

    def operations(self, before: int, size: int) -> int:
        """Return how many multiplications `apply` takes."""
        return (self.normalize == "isometric") * before + self.signed * size

    def nbytes(self, before: int, size: int) -> int:
        """Return how many bytes of positions and signs are kept."""
        each = position_type(before).itemsize + self.signed
        return self.stored * (each * size + 8 * before)

    def gather(self, x: Array, size: int, start: int, stop: int) -> Array:
        """Return some entries of F x, of inputs that are normalised already."""
        parts = []
        for _, sources, drawn in self._runs(x, x.shape[0], size, start, stop):
            part = take(x, sources)
            parts.append(part if drawn is None else part * drawn)
        return joined(parts)

    def scatter(self, y: Array, into: Array, size: int, start: int) -> None:
        """Add the adjoint of `gather` to a torch tensor, in place."""
        for own, sources, drawn in self._runs(y, into.shape[0], size, start, start + y.shape[0]):
            into.index_add_(0, sources, y[own] if drawn is None else y[own] * drawn)

    def _runs(
        self, like: Array, before: int, size: int, start: int, stop: int
    ) -> list[tuple[slice, Array, Array | None]]:
        """Return the runs of a slice of the outputs, which inputs they take, and their signs."""
        # Whole tiles, a fixed number at a time.
        tile = self._tile(before, size)
        runs = []
        for first, last in chunks(max(1, _CHUNK // tile) * tile, size, start, stop):
            low, high = max(start, first), min(stop, last)
            inside = slice(low - first, high - first)
            sources = self._fixed(like, "_sources", before, size, first, last)[inside]
            drawn = self._fixed(like, "_draw_signs", first, last)[inside] if self.signed else None
            runs.append((slice(low - start, high - start), sources, drawn))
        return runs

    def _forward(self, x: Array, size: int, start: int, stop: int) -> Array:
        return self.gather(self.normalized(x, size), size, start, stop)

    def _backward(self, y: Array, before: int) -> Array:
        total = None
        for own, sources, drawn in self._runs(y, before, y.shape[0], 0, y.shape[0]):
            part = scatter_add(y[own] if drawn is None else y[own] * drawn, sources, before)
            total = part if total is None else total + part
        return self.normalized(total, y.shape[0])

    def normalized(self, x: Array, size: int) -> Array:
        """Divide every input by the norm of its column, where the map is isometric."""
        if self.normalize != "isometric":
            return x
        before = x.shape[0]
        return x * cast(self._fixed(x, "_weights", before, size), like=x)

    def _sources(self, before: int, size: int, first: int, last: int) -> numpy.ndarray:
        """Return which inputs are taken by outputs `first`, where a tile begins, to `last`."""
        if self.tiled or self.window:
            tile = self._tile(before, size)
            tiles = first // tile, -(-last // tile)
            places = self._orders(tile, *tiles)
            if self.window:
                places = places + numpy.arange(*tiles)[:, None] * tile
                places = places[places < size]  # of the last tile, which is cut, what is left
            places = places.reshape(-1)[: last - first]
        else:
            places = self._order(size).forward(first, last) % before
        return self._dealt(places, before, size).astype(position_type(before))

    def _tile(self, before: int, size: int) -> int:
        """Return how many outputs are permuted together."""
        return before if self.window is None else min(self.window, before) * (size // before)

    def _dealt(self, places: numpy.ndarray, before: int, size: int) -> numpy.ndarray:
        """Return the inputs at some places, where each stands as often as it is taken."""
        if self.window is None:  # every tile has each once
            return places
        whole, rest = divmod(size, before)
        longer = rest * (whole + 1)  # places of the first inputs, which are taken once more
        later = rest + (places - longer) // whole
        return numpy.where(places < longer, places // (whole + 1), later)

    def _weights(self, before: int, size: int) -> numpy.ndarray:
        whole, rest = divmod(size, before)
        place = numpy.arange(before)
        if self.tiled and self.window is None and rest:
            place = self._orders(before, whole, whole + 1, inverse=True)[0]
        return (whole + (place < rest)) ** -0.5
