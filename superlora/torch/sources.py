"""`Sources`: what each layer's update is made of, shared between layers where it can be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from superlora.costs import open_width
from superlora.layout import Layout
from superlora.maps import Fastfood, OneHot, Separable
from superlora.shapes import ceil_divide
from superlora.terms import Mapped, scaled, with_blocks
from superlora.torch.formed import transforms, without_autocast
from superlora.torch.shared import Read, Shared, Sink
from superlora.torch.stages import Blocks, Entries, Key, Modes, Range, Reader, Rows, Vector
from superlora.uses import joint_sizes

# Opened rows (rows, r), and the last factor transposed, (r, g).
LEFT, RIGHT = "left", "right"
# A group's opened rows are made at once if they are this many times fewer than its entries.
_LEAST = 8
# Gives the tensor of a name.
Find = Callable[[str], Tensor]


class Entered(dict[str, Tensor]):
    """Entries before a one-hot map with their tokens, and how a layer reads each of them."""

    def __init__(self, found: Any, readers: list[tuple[Sink, Reader]]) -> None:
        super().__init__(found)
        self.readers = readers

    def pairs(self) -> Iterator[tuple[Tensor, Tensor, Sink, Reader]]:
        """Yield value, token, sink and reader of every piece."""
        for index, own in enumerate(self.readers):
            yield self[f"value.{index}"], self[f"token.{index}"], *own


def again(blocks: dict[str, Tensor]) -> Callable[[Any], dict[str, Tensor]]:
    """Return what makes the same kind of mapping of other tensors."""
    if isinstance(blocks, Entered):
        readers = blocks.readers
        return lambda found: Entered(found, readers)
    kind = type(blocks)
    return lambda found: kind(found)


class Sources:
    """How the layers of a plan get what their updates are made of.

    Parameters
    ----------
    layout : Layout
        What lies where.

    Attributes
    ----------
    vectors : dict of str to list of (int, Range)
        For each layer cut from vectors that a map mixes: group and bounds of every piece.
    entries : dict of str to list of (int, Range)
        The same for layers that read the entries before a one-hot map.
    rows : dict of str to (int, int)
        For each layer of a group of several that has opened rows: the group, and which of its
        layers it is.
    modes : dict of str to int
        For each layer of a group of several with a map of single modes: the group.
    names, blocks : dict of str to tuple of str
        For each layer the names of the tensors that it is made from, and of its blocks.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.shared = Shared()
        self.vectors: dict[str, list[tuple[int, Range]]] = {}
        self.rows: dict[str, tuple[int, int]] = {}
        self.modes: dict[str, int] = {}
        self.entries: dict[str, list[tuple[int, Range]]] = {}
        self._kinds: dict[int, type[Entries]] = {}
        self._bounds: dict[int, tuple[Range, ...]] = {}  # of opened rows
        self._last: dict[str, list[Key]] = {}
        self._blocks: dict[int, Blocks] = {}
        # Asked at every pass; plain dicts, which torch.compile traces.
        self.names = {name: layout.inputs_of(name) for name in layout.shapes}
        self.blocks = {name: layout.blocks_of(name) for name in layout.shapes}
        self._smallest = {name: layout.smallest_blocks(name) for name in layout.shapes}
        self._order = {name: index for index, name in enumerate(layout.shapes)}
        self._find_vectors()
        for group in range(len(layout.groups)):
            self._find_rows(group)

    def _find_vectors(self) -> None:
        layout = self.layout
        bounds: dict[int, list[Range]] = {}
        last: dict[int, str] = {}
        for name, pieces in layout.grouping.pieces.items():
            for piece in pieces:
                first = layout.joint(piece.group)[0]
                bounds.setdefault(first, []).append(layout.position(piece))
                last[first] = name
        for first, found in bounds.items():
            if len(found) > 1 and not layout.identity(first):
                kind = self._kind_of(first, min(stop - start for start, stop in found))
                if kind is not None:
                    self._kinds[first] = kind
                    self._last.setdefault(last[first], []).append(("vector", first))
        for name, pieces in layout.grouping.pieces.items():
            places = [(layout.joint(p.group)[0], layout.position(p)) for p in pieces]
            kinds = [self._kinds.get(first) for first, _ in places]
            if all(kind is Entries for kind in kinds):
                self.entries[name] = places
            elif Vector in kinds:
                self.vectors[name] = places
            else:
                continue
            for first, _ in places:
                self._blocks.setdefault(first, self._blocks_of(first))

    def _kind_of(self, group: int, least: int) -> type[Entries] | None:
        fixed = self.layout.maps[group]
        before, _ = joint_sizes(self.layout, group)
        if isinstance(fixed, OneHot):
            return Entries
        # What keeps the size has as many entries to be formed before it, for any slice; of a
        # stack of transforms a slice takes those that it meets, whole.
        mixes = fixed.keeps_size or (isinstance(fixed, Fastfood) and before > least)
        return Vector if mixes or not fixed.sliced else None

    def _find_rows(self, group: int) -> None:
        layout = self.layout
        names = layout.grouping.members[group]
        if len(names) < 2 or not layout.identity(group) or layout.specs[group].tied:
            return
        pieces = [layout.grouping.pieces[name] for name in names]
        if any(len(own) > 1 for own in pieces):
            return
        self._blocks[group] = self._blocks_of(group)
        if isinstance(layout.maps[group], Separable):
            self.modes.update(dict.fromkeys(names, group))
            self._last.setdefault(names[-1], []).append(("modes", group))
        fold, splits = layout.groups[group].fold, layout.groups[group].splits
        # Of one matrix the rows are those of its first factor; else there must be fewer of them
        # than entries of the updates.
        few = _LEAST * open_width(layout, group) <= fold[-1]
        if len(fold) < 2 or not (few or (len(fold) == 2 and len(splits) == 1)):
            return
        width = fold[-1]
        bounds = [(p.start // width, ceil_divide(p.stop, width)) for (p,) in pieces]
        self._bounds[group] = tuple(bounds)
        self._last.setdefault(names[-1], []).append(("rows", group))
        self.rows.update({name: (group, index) for index, name in enumerate(names)})

    def _blocks_of(self, group: int) -> Blocks:
        layout = self.layout
        return Blocks(layout, layout.inputs_of_joint(group), layout.blocks_of_joint(group))

    def of(
        self, name: str, device: torch.device, find: Find, scale: float | Tensor
    ) -> dict[str, Tensor]:
        """Return what one layer's update is made of, the scale multiplied in.

        Parameters
        ----------
        name : str
            The layer.
        device : torch.device
            Where it is needed.
        find : callable
            Gives the tensor of a name.
        scale : float or torch.Tensor
            The number in front of the update.

        Returns
        -------
        dict of str to torch.Tensor
            The pieces of its vector, by index; or `LEFT` and maybe `RIGHT`; or its blocks by
            name, mapped ones in a `Mapped`.
        """
        if name in self.vectors:
            pieces = [self._piece(name, *place, find, scale) for place in self.vectors[name]]
            return {str(index): piece.to(device) for index, piece in enumerate(pieces)}
        if not self._shares(find, name):
            return self._own(name, device, find, scale)
        if name in self.entries and find(self.names[name][0]).device == device:
            return self._entered(name, find, scale)
        if name in self.rows:
            group, index = self.rows[name]
            parts = self._rows(name, group, find, scale)
            chosen = (parts[index], *parts[len(self._bounds[group]) :])
            return {n: p.to(device) for n, p in zip((LEFT, RIGHT), chosen, strict=False)}
        if name in self.modes:
            group = self.modes[name]
            mapped = self._mapped(name, group, find)
            moved = [block.to(device) for block in mapped]
            blocks = Mapped(zip(self._blocks[group].wanted, moved, strict=True))
            return self._with_scale(name, blocks, scale)
        return self._own(name, device, find, scale)

    def _shares(self, find: Find, name: str) -> bool:
        # A compiler computes alike things once by itself; what a transform makes ends with it.
        if torch.compiler.is_compiling() or transforms():
            return False
        return not find(self.names[name][0]).is_meta

    def _own(
        self, name: str, device: torch.device, find: Find, scale: float | Tensor
    ) -> dict[str, Tensor]:
        layout = self.layout
        blocks: Mapping[str, Tensor] = {n: find(n).to(device) for n in self.names[name]}
        if layout.inner:
            own = self.blocks[name]
            with without_autocast(device):
                blocks = with_blocks(layout, blocks, own)
            blocks = {block: blocks[block] for block in own}
        return self._with_scale(name, dict(blocks), scale)

    def _with_scale(
        self, name: str, blocks: dict[str, Tensor], scale: float | Tensor
    ) -> dict[str, Tensor]:
        # The update is linear in each block, so the scale goes into the smallest of
        # every product: one place for forward, backward, merge and export.
        for block in self._smallest[name]:
            blocks[block] = scaled(blocks[block], scale)
        return blocks

    def _piece(
        self, name: str, first: int, bounds: Range, find: Find, scale: float | Tensor
    ) -> Tensor:
        if first in self._kinds and self._shares(find, name):
            value, token, sink, reader = self._read(name, first, bounds, find, scale)
            piece: Tensor = Read.apply(token, value, sink, reader)  # type: ignore[no-untyped-call]
            return piece
        blocks = self._blocks[first]
        tensors = [find(n) for n in blocks.names]
        stage = Vector(blocks, first, scale)
        with without_autocast(tensors[0].device):
            return stage.cut(stage.make(tensors))[0][slice(*bounds)]

    def _entered(self, name: str, find: Find, scale: float | Tensor) -> Entered:
        found, readers = {}, []
        for index, place in enumerate(self.entries[name]):
            value, token, sink, reader = self._read(name, *place, find, scale)
            found[f"value.{index}"], found[f"token.{index}"] = value, token
            readers.append((sink, reader))
        return Entered(found, readers)

    def _read(
        self, name: str, first: int, bounds: Range, find: Find, scale: float | Tensor
    ) -> tuple[Tensor, Tensor, Sink, Reader]:
        blocks = self._blocks[first]
        tensors = tuple(find(n) for n in blocks.names)
        stage = self._kinds[first](blocks, first, scale)
        (value, token), sink = self.shared.parts(
            ("vector", first), stage, tensors, (scale,), self._order[name]
        )
        fixed, size = stage.map_and_size()
        reader = Reader(*bounds, fixed, size) if isinstance(fixed, OneHot) else Reader(*bounds)
        return value, token, sink, reader

    def _rows(self, name: str, group: int, find: Find, scale: float | Tensor) -> tuple[Tensor, ...]:
        blocks = self._blocks[group]
        mapped = name in self.modes
        if mapped:
            tensors = self._mapped(name, group, find)
            blocks = Blocks(self.layout, blocks.wanted, blocks.wanted)
        else:
            tensors = tuple(find(n) for n in blocks.names)
        stage = Rows(blocks, group, self._bounds[group], scale, mapped)
        return self.shared.parts(("rows", group), stage, tensors, (scale,), self._order[name])[0]

    def _mapped(self, name: str, group: int, find: Find) -> tuple[Tensor, ...]:
        blocks = self._blocks[group]
        tensors = tuple(find(n) for n in blocks.names)
        return self.shared.parts(
            ("modes", group), Modes(blocks, group), tensors, (), self._order[name]
        )[0]

    def release(self, name: str) -> None:
        """Forget what a layer is the last to be made of."""
        for key in self._last.get(name, ()):
            self.shared.forget(key)


def scale_in_force(own: float, planned: float, scale: float) -> float:
    """Return a layer's scale after the adapter's was set.

    Parameters
    ----------
    own, planned : float
        The layer's and the spec's as planned.
    scale : float
        The adapter's now.

    Returns
    -------
    float
        An override's scale changes in proportion.
    """
    if scale == planned:
        return own
    return scale if own == planned else scale * (own / planned)
