"""`Layout`: what lies where, every block's shape, every count; integers only.

Joins a spec with the shapes of the weights. Every error about sizes is raised
here, before any memory is spent.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeVar

from superlora.design.axes import Axes
from superlora.design.factor_maps import Inner, inner_vectors, unit_modes_of
from superlora.design.fold_shape import Shape
from superlora.design.grouping import Grouping, Piece, check_shapes, group_weights, join
from superlora.design.spec import Spec
from superlora.design.splits import Group, Members, Split, check_memory, make_group
from superlora.design.supports import design_of, parts_of
from superlora.errors import some
from superlora.maps import Map, Place

_Found = TypeVar("_Found")
_Rest = ParamSpec("_Rest")


def kept(
    function: Callable[Concatenate[Layout, _Rest], _Found],
) -> Callable[Concatenate[Layout, _Rest], _Found]:
    """Keep with a layout what a function finds of it, by the function's name and arguments."""

    @functools.wraps(function)
    def found(layout: Layout, /, *rest: _Rest.args, **named: _Rest.kwargs) -> _Found:
        key = (function.__name__, *rest)
        if key not in layout.kept:
            layout.kept[key] = function(layout, *rest, **named)
        value: _Found = layout.kept[key]
        return value

    return found


class Layout:
    """A spec joined with the shapes of the weights that it adapts, which it must serve."""

    def __init__(
        self,
        spec: Spec | Mapping[Any, Any],
        shapes: Mapping[str, tuple[int, ...] | Axes],
    ) -> None:
        self.spec = design_of(spec)
        self.layer_axes = check_shapes(shapes)
        self.layers = {name: axes.matrix for name, axes in self.layer_axes.items()}
        # Of the updates: of the layers themselves, or of their supports, which have names by layer
        # and operation.
        designs, self.axes, self.supports, shared = parts_of(self.spec, self.layer_axes)
        self.shapes = {name: axes.matrix for name, axes in self.axes.items()}
        groupings: list[Grouping] = []
        self.specs: list[Spec] = []
        # Of every group all those that it can share blocks with, the first of which names them.
        self._parts: list[range] = []
        for own, names in designs:
            grouping = self._grouping(own, names)
            part = range(len(self.specs), len(self.specs) + len(grouping.sizes))
            self._parts += [part] * len(part)
            self.specs += [own] * len(part)
            groupings.append(grouping)
        self.grouping: Grouping = join(groupings, self.shapes)
        self._offsets = list(itertools.accumulate(self.grouping.sizes, initial=0))
        self.groups: list[Group] = self._groups()
        self._shared = self._find_shared(shared)
        plain = all(type(own.map).bind is Map.bind for own, _ in designs)
        # Equal ones are one object, which keeps what it draws from its seed once.
        known: dict[Map, Map] = {}
        self.maps: list[Map] = []
        for group, own in enumerate(self.specs):
            bound = own.map if plain else own.map.bind(self.place(group))
            self.maps.append(known.setdefault(bound, bound))
        self.kept: dict[tuple[Any, ...], Any] = {}
        _check_frozen(self)
        if any(own.factor_map is not None for own, _ in designs):
            self.inner  # noqa: B018  (raises where a map does not fit)
        unit_modes = unit_modes_of(self.groups, self.specs)
        if unit_modes:
            warnings.warn(f"{unit_modes}; use fewer splits or fold='balanced'", stacklevel=3)

    def _find_shared(self, names: Mapping[str, str]) -> dict[int, int]:
        """Return the groups whose blocks are those of other groups."""
        found = {}
        for name, source in names.items():
            pieces = self.grouping.pieces
            for mine, theirs in zip(pieces[name], pieces[source], strict=True):
                size, got = self.groups[mine.group].before, self.groups[theirs.group].before
                if size != got:
                    raise ValueError(f"{source!r} must have {size} entries for {name!r}: got {got}")
                found[mine.group] = theirs.group
        return found

    def _grouping(self, own: Spec, names: list[str]) -> Grouping:
        held = {name: self.shapes[name] for name in names}
        natural = own.fold == "natural"
        stacks = {name: self.axes[name].matrices for name in names} if natural else {}
        try:
            return group_weights(held, own.groups, own.cut, stacks)
        except ValueError as error:
            raise ValueError(f"{self._operations(names)}{error}") from None

    def _operations(self, names: Sequence[str]) -> str:
        """Return what an error message begins with, where a design has several operations."""
        if isinstance(self.spec, Spec):
            return ""
        return ", ".join(dict.fromkeys(name.partition(".")[0] for name in names)) + ": "

    def _groups(self) -> list[Group]:
        # Most groups of a large model are alike: solve each distinct one once.
        parts = dict.fromkeys(self._parts)
        make = {part: functools.cache(partial(make_group, self.specs[part[0]])) for part in parts}
        found = []
        for group, room in enumerate(self.grouping.room):
            divisor = room
            for name, _, piece in self.grouping.contents[group]:
                divisor = math.gcd(divisor, self.shapes[name][1], piece.start, piece.stop)
            try:
                members = Members(0, *self.grouping.matrices(group, self.axes), divisor, room)
                found.append(make[self._parts[group]](self.grouping.sizes[group], members))
            except ValueError as error:
                names = self.grouping.members[group]
                text = f"{self._operations(names)}{error}; in the group of {some(map(repr, names))}"
                raise ValueError(text) from None
        return found

    def place(self, group: int) -> Place:
        """Return what a group's map may depend on."""
        # A map that takes groups together is one map, that of the first.
        return Place(self.joint(group)[0], *self.grouping.matrices(group, self.axes))

    def joint(self, group: int) -> range:
        """Return the groups that one map takes together: the group, or all of its part."""
        return self._parts[group] if self.specs[group].map.joint else range(group, group + 1)

    def position(self, piece: Piece) -> tuple[int, int]:
        """Return where a piece begins and ends in the vector of its joint groups."""
        before = self._offsets[piece.group] - self._offsets[self.joint(piece.group)[0]]
        return before + piece.start, before + piece.stop

    def blocks_of_groups(self, groups: Iterable[int]) -> tuple[str, ...]:
        """Return the names of the blocks of some groups."""
        terms = (blocks for group in groups for blocks in self.term_blocks(group))
        return tuple(dict.fromkeys(block for blocks in terms for block in blocks))

    def scaling(self, name: str) -> float:
        """Return the number s in front of one weight's update."""
        return self.specs[self.grouping.pieces[name][0].group].scaling

    def in_place(self, group: int) -> bool:
        """Return whether weights are cut from the product itself, whose entries stay in place."""
        return self.maps[group].in_place

    def joint_sizes(self, group: int) -> tuple[int, int]:
        """Return how many entries a map takes and makes, of all groups that it takes together."""
        joint = self.joint(group)
        size = self._offsets[joint.stop] - self._offsets[joint.start]
        return (self.groups[group].before if len(joint) == 1 else size), size

    def map_uses(self) -> dict[tuple[Map, int, int], str]:
        """Return every different map with its numbers of entries before and after."""
        uses: dict[tuple[Map, int, int], str] = {}
        for group, fixed in enumerate(self.maps):
            own = self.groups[group].splits[: self.specs[group].splits]
            fixed = fixed.joined([(split.sizes, split.shape) for split in own])
            uses.setdefault((fixed, *self.joint_sizes(group)), str(group))
        for inner in self.inner.values():
            uses.setdefault((inner.map, inner.before, inner.size), inner.name)
        return uses

    def multiplies(self, name: str) -> tuple[int, int] | None:
        """Return what a weight's map costs that multiplies inputs without forming the update."""
        pieces = self.grouping.pieces[name]
        group = pieces[0].group
        if len(pieces) > 1 or len(self.grouping.members[group]) > 1 or self.maps[group].joint:
            return None
        return self.maps[group].product_operations(self.groups[group].before, self.shapes[name])

    @kept
    def is_mixed_once(self, first: int) -> bool:
        """Return whether it pays to make at once what a map makes for several weights."""
        names = {name for group in self.joint(first) for name in self.grouping.members[group]}
        least = min(math.prod(self.shapes[name]) for name in names)
        return len(names) > 1 and self.maps[first].mixes(self.joint_sizes(first)[0], least)

    def radices(self, group: int, modes: int | None = None) -> Shape:
        """Return the digits of the first `modes` modes of a group, all modes if None."""
        item = self.groups[group]
        order = len(item.fold) if modes is None else modes
        if self.specs[group].combine == "hadamard":
            return item.fold[:order]
        splits = item.splits[: self.specs[group].splits]
        return tuple(split.shape[mode] for mode in range(order) for split in splits)

    def terms(self, group: int) -> list[tuple[Split, ...]]:
        """Return the splits of each of a group's products."""
        count = self.specs[group].splits
        splits = self.groups[group].splits
        return [splits[first : first + count] for first in range(0, len(splits), count)]

    def block(self, group: int, index: int, leaf: str) -> str:
        """Return the name of a split's block: that of the part's first group, where tied."""
        if self._shared:
            group = self._shared.get(group, group)
        if f"{index % self.specs[group].splits}.{leaf}" in self.specs[group].tied:
            group = self._parts[group].start
        return f"{group}.{index}.{leaf}"

    @functools.cached_property
    def layer_of(self) -> dict[str, str]:
        """The layer of each of `shapes`."""
        return {name: layer for layer, own in self.supports.items() for name in own.values()}

    @functools.cached_property
    def block_shapes(self) -> dict[str, Shape]:
        """Shape of every block by name, ``"group.split.block"``, frozen ones too."""
        found: dict[str, Shape] = {}
        for group, item in enumerate(self.groups):
            for index, split in enumerate(item.splits):
                for leaf, shape in split.block_shapes.items():
                    name = self.block(group, index, leaf)
                    found[name] = tuple(map(max, shape, found.get(name, shape)))
        return found

    @functools.cached_property
    def frozen(self) -> dict[str, str]:
        """Where every frozen block comes from, by name."""
        found = {}
        for group, own in enumerate(self.specs):
            for key, source in own.frozen:
                split, _, leaf = key.partition(".")
                for index in range(int(split), own.splits * own.terms, own.splits):
                    found[self.block(group, index, leaf)] = source
            for blocks in self.term_blocks(group)[own.trained_terms :] if own.frozen_terms else ():
                found |= dict.fromkeys(blocks, "stored")
        return found

    @functools.cached_property
    def factor_shapes(self) -> dict[str, Shape]:
        """Shape of what is trained by name: blocks, or the vectors that they are mapped from."""
        return {n: shape for n, shape in self.input_shapes.items() if n not in self.frozen}

    @functools.cached_property
    def trainable(self) -> dict[str, Shape]:
        """Shape of every block by name that is not frozen."""
        return {n: shape for n, shape in self.block_shapes.items() if n not in self.frozen}

    @functools.cached_property
    def inner(self) -> dict[str, Inner]:
        """The vector that every block that has one is mapped from."""
        return inner_vectors(self.trainable, self.specs, self.first_group, self.num_dense)

    @functools.cached_property
    def input_shapes(self) -> dict[str, Shape]:
        """Shape of everything that an update is made from: what is trained or frozen."""
        inner = self.inner
        found: dict[str, Shape] = {}
        for block, shape in self.block_shapes.items():
            if block in inner:
                found[inner[block].name] = (inner[block].before,)
            else:
                found[block] = shape
        return found

    def blocks_of(self, name: str) -> tuple[str, ...]:
        """Return the names of the blocks that a weight's update is made of."""
        if name not in self.shapes:
            raise KeyError(
                f"no weight is named {name!r}; the plan has {some(map(repr, self.shapes))}"
            )
        pieces = self.grouping.pieces[name]
        groups = dict.fromkeys(group for piece in pieces for group in self.joint(piece.group))
        return self.blocks_of_groups(groups)

    def inputs_of(self, name: str) -> tuple[str, ...]:
        """Return the names of what a weight's update is made from, keys of `input_shapes`."""
        inner = self.inner
        found = (inner[b].name if b in inner else b for b in self.blocks_of(name))
        return tuple(dict.fromkeys(found))

    def first_group(self, group: int) -> int:
        """Return the first of the groups that a group can share blocks with."""
        return self._parts[group].start

    @kept
    def alike(self, first: int) -> list[Group]:
        """Return the distinct groups among those that share blocks with a first one."""
        part = self._parts[first]
        return list(dict.fromkeys(self.groups[part.start : part.stop]))

    def term_blocks(self, group: int) -> list[list[str]]:
        """Return the names of the blocks of each of a group's products."""
        count = self.specs[group].splits
        return [
            [
                self.block(group, term * count + index, leaf)
                for index, split in enumerate(splits)
                for leaf in split.block_shapes
            ]
            for term, splits in enumerate(self.terms(group))
        ]

    @property
    def num_parameters(self) -> int:
        """Trainable entries of all blocks."""
        return sum(map(math.prod, self.factor_shapes.values()))

    @property
    def num_dense(self) -> int:
        """Entries of all adapted weights."""
        return sum(self.layer_axes[name].entries for name in self.supports)


