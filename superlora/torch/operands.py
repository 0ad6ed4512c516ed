"""The tensors that one support of a layer is made of, and which parts of them it reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from superlora._backend import backend_of
from superlora.algebra.contract import run
from superlora.algebra.form import (
    cut,
    form,
    joined,
    joint_entries,
    open_rows,
    run_term,
    source_array,
    take,
    total,
)
from superlora.design.cost_rule import opens_rows, rows_of, whole_rows
from superlora.design.grouping import cut_pieces
from superlora.design.layout import Layout
from superlora.design.network import (
    Network,
    Opened,
    Source,
    Term,
    group_network,
    network_of,
    opened_rows,
    weight_network,
)
from superlora.torch.autograd import made, moved, parts
from superlora.torch.blocks import Blocks, Place

Rows = tuple[int, int]
_torch = backend_of(torch.empty(0))


class Shared:
    """A tensor that layers may share; this one is a block to which a map of modes was applied.

    Parameters
    ----------
    layout : Layout
        What lies where.
    source : Source
        The block.

    Attributes
    ----------
    key : tuple
        What the scope calls it.
    part : str or None
        What it calls this layer's part; None where every layer reads the whole.
    start : int
        Where that begins in the whole.
    several : bool
        Whether it pays to make it at once for several layers.
    """

    part: str | None = None
    start = 0

    def __init__(self, layout: Layout, source: Source) -> None:
        self.layout, self.source = layout, source
        self.key: tuple[Any, ...] = ("modes", source)
        self.several = _is_mapped_once(layout, source)

    def make(self, held: Blocks, whole: bool) -> Tensor:
        """Return the whole, or what this layer needs of it."""
        return _mapped(self.layout, self.source, held)

    def ranges(self) -> dict[str, Rows]:
        """Return every layer's part of the whole; empty where each reads all of it."""
        return {}

    def take(self, held: Blocks) -> Tensor:
        """Return this layer's part, of the whole where that is shared now."""
        values = held.scope.values() if self.several else None
        if values is None:
            return self.make(held, False)
        if self.key not in values:
            whole, ranges = self.make(held, True), self.ranges()
            cuts = parts(whole, ranges.values()) if ranges else [whole]
            values[self.key] = dict(zip(ranges or [None], cuts, strict=True))
        return values[self.key][self.part]

    def cut(self, value: Tensor, rows: Rows) -> Tensor:
        """Return what some rows of the support need of this layer's part."""
        return value

    def add(self, sums: Tensor, gradient: Tensor, rows: Rows) -> None:
        """Add the adjoint of `cut` to a sum, in place."""
        sums += gradient


def _mapped(layout: Layout, source: Source, held: Blocks) -> Tensor:
    """Return a block to which its group's map of modes was applied."""
    tensors, blocks = held.inputs_of([source.block])
    inner = source.block in layout.inner
    block = made(lambda *own: blocks(own)[0], tensors) if inner else tensors[0]
    fixed, shape = layout.maps[source.group], block.shape

    def back(y: Tensor) -> Tensor:
        for axis, index, _ in source.modes:
            y = fixed.map_mode(y, axis, index, source.shape[axis], adjoint=True)
        rest = [whole - own for whole, own in zip(shape, y.shape, strict=True)]
        ends = [entry for own in reversed(rest) for entry in (0, own)]
        return torch.nn.functional.pad(y, ends) if any(rest) else y

    return moved(block, lambda x: source_array(layout, source, x), back)


def _is_mapped_once(layout: Layout, source: Source) -> bool:
    return len(layout.grouping.members[source.group]) > 1


