"""`Plan`: the public object, a layout joined with the array functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy

from superlora._backend import Array, backend_of
from superlora.costs import FORMED, Machine, check_apply, choose
from superlora.describe import describe
from superlora.factored import apply_factored, low_rank_factors
from superlora.frozen import frozen_blocks
from superlora.init import init_factors
from superlora.layout import Layout
from superlora.reconstruct import joint_entries, weight_delta
from superlora.spec import Spec
from superlora.terms import scaled, with_blocks


class Plan:
    """A spec joined with the weights it adapts. Building one touches integers only.

    Parameters
    ----------
    spec : Spec
        The design.
    shapes : mapping of str to (int, int)
        Output and input width of every weight, in the order in which their
        updates are concatenated. A weight that a library stores transposed is
        given as (output, input) all the same.

    Attributes
    ----------
    layout : Layout
        What lies where.

    Raises
    ------
    TypeError, ValueError
        If the spec cannot serve these shapes.

    Notes
    -----
    ``factors`` is always a flat dict: ``"group.split.core"`` and
    ``"group.split.factorM"`` with mode M counted from 0. The equation is that of
    [1]_, Section 2; `superlora.Spec` has its parameters.

    References
    ----------
    .. [1] X. Chen et al., "SuperLoRA: Parameter-Efficient Unified Adaptation for
       Large Vision Models", 2024.

    Examples
    --------
    >>> import superlora as sl
    >>> plan = sl.Plan(sl.lora(rank=2), {"q": (6, 4), "v": (6, 4)})
    >>> plan.num_parameters, plan.num_dense
    (40, 48)
    >>> factors = plan.init(seed=0)
    >>> sorted(factors)
    ['0.0.factor0', '0.0.factor1', '1.0.factor0', '1.0.factor1']
    >>> plan.delta(factors, "q").shape
    (6, 4)
    """

    def __init__(self, spec: Spec, shapes: Mapping[str, tuple[int, int]]) -> None:
        self.layout = Layout(spec, shapes)

    @property
    def spec(self) -> Spec:
        """The design."""
        return self.layout.spec

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Output and input width of every weight, in order."""
        return dict(self.layout.shapes)

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
            f"Plan({len(self.layout.shapes)} weights, {len(self.layout.groups)} groups, "
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

    def init(self, seed: int = 0, like: Any = numpy.float32) -> dict[str, Array]:
        """Draw initial factors for which every update is zero, but with one vector for all blocks.

        Parameters
        ----------
        seed : int
            In [0, 2**64). One seed gives the same values on every library.
        like : array or dtype
            An array, or a dtype of numpy, jax or torch: library, dtype and device
            of the result.

        Returns
        -------
        dict of str to array
            One array for each of `factor_shapes`; exactly one block of each product
            is zero. A `factor_map` from one vector to all blocks cannot start at zero: its
            updates are small.

        Raises
        ------
        TypeError, ValueError
            If `seed` is no such integer, or `like` is not of a floating-point type.
        """
        return init_factors(self.layout, seed, like)

    def frozen(
        self, weights: Mapping[str, Array] | None = None, like: Any = numpy.float32
    ) -> dict[str, Array]:
        """Make the blocks that the spec freezes; merge them with the factors.

        Parameters
        ----------
        weights : mapping of str to array, (output width, input width), optional
            The weights themselves, where the spec asks for their singular vectors.
        like : array or dtype
            Library, dtype and device of the result.

        Returns
        -------
        dict of str to array
            One array for each of `frozen_shapes`, except blocks that are
            ``"stored"``, whose values are the user's.

        Raises
        ------
        TypeError
            If `like` is not of a floating-point type.
        ValueError
            If a weight is missing, or has another shape.

        Examples
        --------
        >>> import superlora as sl
        >>> plan = sl.Plan(sl.vera(rank=2), {"q": (6, 4), "v": (3, 4)})
        >>> blocks = {**plan.init(seed=0), **plan.frozen()}
        >>> plan.delta(blocks, "v").shape
        (3, 4)
        """
        return frozen_blocks(self.layout, weights, like)

    def delta(self, factors: Mapping[str, Array], name: str, scale: float | None = None) -> Array:
        """Form the update of one weight; no other weight's is formed.

        Parameters
        ----------
        factors : mapping of str to array
            At least the blocks of the weight's groups.
        name : str
            The weight.
        scale : float, optional
            Takes the place of the spec's scale.

        Returns
        -------
        array, (output width, input width)
            Library, dtype and device of the factors.

        Raises
        ------
        KeyError
            If the plan has no weight of that name.
        TypeError
            If the factors are of different libraries.
        ValueError
            If a block is missing or has another shape.
        """
        self._check(factors, name)
        return weight_delta(self.layout, factors, name, self._scaling(name, scale))

    def _scaling(self, name: str, scale: float | None) -> float:
        return self.layout.scaling(name) if scale is None else scale

    def low_rank(
        self, factors: Mapping[str, Array], name: str, scale: float | None = None
    ) -> tuple[Array, Array] | None:
        """Write one weight's update as a product of two thin matrices, where its fold allows.

        Parameters
        ----------
        factors : mapping of str to array
            At least the blocks of the weight's groups.
        name : str
            The weight.
        scale : float, optional
            Takes the place of the spec's scale.

        Returns
        -------
        pair of arrays, (output width, q) and (input width, q), or None
            ``ΔW = left @ rightᵀ``, which is never formed; None where the last mode of the
            fold does not divide the input width, or q would not be below both widths.

        Raises
        ------
        KeyError
            If the plan has no weight of that name.
        TypeError
            If the factors are of different libraries.
        ValueError
            If a block is missing or has another shape.
        """
        self._check(factors, name)
        return low_rank_factors(self.layout, factors, name, self._scaling(name, scale))

    def deltas(self, factors: Mapping[str, Array], scale: float | None = None) -> dict[str, Array]:
        """Form the updates of all weights.

        Parameters
        ----------
        factors : mapping of str to array
            All blocks.
        scale : float, optional
            Takes the place of the spec's scale.

        Returns
        -------
        dict of str to array
            For each weight ``scale * ΔW``, (output width, input width).

        Raises
        ------
        TypeError
            If the factors are of different libraries.
        ValueError
            If a block is missing or has another shape.
        """
        for name in self.layout.shapes:
            self._check(factors, name)
        layout = self.layout
        factors = with_blocks(layout, factors, layout.block_shapes)
        vectors: dict[int, Array] = {}  # by the first of the groups that a map takes together
        for group in range(len(layout.groups)):
            if not layout.identity(group) and group == layout.joint(group)[0]:
                x, size = joint_entries(layout, factors, group)
                vectors[group] = layout.maps[group].apply(x, size)
        deltas = {}
        for name, pieces in layout.grouping.pieces.items():
            number = self._scaling(name, scale)
            if layout.identity(pieces[0].group):
                deltas[name] = weight_delta(layout, factors, name, number)
                continue
            runs = [
                vectors[layout.joint(piece.group)[0]][slice(*layout.position(piece))]
                for piece in pieces
            ]
            library = backend_of(*runs)
            delta = library.reshape(library.concatenate(runs, axis=0), layout.shapes[name])
            deltas[name] = scaled(delta, number)
        return deltas

    def apply(
        self,
        factors: Mapping[str, Array],
        name: str,
        x: Array,
        scale: float | None = None,
        apply: str = "auto",
    ) -> Array:
        """Multiply inputs by a weight's update, without forming it where that is cheaper.

        Parameters
        ----------
        factors : mapping of str to array
            At least the blocks of the weight's groups.
        name : str
            The weight.
        x : array, (..., input width)
            Inputs of the layer, of the factors' library.
        scale : float, optional
            Takes the place of the spec's scale.
        apply : {"auto", "factored", "formed"}
            Whether the update is formed; ``"auto"`` takes the cheaper way.

        Returns
        -------
        array, (..., output width)
            ``scale * x @ ΔWᵀ``.

        Raises
        ------
        KeyError
            If the plan has no weight of that name.
        TypeError
            If the arrays are of different libraries.
        ValueError
            If a block is missing or has another shape, the last axis of `x` is
            not the input width, or the factors are to be applied where they cannot be.

        Notes
        -----
        The factors can be applied where the last mode of the fold divides the input width, as
        that of a natural fold of order 2, a stack or an aligned fold does; where a weight's own
        group is a Kronecker product of matrices; and where the map is Fourier's. A count of
        operations, which depends on the number of tokens, decides.
        """
        check_apply(apply)
        self._check(factors, name)
        number = self._scaling(name, scale)
        backend_of(x, *(factors[block] for block in self.blocks_of(name)))
        columns = self.layout.shapes[name][1]
        if x.shape[-1:] != (columns,):
            raise ValueError(
                f"x must have {columns} entries in its last axis, the input width of {name!r}: got "
                f"shape {tuple(x.shape)}"
            )
        way = choose(self.layout, name, Machine(), math.prod(x.shape[:-1]), apply)
        if way != FORMED:
            return apply_factored(self.layout, factors, name, x, number, way)
        delta = weight_delta(self.layout, factors, name, number)
        return backend_of(x).tensordot(x, delta, axes=([len(x.shape) - 1], [1]))

    def blocks_of(self, name: str) -> tuple[str, ...]:
        """Return the names of what one weight's update is made from.

        Parameters
        ----------
        name : str
            The weight.

        Returns
        -------
        tuple of str
            Keys of `factor_shapes` and `frozen_shapes`.

        Raises
        ------
        KeyError
            If the plan has no weight of that name.
        """
        return self.layout.inputs_of(name)

    def _check(self, factors: Mapping[str, Array], name: str) -> None:
        blocks = self.blocks_of(name)
        for block in blocks:
            if block not in factors:
                frozen = block in self.layout.frozen
                raise ValueError(
                    f"factors must hold {block!r}, a {'frozen ' * frozen}block of {name!r}: it is "
                    f"missing{'; Plan.frozen makes those' * frozen}"
                )
            backend_of(factors[block])
            expected, got = self.layout.input_shapes[block], tuple(factors[block].shape)
            if got != expected:
                raise ValueError(f"factors[{block!r}] must have shape {expected}: got {got}")
        backend_of(*(factors[block] for block in blocks))
