"""`spectrum`: the singular values of given updates, and of the unfoldings of their folds."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy

from superlora._backend import Array
from superlora.algebra.fit import check_updates, group_entries
from superlora.algebra.folding import fold_group
from superlora.choose.candidates import table
from superlora.choose.deltas import axes_of, singular_values
from superlora.design.axes import Axes
from superlora.design.layout import Layout
from superlora.design.spec import Spec
from superlora.plan import Plan
from superlora.plot import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Values = numpy.ndarray[Any, Any]
# Curves that a legend can name.
_NAMED = 10


@dataclass(frozen=True, repr=False)
class Spectrum:
    """Singular values of matrices, by name. It prints as a table.

    Attributes
    ----------
    values : dict of str to numpy.ndarray
        Singular values in float64, descending: of every weight, of all matrices of its stack
        together; then, with a spec, of every unfolding of every group.

    Examples
    --------
    >>> import numpy as np, superlora as sl
    >>> found = sl.spectrum({"q": np.diag([4.0, 3.0, 0.0])})
    >>> found
    matrix  norm  largest σ  effective rank  90 %  99 %  of
    q          5          4            1.98     2     2   3
    >>> found.shares["q"].tolist()
    [0.64, 1.0, 1.0]
    """

    values: dict[str, Values]

    @functools.cached_property
    def shares(self) -> dict[str, Values]:
        """What share of its energy a matrix has at each rank: the sum of σ² over that of all."""
        # By the largest first: squares of small numbers would be zero.
        energies = {name: (own / (own[0] or 1.0)) ** 2 for name, own in self.values.items()}
        return {name: own.cumsum() / (own.sum() or 1.0) for name, own in energies.items()}

    @functools.cached_property
    def effective_ranks(self) -> dict[str, float]:
        """Of every matrix ``exp(-Σ p log p)`` with ``p = σ / Σσ`` (Roy and Vetterli 2007)."""
        found = {}
        for name, own in self.values.items():
            parts = own[own > 0] / (own.sum() or 1.0)
            found[name] = float(numpy.exp(-(parts * numpy.log(parts)).sum())) if parts.size else 0.0
        return found

    def rank_for(self, share: float) -> dict[str, int]:
        """Return the least rank of every matrix that has a share of its energy.

        Parameters
        ----------
        share : float
            In (0, 1].

        Returns
        -------
        dict of str to int
            0 for a matrix of zeros.

        Raises
        ------
        ValueError
            If `share` is out of its range.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share must be in (0, 1]: got {share}")
        found = {}
        for name, own in self.shares.items():
            # Rounding may leave the last sum below 1.
            enough = share * own[-1]
            found[name] = int((own < enough).sum()) + 1 if own[-1] else 0
        return found

    def __repr__(self) -> str:
        heads = ("matrix", "norm", "largest σ", "effective rank", "90 %", "99 %", "of")
        cells: list[Sequence[str]] = [heads]
        most, nearly = self.rank_for(0.9), self.rank_for(0.99)
        for name, own in self.values.items():
            norms = (math.hypot(*own), own[0], self.effective_ranks[name])
            ranks = (most[name], nearly[name], own.size)
            cells.append((name, *[f"{number:.4g}" for number in norms], *map(str, ranks)))
        return table(cells)

    def plot(self) -> Figure:
        """Draw singular values, and the share of energy up to each rank.

        Returns
        -------
        matplotlib.figure.Figure
            To be shown by a notebook, or saved by ``savefig``.

        Raises
        ------
        ModuleNotFoundError
            Without matplotlib, the extra ``plot``.
        """
        drawn, (values, shares) = new_figure(2, 4.8, 3.6)
        from matplotlib import colormaps

        # Too many to be named are coloured in order.
        several = len(self.values) > _NAMED
        colours = colormaps["viridis"].resampled(len(self.values)) if several else "C{}".format
        for number, (name, own) in enumerate(self.values.items()):
            ranks, style = (
                numpy.arange(1, own.size + 1),
                {"color": colours(number), "markersize": 3},
            )
            values.plot(ranks[own > 0], own[own > 0], ".-", label=name, linewidth=1, **style)
            shares.plot(ranks, self.shares[name], ".-", linewidth=1, **style)
        values.set(xscale="log", yscale="log", xlabel="number", ylabel="singular value")
        shares.set(xscale="log", xlabel="rank", ylabel="share of energy", ylim=(0, 1.02))
        for place in (values, shares):
            place.grid(which="both", alpha=0.25)
        if several:
            first, *_, last = self.values
            drawn.suptitle(f"from {first} (dark) to {last} (bright)", size=8)
        else:
            drawn.legend(loc="outside lower center", ncols=3, fontsize=8)
        return drawn