class SharedBlock(Shared):
    """The vector that a mixing F_in makes, of which a block is a part."""

    def __init__(self, layout: Layout, source: Source) -> None:
        self.layout, self.source = layout, source
        self.inner = layout.inner[source.block]
        self.key = ("inner", self.inner.name)
        self.part = source.block
        self.several = True

    def make(self, held: Blocks, whole: bool) -> Tensor:
        """Return the whole, or what this layer needs of it."""
        item = self.inner
        (theta,) = held.tensors([item.name])
        move, back = item.map.apply, item.map.adjoint
        found = moved(theta, lambda x: move(x, item.size), lambda y: back(y, item.before))
        return found if whole else found[item.start : item.stop]

    def ranges(self) -> dict[str, Rows]:
        """Return every layer's part of the whole; empty where each reads all of it."""
        inner, name = self.layout.inner, self.inner.name
        return {b: (each.start, each.stop) for b, each in inner.items() if each.name == name}

    def cut(self, value: Tensor, rows: Rows) -> Tensor:
        """Return what some rows of the support need of this layer's part."""
        return value.view(self.source.shape)

    def add(self, sums: Tensor, gradient: Tensor, rows: Rows) -> None:
        """Add the adjoint of `cut` to a sum, in place."""
        sums += gradient.reshape(-1)


class SharedRows(Shared):
    """The opened rows of one term of a group."""

    def __init__(self, layout: Layout, name: str, own: Opened, index: int) -> None:
        self.layout, self.own, self.index, self.part = layout, own, index, name
        (piece,) = layout.grouping.pieces[name]
        self.group, self.offset, self.columns = piece.group, piece.start, layout.shapes[name][1]
        self.width = layout.groups[self.group].fold[-1]
        self.key = ("rows", self.group, index)
        self.several = opens_rows(layout, self.group)
        self.start = rows_of(layout, name)[0]

    def make(self, held: Blocks, whole: bool) -> Tensor:
        """Return the whole, or what this layer needs of it."""
        layout, index = self.layout, self.index
        opened = whole_rows(layout, self.group) if whole else self.own
        used = {operand.source for box in opened.boxes for operand in box[index].operands}
        # What a map made of a block is kept, as it would be mapped again else.
        fixed = [place for place in used if opened.sources[place].modes]
        rest = [place for place in used if not opened.sources[place].modes]
        mapped = [Shared(layout, opened.sources[place]).take(held) for place in fixed]
        tensors, blocks = held.inputs_of([opened.sources[place].block for place in rest])

        def rows(*own: Tensor) -> Tensor:
            arrays = dict(zip(fixed, own[: len(fixed)], strict=True))
            for place, block in zip(rest, blocks(own[len(fixed) :]), strict=True):
                arrays[place] = source_array(layout, opened.sources[place], block)
            found: Tensor = open_rows(opened, arrays, index)
            return found

        return made(rows, [*mapped, *tensors])

    def ranges(self) -> dict[str, Rows]:
        """Return every layer's part of the whole; empty where each reads all of it."""
        members = self.layout.grouping.members[self.group]
        return {name: rows_of(self.layout, name) for name in members}

    def cut(self, value: Tensor, rows: Rows) -> Tensor:
        """Return what some rows of the support need of this layer's part."""
        first, last = self.range(rows)
        found: Tensor = cut(value, first - self.start, last - first)
        return found

    def add(self, sums: Tensor, gradient: Tensor, rows: Rows) -> None:
        """Add the adjoint of `cut` to a sum, in place."""
        first, last = self.range(rows)
        sums[first - self.start : last - self.start] += gradient

    def range(self, rows: Rows) -> Rows:
        """Return the opened rows that some rows of the weight lie in."""
        start, stop = (self.offset + row * self.columns for row in rows)
        return start // self.width, -(-stop // self.width)

    def skipped(self, rows: Rows) -> int:
        """Return how many entries lie before some rows of the weight in the first opened row."""
        return (self.offset + rows[0] * self.columns) % self.width


