"""`Planned`: what a plan says of itself. Integers only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from superlora.axes import Axes
from superlora.describe import describe
from superlora.layout import Layout
from superlora.spec import Spec
from superlora.supports import Supports


class Planned:
    """A design joined with the layers it adapts; the base of `superlora.Plan`.

    Parameters
    ----------
    spec : Spec or mapping of str to Spec
        The design, or those of merge operations.
    shapes : mapping of str to tuple of int or Axes
        Axes of every layer's weight.

    Attributes
    ----------
    layout : Layout
        What lies where.

    Raises
    ------
    TypeError, ValueError
        If the spec cannot serve these shapes.
    """

    def __init__(
        self,
        spec: Spec | Supports | Mapping[Any, Any],
        shapes: Mapping[str, tuple[int, ...] | Axes],
    ) -> None:
        self.layout = Layout(spec, shapes)

    @property
    def spec(self) -> Spec | Supports:
        """The design, or those of the merge operations."""
        return self.layout.spec

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight, in order: (output width, input width), or all its axes."""
        return {name: axes.shape for name, axes in self.layout.axes.items()}

    @property
    def num_parameters(self) -> int:
        """Trainable entries of all blocks."""
        return self.layout.num_parameters

    @property
    def num_dense(self) -> int:
        """Entries of all adapted weights."""
        return self.layout.num_dense

    @property
    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every trainable block by name."""
        return dict(self.layout.factor_shapes)

    @property
    def frozen_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every frozen block by name."""
        return {name: self.layout.block_shapes[name] for name in self.layout.frozen}

    @property
    def scale(self) -> float:
        """The number s in front of the equation, where no override says another."""
        return self.spec.scaling

    @property
    def ratio(self) -> float:
        """Entries before the maps over entries after them, in all groups; 1 without a map."""
        layout = self.layout
        mapped = [
            (group.before, group.size)
            for group, own in zip(layout.groups, layout.specs, strict=True)
            if not own.map.keeps_size
        ]
        before, after = map(sum, zip(*mapped, strict=True)) if mapped else (1, 1)
        return before / after

    def __repr__(self) -> str:
        return (
            f"Plan({len(self.layout.supports)} weights, {len(self.layout.groups)} groups, "
            f"{self.num_parameters:,} of {self.num_dense:,} parameters)"
        )

    def describe(self) -> str:
        """Return a table of the groups: folds, splits, ranks and parameter counts.

        Returns
        -------
        str
            Alike groups share a row; below it stand the totals and what a user
            may not expect: ranks that were capped, entries that a cover crops.
        """
        return describe(self.layout)
