"""What several layers are made of together: computed once a pass, and cut for each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from superlora.factored import last_factor, open_rows
from superlora.layout import Layout
from superlora.maps import Map, OneHot
from superlora.reconstruct import joint_entries
from superlora.slicing import slice_of
from superlora.terms import Mapped, mapped_blocks, scaled, with_blocks
from superlora.uses import joint_sizes

# What is kept of a group, by kind and by the first of the groups that are made together.
Key = tuple[str, int]
Range = tuple[int, int]


class Stage(Protocol):
    """A step from tensors to what layers take.

    It must hold no tensor and nothing that holds the adapter, as the graph holds it.

    Attributes
    ----------
    whole : bool
        Whether all layers read the one value that it makes, and their gradients are added up
        where they read; else every layer has a part of its own.
    """

    whole: ClassVar[bool]

    def make(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return values, differentiably; computed again on the way back."""
        ...

    def cut(self, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the parts, which are linear in the values."""
        ...

    def gather(
        self, gradients: Sequence[Tensor | None], values: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return the adjoint of `cut`; None is a gradient of zero."""
        ...


@dataclass(frozen=True)
class Reader:
    """How a layer reads a value that several share.

    Attributes
    ----------
    start, stop : int
        Its range.
    map : OneHot or None
        The map that is read through; None where the value was mapped.
    size : int
        The entries after it.
    """

    start: int
    stop: int
    map: OneHot | None = None
    size: int = 0

    def read(self, value: Tensor) -> Tensor:
        """Return the range."""
        if self.map is None:
            return value[self.start : self.stop]
        found: Tensor = self.map.gather(value, self.size, self.start, self.stop)
        return found

    def add(self, gradient: Tensor, total: Tensor) -> None:
        """Add the adjoint to the gradient of the value."""
        if self.map is None:
            total[self.start : self.stop] += gradient
        else:
            self.map.scatter(gradient, total, self.size, self.start)


@dataclass(frozen=True)
class Blocks:
    """The names of tensors, and how they become the blocks of some groups.

    Attributes
    ----------
    layout : Layout
        What lies where.
    names : tuple of str
        Of the tensors.
    wanted : tuple of str
        The blocks.
    """

    layout: Layout
    names: tuple[str, ...]
    wanted: tuple[str, ...]

    def of(self, tensors: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """Return the blocks, all on the device of the first."""
        device = tensors[0].device
        given = {n: t.to(device) for n, t in zip(self.names, tensors, strict=True)}
        return with_blocks(self.layout, given, self.wanted)


@dataclass(frozen=True)
class Entries:
    """The entries of groups before their map, normalised for a one-hot map to read.

    Attributes
    ----------
    blocks : Blocks
        What they are made of.
    group : int
        The first of the groups that the map takes together.
    scale : float or torch.Tensor
        The number in front.
    """

    blocks: Blocks
    group: int
    scale: Any
    whole: ClassVar[bool] = True

    def make(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the entries before the map."""
        entries, _ = joint_entries(self.blocks.layout, self.blocks.of(tensors), self.group)
        return (scaled(entries, self.scale),)

    def cut(self, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return what the layers read."""
        fixed, size = self.map_and_size()
        assert isinstance(fixed, OneHot)
        return (fixed.normalized(values[0], size),)

    def gather(
        self, gradients: Sequence[Tensor | None], values: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return the gradient of the entries before the map."""
        (gradient,) = gradients
        fixed, size = self.map_and_size()
        assert isinstance(fixed, OneHot)
        return (None if gradient is None else fixed.normalized(gradient, size),)

    def map_and_size(self) -> tuple[Map, int]:
        """Return the map and how many entries it makes."""
        layout = self.blocks.layout
        return layout.maps[self.group], joint_sizes(layout, self.group)[1]


class Vector(Entries):
    """A vector that a map mixes, of which weights are pieces."""

    def cut(self, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the mapped vector."""
        fixed, size = self.map_and_size()
        return (fixed.apply(values[0], size),)

    def gather(
        self, gradients: Sequence[Tensor | None], values: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return the gradient of the entries before the map."""
        (gradient,) = gradients
        fixed, _ = self.map_and_size()
        return (None if gradient is None else fixed.adjoint(gradient, values[0].shape[0]),)


@dataclass(frozen=True)
class Rows:
    """The opened rows of a group, cut into those that weights need, and its last factor.

    Attributes
    ----------
    blocks : Blocks
        What they are made of.
    group : int
        The group.
    bounds : tuple of (int, int)
        The rows of every weight, in order.
    scale : float or torch.Tensor
        The number in front.
    mapped : bool
        Whether the tensors are blocks to which a map of single modes was applied.
    """

    blocks: Blocks
    group: int
    bounds: tuple[Range, ...]
    scale: Any
    mapped: bool
    whole: ClassVar[bool] = False

    def make(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return all rows, and the last factor transposed where there is one."""
        layout, group = self.blocks.layout, self.group
        names = self.blocks.names
        blocks = (
            Mapped(zip(names, tensors, strict=True)) if self.mapped else self.blocks.of(tensors)
        )
        leading = layout.radices(group, len(layout.groups[group].fold) - 1)
        part = slice_of(leading, 0, max(stop for _, stop in self.bounds))
        rows = open_rows(layout, blocks, group, part)
        last = last_factor(layout, blocks, group)
        # One of them takes the scale: the other may be a parameter itself.
        if last is None:
            return (scaled(rows, self.scale),)
        return rows, scaled(last.t().contiguous(), self.scale)

    def cut(self, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the rows of every weight, and the last factor."""
        return (*(values[0][start:stop] for start, stop in self.bounds), *values[1:])

    def gather(
        self, gradients: Sequence[Tensor | None], values: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of all rows and of the last factor."""
        count = len(self.bounds)
        starts, stops = zip(*self.bounds, strict=True)
        if starts == (0, *stops[:-1]) and all(each is not None for each in gradients[:count]):
            return (torch.cat(list(gradients[:count])), *gradients[count:])  # type: ignore[arg-type]
        rows = values[0].new_zeros(values[0].shape)
        for (start, stop), gradient in zip(self.bounds, gradients[:count], strict=True):
            if gradient is not None:
                rows[start:stop] += gradient  # where a fold is not aligned they overlap
        return (rows, *gradients[count:])


@dataclass(frozen=True)
class Modes:
    """The blocks of a group, its map applied to every mode.

    Attributes
    ----------
    blocks : Blocks
        What they are made of.
    group : int
        The group.
    """

    blocks: Blocks
    group: int
    whole: ClassVar[bool] = False

    def make(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the blocks."""
        found = self.blocks.of(tensors)
        return tuple(found[name] for name in self.blocks.wanted)

    def cut(self, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the mapped blocks."""
        given = dict(zip(self.blocks.wanted, values, strict=True))
        found = mapped_blocks(self.blocks.layout, given, self.group)
        return tuple(found[name] for name in self.blocks.wanted)

    def gather(
        self, gradients: Sequence[Tensor | None], values: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of the blocks."""
        names = self.blocks.wanted
        given = {n: g for n, g in zip(names, gradients, strict=True) if g is not None}
        found = mapped_blocks(self.blocks.layout, given, self.group, adjoint=True)
        return tuple(found.get(name) for name in names)