class SharedVector(Shared):
    """A vector that a map mixes, or the entries before one whose outputs each read one of them."""

    def __init__(self, layout: Layout, name: str, first: int) -> None:
        self.layout, self.name, self.first = layout, name, first
        self.map = layout.maps[first]
        self.before, self.size = layout.joint_sizes(first)
        self.key = ("vector", first)
        self.several = layout.is_mixed_once(first)
        if not self.map.reads:
            self.part, self.start = name, self.range(name)[0]
        for group in layout.joint(first):  # no compiler is to see it found
            group_network(layout, group)

    def make(self, held: Blocks, whole: bool) -> Tensor:
        """Return the whole, or what this layer needs of it."""
        layout, first, fixed, size = self.layout, self.first, self.map, self.size
        names = layout.blocks_of_groups(layout.joint(first))
        tensors, blocks = held.inputs_of(names)

        def entries(*own: Tensor) -> Tensor:
            given = dict(zip(names, blocks(own), strict=True))
            found: Tensor = joint_entries(layout, given, first)
            return found

        x = made(entries, tensors)
        if fixed.reads:
            return moved(x, *[lambda y: fixed.normalized(y, size)] * 2)
        start, stop = (0, size) if whole else self.range(self.name)
        part = fixed.sliced and (start, stop) != (0, size)

        def move(own: Tensor) -> Tensor:
            if not part:
                return fixed.apply(own, size)  # type: ignore[no-any-return]
            return fixed.apply_slice(own, size, start, stop)  # type: ignore[no-any-return]

        def back(own: Tensor) -> Tensor:
            if part:
                own = torch.nn.functional.pad(own, (start, size - stop))
            y: Tensor = fixed.adjoint(own, self.before)
            return y

        found = moved(x, move, back)
        return found if part else found[start:stop]

    def ranges(self) -> dict[str, Rows]:
        """Return every layer's part of the whole; empty where each reads all of it."""
        if self.map.reads:
            return {}
        members, joint = self.layout.grouping.members, self.layout.joint(self.first)
        return {name: self.range(name) for group in joint for name in members[group]}

    def cut(self, value: Tensor, rows: Rows) -> Tensor:
        """Return what some rows of the support need of this layer's part."""
        first, last = self.range(self.name, rows)
        if self.map.reads:
            part: Tensor = self.map.gather(value, self.size, first, last)
            return part
        found: Tensor = cut(value, first - self.start, last - first)
        return found

    def add(self, sums: Tensor, gradient: Tensor, rows: Rows) -> None:
        """Add the adjoint of `cut` to a sum, in place."""
        first, last = self.range(self.name, rows)
        if self.map.reads:
            self.map.scatter(gradient, sums, self.size, first)
        else:
            sums[first - self.start : last - self.start] += gradient

    def range(self, name: str, rows: Rows | None = None) -> Rows:
        """Return the entries of the vector that some rows of a weight are, or all of them."""
        layout = self.layout
        height, columns = layout.shapes[name]
        first, last = rows or (0, height)
        pieces = cut_pieces(layout.grouping.pieces[name], first * columns, last * columns)
        places = [layout.position(p) for p in pieces if layout.joint(p.group)[0] == self.first]
        return (places[0][0], places[-1][1]) if places else (0, 0)