def _check_frozen(layout: Layout) -> None:
    """Refuse frozen and tied blocks that groups lack, or that leave nothing to train."""
    for group, own in enumerate(layout.specs):
        if not own.frozen and not own.tied:
            continue
        for kind, blocks in (("frozen", [key for key, _ in own.frozen]), ("tied", own.tied)):
            for block in blocks:
                _check_present(layout, group, kind, block)
        for block, source in own.frozen:
            if source.startswith("singular"):
                _check_singular(layout, group, block)
        for term in layout.term_blocks(group)[: own.trained_terms]:
            if not any(block in layout.trainable for block in term):
                raise ValueError(
                    f"frozen must leave every product a trainable block: group {group} has none"
                )
    entries = sum(math.prod(layout.block_shapes[block]) for block in layout.frozen)
    check_memory("frozen blocks must hold", entries, layout.num_dense)


def _check_present(layout: Layout, group: int, kind: str, block: str) -> None:
    index, _, leaf = block.partition(".")
    shapes = layout.groups[group].splits[int(index)].block_shapes
    first = layout.groups[layout.first_group(group)].splits[int(index)].block_shapes
    if len(shapes.get(leaf, ())) != len(first.get(leaf, (0,))):
        raise ValueError(
            f"{kind} must name blocks that every group has: group {group} has no {block!r}, its "
            f"split {index} has {list(shapes)}"
        )


def _check_singular(layout: Layout, group: int, block: str) -> None:
    index, _, leaf = block.partition(".")
    rank = layout.groups[group].splits[int(index)].block_shapes[leaf][1]
    (name,) = layout.grouping.members[group]
    matrices, _ = layout.grouping.matrices(group, layout.axes)
    if len(matrices) > 1:
        raise ValueError(
            f"frozen[{block!r}] must have one matrix a group to hold its singular vectors: "
            f"{name!r} has {len(matrices)}; use fold='natural'"
        )
    if rank > min(matrices[0]):
        raise ValueError(
            f"rank must be at most {min(matrices[0])}, the singular vectors of {name!r}: "
            f"got {rank} for the frozen block {block!r}"
        )
