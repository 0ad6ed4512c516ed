"""`Plan`: the public object, a layout joined with the array functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy

from superlora._backend import Array, backend_of
from superlora.algebra.fit import FitReport, Settings, checked_deltas, checked_frozen, fit
from superlora.algebra.form import (
    apply_factored,
    low_rank_factors,
    weight_delta,
    weight_deltas,
)
from superlora.algebra.frozen import frozen_blocks
from superlora.algebra.init import init_factors
from superlora.checks import check_count
from superlora.design.axes import Axes
from superlora.design.cost_rule import application, check_apply, no_factored_way
from superlora.design.describe import describe
from superlora.design.layout import Layout
from superlora.design.network import Network, network_of
from superlora.design.placement import Placement, placements
from superlora.design.spec import Spec
from superlora.design.supports import Supports
from superlora.errors import some
from superlora.operations import merge
from superlora.random import check_seed

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Plan:
    """A spec joined with the weights it adapts. Building one touches integers only.

    Parameters
    ----------
    spec : Spec, Supports or mapping
        The design. `superlora.Supports`, or the mapping that it takes, has one for each merge
        operation, whose support tensors are then the plan's weights, named
        ``"operation.weight"``.
    shapes : mapping of str to (int, int), (int, int, int, int) or Axes
        Axes of every weight, in the order in which their updates are concatenated:
        (output, input), with two axes of a window behind for a convolution, or
        what `superlora.Axes` says. A weight that a library stores transposed is
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

    def __init__(
        self,
        spec: Spec | Mapping[Any, Any],
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
        pairs = zip(layout.groups, layout.specs, strict=True)
        mapped = [group for group, own in pairs if not own.map.keeps_size]
        if not mapped:
            return 1.0
        return sum(group.before for group in mapped) / sum(group.size for group in mapped)

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
            Alike groups share a row, whose last column says how their updates are applied
            while they are trained, and from how many tokens on they are formed: of the first
            weight of each shape. Below stand the totals and what a user may not expect: ranks
            that were capped, entries that a cover crops.
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
            updates are small. To terms that the spec fixes nothing is added at first.

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
        weights : mapping of str to array, optional
            The weights themselves, of their own shapes, where the spec asks for their
            singular vectors.
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
        array, of the weight's shape
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
        return self._shaped(name, self._matrix(factors, name, scale))

    def _matrix(self, factors: Mapping[str, Array], name: str, scale: float | None) -> Array:
        return weight_delta(self.layout, factors, name, self._scaling(name, scale))

    def _shaped(self, name: str, delta: Array) -> Array:
        axes = self.layout.axes[name]
        return delta if axes.plain else backend_of(delta).reshape(delta, axes.shape)

    def _scaling(self, name: str, scale: float | None) -> float:
        return self.layout.scaling(name) if scale is None else float(scale)

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
            If a block is missing or has another shape, or the weight has more axes than two.
        """
        self._check(factors, name)
        self._check_plain(name)
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
            For each weight ``scale * ΔW``, of its shape.

        Raises
        ------
        TypeError
            If the factors are of different libraries.
        ValueError
            If a block is missing or has another shape.
        """
        for name in self.layout.shapes:
            self._check(factors, name)
        numbers = {name: self._scaling(name, scale) for name in self.layout.shapes}
        found = weight_deltas(self.layout, factors, numbers)
        return {name: self._shaped(name, delta) for name, delta in found.items()}

    def fit(
        self,
        deltas: Mapping[str, Array],
        *,
        frozen: Mapping[str, Array] | None = None,
        restarts: int = 5,
        iterations: int = 200,
        tolerance: float = 1e-5,
        seed: int = 0,
    ) -> tuple[dict[str, Array], FitReport]:
        """Find factors whose updates come nearest to given ones.

        Parameters
        ----------
        deltas : mapping of str to array
            For every weight an update of its shape, as `Plan.deltas` returns them: the difference
            of a fine-tuned weight and its base, or the updates of another adapter.
        frozen : mapping of str to array, optional
            Blocks that are held: all of `frozen_shapes`, by default those that `Plan.frozen`
            makes; trainable ones among them are held too.
        restarts : int
            Starts, of which the best after 20 sweeps is gone on with, where one may end in a bad
            place: CP and Hadamard products, more than two Kronecker factors, sums, cropped folds,
            frozen and tied blocks.
        iterations : int
            Most sweeps over all blocks from the best start, beyond the 20 that choose it.
        tolerance : float
            The share of the error that a sweep must remove for another one to follow.
        seed : int
            Of random starts and of randomised decompositions, in [0, 2**64).

        Returns
        -------
        dict of str to array
            One array for each of `factor_shapes`, of the library, dtype and device of `deltas`;
            in single precision where theirs is half.
        FitReport
            The relative errors and what they took.

        Raises
        ------
        TypeError
            If the updates are no floating-point arrays of one library.
        ValueError
            If they have other names or shapes than the plan's weights, are not finite or all
            zero, or a held block or a number does not fit.

        Notes
        -----
        Minimises ``sum ||deltas[name] - self.delta(factors, name)||**2``, in double precision on
        numpy. Groups that share no trained block are fitted one after the other. A start comes
        from TensorLy's decompositions: truncated SVD, which is optimal for matrices [1]_; HOSVD
        and HOOI [2]_ for Tucker, CP-ALS, and TT-SVD [3]_; for Kronecker products the same of the
        rearranged tensor, in which they have rank one [4]_. Where that is not optimal,
        alternating least squares go on: the update is linear in each block, and its derivative is
        the network without the block. A fixed map is taken back by its adjoint where it is
        isometric, and by LSQR [5]_ elsewhere.

        References
        ----------
        .. [1] C. Eckart and G. Young, "The approximation of one matrix by another of lower rank",
           1936.
        .. [2] L. De Lathauwer, B. De Moor and J. Vandewalle, "On the best rank-1 and
           rank-(R1, ..., RN) approximation of higher-order tensors", 2000.
        .. [3] I. Oseledets, "Tensor-train decomposition", 2011.
        .. [4] C. Van Loan and N. Pitsianis, "Approximation with Kronecker products", 1993.
        .. [5] C. Paige and M. Saunders, "LSQR: an algorithm for sparse linear equations and
           sparse least squares", 1982.

        Examples
        --------
        >>> import numpy as np, superlora as sl
        >>> plan = sl.Plan(sl.lora(rank=1), {"q": (3, 2)})
        >>> factors, report = plan.fit({"q": np.diag([2.0, 1.0, 0.0])[:, :2]})
        >>> round(report.error**2, 6)  # of the squares 4 and 1, the second is left
        0.2
        """
        for name, value in (("restarts", restarts), ("iterations", iterations)):
            check_count(name, value, least=1)
        if isinstance(tolerance, str) or not tolerance >= 0:
            raise ValueError(f"tolerance must be at least 0: got {tolerance!r}")
        checked_deltas(self.layout, deltas)
        if frozen is None:
            frozen = frozen_blocks(self.layout, like=numpy.float64)
        checked_frozen(self.layout, frozen, next(iter(deltas.values())))
        return fit(
            self.layout, deltas, frozen, Settings(restarts, iterations, tolerance, check_seed(seed))
        )

    def merge(
        self,
        factors: Mapping[str, Array],
        layer: str,
        weight: Array,
        bias: Array | None = None,
        scale: float | None = None,
    ) -> tuple[Array, Array | None]:
        """Merge a layer's update, or all its support tensors, into its weight and bias.

        Parameters
        ----------
        factors : mapping of str to array
            At least the blocks of the layer's groups.
        layer : str
            One of the layers that the plan was made for.
        weight : array, of the layer's shape
            The layer's own.
        bias : array, (output width,), optional
            The layer's own.
        scale : float, optional
            Takes the place of the designs' scales.

        Returns
        -------
        array, of the layer's shape
            The merged weight, as `superlora.operations.merge` has it.
        array, (output width,), or None
            The merged bias; None where there is none and no operation gives one.

        Raises
        ------
        KeyError
            If the plan adapts no layer of that name.
        TypeError
            If the arrays are of different libraries.
        ValueError
            If a block is missing, or a shape does not fit.

        Examples
        --------
        >>> import numpy as np, superlora as sl
        >>> plan = sl.Plan({"scale_weight": sl.lora(rank=1), "add_bias": sl.dense()}, {"q": (3, 2)})
        >>> weight, bias = plan.merge(plan.init(), "q", np.ones((3, 2), np.float32))
        >>> bool((weight == 1).all()), bias
        (True, array([0., 0., 0.], dtype=float32))
        """
        if layer not in self.layout.supports:
            raise KeyError(
                f"no layer is named {layer!r}; the plan adapts "
                f"{some(map(repr, self.layout.supports))}"
            )
        own, axes = self.layout.supports[layer].items(), self.layout.layer_axes[layer]
        if tuple(weight.shape) != axes.shape:
            raise ValueError(f"weight must have shape {axes.shape}: got {tuple(weight.shape)}")
        for _, name in own:
            self._check(factors, name)
        matrix = backend_of(weight).reshape(weight, axes.matrix)
        # No operation of a stack reads or changes its bias, which may have any shape.
        merged, found = merge(
            matrix,
            None if axes.stack else bias,
            {op: self._matrix(factors, name, scale) for op, name in own},
        )
        if found is None and bias is not None:
            found = backend_of(bias).copy(bias)
        return backend_of(weight).reshape(merged, axes.shape), found

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
            not the input width, the weight has more axes than two, or the factors are to be
            applied where they cannot be.

        Notes
        -----
        The factors can be applied where the digits of the fold tell a weight's inputs from its
        outputs, as those of natural folds, stacks and aligned folds do, and where the map
        multiplies inputs itself, as Fourier's does. A count of operations, which depends on the
        number of tokens, decides.
        """
        check_apply(apply)
        self._check(factors, name)
        self._check_plain(name)
        number = self._scaling(name, scale)
        backend_of(x, *(factors[block] for block in self.blocks_of(name)))
        columns = self.layout.shapes[name][1]
        if x.shape[-1:] != (columns,):
            raise ValueError(
                f"x must have {columns} entries in its last axis, the input width of {name!r}: got "
                f"shape {tuple(x.shape)}"
            )
        found = application(self.layout, name)
        # The support of a scaled weight meets inputs beside the weight alone.
        applies = found.factored is not None and found.factored.base is None
        if apply == "factored" and not applies:
            raise ValueError(no_factored_way(repr(name)))
        if applies and not found.formed(math.prod(x.shape[:-1]), apply):
            return apply_factored(self.layout, factors, name, x, number)
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

    def network(self, name: str, operation: str | None = None) -> Network:
        """Return the tensor network that a weight's update is.

        Parameters
        ----------
        name : str
            The weight.
        operation : str, optional
            The merge operation whose support is asked for, where the plan has several.

        Returns
        -------
        Network
            Integers: which slices of which blocks, under which labels. It prints as an einsum
            with sizes.

        Raises
        ------
        KeyError
            If the plan has no weight of that name.

        Examples
        --------
        >>> import superlora as sl
        >>> print(sl.Plan(sl.lora(rank=2), {"q": (6, 4)}).network("q"))
        ac,bc->ab  a=6 c=2 b=4  0.0.factor0, 0.0.factor1
        """
        return network_of(self.layout, self._support(name, operation))

    def where(self, name: str, operation: str | None = None) -> list[Placement]:
        """Return where a weight lies among the groups.

        Parameters
        ----------
        name : str
            The weight.
        operation : str, optional
            The merge operation whose support is asked for, where the plan has several.

        Returns
        -------
        list of Placement
            One for each run of its entries: group, position, fold, and the boxes of the fold.

        Raises
        ------
        KeyError
            If the plan has no weight of that name.

        Examples
        --------
        >>> import superlora as sl
        >>> spec = sl.Spec(rank=2, groups=1, fold="aligned")
        >>> plan = sl.Plan(spec, {"q": (6, 4), "v": (3, 4)})
        >>> plan.where("v")
        [Placement(group=0, start=24, stop=36, fold=(9, 4), boxes=(((6, 9), (0, 4)),))]
        """
        return placements(self.layout, self._support(name, operation))

    def plot(self, name: str | None = None, operation: str | None = None) -> Figure:
        """Draw the folds of the groups, or the network of one weight.

        Parameters
        ----------
        name : str, optional
            The weight whose network is drawn: blocks as points, shared labels as lines with their
            sizes, and axes of the update as open ends. By default every weight is a coloured band
            on the fold of its group, of the first twelve groups.
        operation : str, optional
            The merge operation whose support is asked for, where the plan has several.

        Returns
        -------
        matplotlib.figure.Figure
            To be shown by a notebook, or saved by ``savefig``.

        Raises
        ------
        KeyError
            If the plan has no weight of that name.
        ModuleNotFoundError
            Without matplotlib, the extra ``plot``.
        """
        from superlora import plot

        if name is None:
            return plot.draw_folds(self.layout)
        return plot.draw_network(self.network(name, operation), name)

    def _support(self, name: str, operation: str | None) -> str:
        """Return a weight's own name in the layout, or say which weights there are."""
        if operation is not None:
            name = self.layout.supports.get(name, {}).get(operation, f"{operation}.{name}")
        self.blocks_of(name)
        return name

    def _check_plain(self, name: str) -> None:
        if not self.layout.axes[name].plain:
            raise ValueError(
                f"{name!r} must be a matrix to be applied to inputs: it has shape "
                f"{self.layout.axes[name].shape}; form its update with Plan.delta"
            )

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