class Operands:
    """What one support is made of. Integers, maps and modules: it holds no tensor.

    Parameters
    ----------
    layout : Layout
        What lies where.
    name : str
        The support.
    sources : sequence of Source
        The blocks that networks take.
    opened : Opened, optional
        The rows that are opened before them.
    vectors : bool
        Whether what a map mixes is mapped; else its networks are the user's own.

    Attributes
    ----------
    shared : tuple of Shared
        What layers may share; those tensors come first.
    leading : int
        How many of these are no blocks.
    own : tuple of Source
        The blocks whose tensors follow.
    registered : list of Place, or None
        Where these blocks are; None where a tensor is made of a block.
    networks : dict of (int, int) to Network
        Of the rows that were formed so far.
    """

    def __init__(
        self,
        layout: Layout,
        name: str,
        sources: Sequence[Source],
        opened: Opened | None = None,
        *,
        vectors: bool = True,
    ) -> None:
        self.layout, self.name, self.opened = layout, name, opened
        self.height, self.columns = layout.shapes[name]
        pieces = layout.grouping.pieces[name]
        shared: list[Shared] = []
        if opened is not None:
            shared += [SharedRows(layout, name, opened, i) for i in range(len(opened.ranks))]
        elif vectors and not layout.in_place(pieces[0].group):
            firsts = dict.fromkeys(layout.joint(piece.group)[0] for piece in pieces)
            shared += [SharedVector(layout, name, first) for first in firsts]
        self.leading = len(shared)
        blocks = [_shared_block(layout, source) for source in sources]
        shared += [each for each in blocks if each is not None]
        self.shared = tuple(shared)
        self.own = tuple(s for s, each in zip(sources, blocks, strict=True) if each is None)
        # Where the array of each source stands among all tensors.
        made, own = iter(range(self.leading, len(shared))), iter(range(len(shared), 1 << 30))
        self.places = tuple(next(own if each is None else made) for each in blocks)
        self._sources = dict(zip(sources, self.places, strict=True))
        self.networks: dict[Rows, Network] = {}
        self.registered: list[Place] | None = None
        # What all of it is where that is one term, as of a weight of its own.
        self.term: Term | None = None
        if opened is None and vectors:
            whole = network_of(layout, name)
            self.networks[0, self.height] = whole  # compiled code only reads it
        if not self.shared and vectors:
            terms = list(whole.terms())
            entries = whole.runs[0].size if len(whole.runs) == 1 == len(terms) else 0
            order = tuple(range(len(self.own)))
            if (
                entries == _size(terms[0])
                and order == tuple(o.source for o in terms[0].operands)
                and whole.sources == self.own
            ):
                self.term = terms[0]

    def cut(self, tensors: Sequence[Tensor], rows: Rows, device: torch.device) -> list[Tensor]:
        """Return what some rows of the support need of the tensors that layers may share."""
        pairs = zip(self.shared, tensors, strict=True)
        return [each.cut(tensor, rows).to(device) for each, tensor in pairs]

    def form(self, arrays: Sequence[Tensor], rows: Rows) -> Tensor:
        """Form rows of the support of what `cut` gave and the blocks, differentiably."""
        count = rows[1] - rows[0]
        if self.opened is not None:
            ends = [arrays[place] for place in self.places]
            terms = zip(self.opened.completed, arrays, strict=False)
            entries = total(run_term(term, ends, [own]) for term, own in terms).reshape(-1)
            first = self.shared[0]
            assert isinstance(first, SharedRows)
            found: Tensor = cut(entries, first.skipped(rows), count * self.columns)
            return found.reshape(count, self.columns)
        if self.leading:
            vector: Tensor = joined(arrays[: self.leading])
            return vector.reshape(count, self.columns)
        if self.term is not None and count == self.height:
            values = []
            for array, operand in zip(arrays, self.term.operands, strict=True):
                values.append(array if operand.whole else take(_torch, array, operand))
            whole: Tensor = run(self.term.contraction, values, _torch)
            return whole.reshape(count, self.columns)
        if rows not in self.networks:
            self.networks[rows] = weight_network(self.layout, self.name, rows)
        network = self.networks[rows]
        found = form(network, [arrays[self._sources[s]] for s in network.sources])
        return found


def _size(term: Term) -> int:
    path = term.contraction
    return math.prod(path.sizes[label] for label in path.output)


def _shared_block(layout: Layout, source: Source) -> Shared | None:
    """Return how layers share what a block is made from, if they do."""
    if source.modes:
        return Shared(layout, source) if _is_mapped_once(layout, source) else None
    inner = layout.inner.get(source.block)
    if inner is None or inner.map.sliced or inner.size == inner.stop - inner.start:
        return None
    whole = layout.block_shapes[source.block] == source.shape
    return SharedBlock(layout, source) if whole else None


def formed_operands(layout: Layout, name: str) -> Operands:
    """Return the operands of a support that is formed, where it pays of its group's opened rows."""
    # The same blocks as in the weight's network, which `Plan.delta` contracts at once.
    group = layout.grouping.pieces[name][0].group
    if opens_rows(layout, group):
        rows = opened_rows(layout, group, *rows_of(layout, name))
        return Operands(layout, name, rows.ends, rows)
    return Operands(layout, name, network_of(layout, name).sources)