def spectrum(
    deltas: Mapping[str, Array],
    *,
    spec: Spec | None = None,
    shapes: Mapping[str, tuple[int, ...] | Axes] | None = None,
) -> Spectrum:
    """Return the singular values of given updates, and of the unfoldings of a spec's folds.

    Parameters
    ----------
    deltas : mapping of str to array
        The updates ΔW of all weights, of numpy, torch or jax.
    spec : Spec, optional
        A design whose groups are folded and unfolded too.
    shapes : mapping of str to shape, optional
        Of updates with more axes than two, what they are.

    Returns
    -------
    Spectrum
        Under the names of the weights the singular values of each; under ``"group 0, mode 1"`` and
        the like those of the unfoldings.

    Raises
    ------
    TypeError
        If an argument is of another kind.
    ValueError
        If an update is not finite, or all of them are zero, or a map of the spec moves entries.

    Notes
    -----
    What an unfolding is says what its spectrum bounds. A Tucker decomposition of rank ``r_m`` in
    mode m leaves at least what the mode's unfolding ``(d_m, ∏ others)`` leaves beyond ``r_m``, and
    truncation of all modes at most the sum of these [1]_. A tensor train's ranks are those of the
    unfoldings ``(d_1 … d_m, ∏ others)``. Of a Kronecker product they are those of Van Loan's
    rearrangement: the digits of one split against those of all others.

    References
    ----------
    .. [1] L. De Lathauwer, B. De Moor, J. Vandewalle, "A Multilinear Singular Value
       Decomposition", SIAM J. Matrix Anal. Appl. 21 (4), 2000.

    Examples
    --------
    >>> import numpy as np, superlora as sl
    >>> rng = np.random.default_rng(0)
    >>> deltas = {name: np.outer(rng.normal(size=8), rng.normal(size=6)) for name in "qv"}
    >>> found = sl.spectrum(deltas, spec=sl.lotr(2))
    >>> found.rank_for(0.99)
    {'q': 1, 'v': 1, 'group 0, mode 0': 2, 'group 0, mode 1': 2, 'group 0, mode 2': 2}
    """
    axes = axes_of(deltas, shapes)
    check_updates(deltas)
    values = {
        name: -numpy.sort(-singular_values(delta, axes[name]), axis=None)
        for name, delta in deltas.items()
    }
    if spec is not None:
        if not isinstance(spec, Spec):
            raise TypeError(f"spec must be a superlora.Spec: got {type(spec).__name__}")
        layout = Plan(spec, axes).layout
        for group in range(len(layout.groups)):
            for name, matrix in _unfoldings(layout, group, deltas).items():
                values[name] = numpy.linalg.svd(matrix, compute_uv=False)
    return Spectrum(values)


def _unfoldings(layout: Layout, group: int, deltas: Mapping[str, Array]) -> dict[str, Values]:
    """Return the matrices whose ranks a group's decomposition has."""
    item, own = layout.groups[group], layout.specs[group]
    if not layout.in_place(group):
        raise ValueError(
            f"spec must leave entries in place to have unfoldings: {type(own.map).__name__} moves "
            f"those of group {group}"
        )
    vector, _ = group_entries(layout, group, deltas)
    digits, order = fold_group(vector, item.fold), len(item.fold)
    label = f"group {group}"
    if own.combine == "kronecker" and own.splits > 1:
        digits = digits.reshape(layout.radices(group))
        # The two unfoldings of a matrix are one, transposed.
        kept = range(own.splits if own.splits > 2 else 1)
        chosen = {f"{label}, split {k}": range(k, digits.ndim, own.splits) for k in kept}
    elif own.cores[0] == "train":
        chosen = {f"{label}, modes to {m}": range(m + 1) for m in range(order - 1)}
    else:
        chosen = {f"{label}, mode {m}": range(m, m + 1) for m in range(order if order > 2 else 1)}
    return {
        name: numpy.moveaxis(digits, [*modes], range(len(modes))).reshape(
            math.prod(digits.shape[mode] for mode in modes), -1
        )
        for name, modes in chosen.items()
    }
