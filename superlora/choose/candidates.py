"""`Candidates`: specs with their sizes and errors, as a table and as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy

from superlora._backend import Array
from superlora.algebra.fit import as_numpy
from superlora.design.spec import Spec
from superlora.design.spec_checks import integers_in
from superlora.design.supports import Supports
from superlora.plan import Plan
from superlora.plot import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Bytes of a number.
_WIDTHS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
# An error that rounding has made zero is drawn at this.
_LEAST_ERROR = 1e-16


@dataclass(frozen=True)
class Candidate:
    """A spec, what it costs and how near it comes.

    Attributes
    ----------
    family : str
        What the spec is one of.
    spec : Spec or Supports
        The design.
    num_parameters : int
        Trainable entries of all blocks.
    nbytes : int
        Bytes of those.
    error : float or None
        Relative Frobenius error of all weights together, ``‖ΔW - fit‖ / ‖ΔW‖``; None where there
        was nothing to fit.
    seconds : float or None
        Wall time of the fit.
    factors : dict of str to array, or None
        The factors that were fitted, as `Plan.fit` returns them.

    Examples
    --------
    >>> import superlora as sl
    >>> (row,) = sl.suggest({"q": (6, 4)}, budget=22, families=["lora"])
    >>> row.spec, row.num_parameters, row.nbytes
    (Spec(rank=2), 20, 80)
    """

    family: str
    spec: Spec | Supports
    num_parameters: int
    nbytes: int
    error: float | None = None
    seconds: float | None = None
    factors: dict[str, Array] | None = field(default=None, repr=False, compare=False)


class Candidates(tuple[Candidate, ...]):
    """A tuple of candidates that prints as a table.

    Attributes
    ----------
    left_out : dict of str to str
        Families that are no candidates, and why.

    Examples
    --------
    >>> import superlora as sl
    >>> sl.suggest({"q": (6, 4)}, budget=15, families=["lora", "lokr", "loha"])
    family     rank  parameters  bytes
    lora          1          10     40
    lokr    full, 2          10     40
    left out: loha, takes 20 parameters at rank 1
    """

    left_out: dict[str, str]

    def __new__(cls, rows: Iterable[Candidate], left_out: Mapping[str, str] | None = None) -> Self:
        """Return candidates, and what is said of those that are none."""
        found = super().__new__(cls, rows)
        found.left_out = dict(left_out or {})
        return found

    def __repr__(self) -> str:
        cells = [("family", "rank", "parameters", "bytes", "error", "seconds")]
        for row in self:
            error = "" if row.error is None else f"{row.error:.4g}"
            seconds = "" if row.seconds is None else f"{row.seconds:.2g}"
            sizes = (f"{row.num_parameters:,}", f"{row.nbytes:,}")
            cells.append((row.family, _rank(row.spec), *sizes, error, seconds))
        reasons = [f"left out: {family}, {reason}" for family, reason in self.left_out.items()]
        return "\n".join([table(cells), *reasons])

    def plot(self) -> Figure:
        """Draw the error against the number of parameters, a curve for each family.

        Returns
        -------
        matplotlib.figure.Figure
            Both axes are logarithmic. To be shown by a notebook, or saved by ``savefig``.

        Raises
        ------
        ModuleNotFoundError
            Without matplotlib, the extra ``plot``.
        ValueError
            If the candidates have no errors, since they were not fitted.
        """
        curves: dict[str, list[tuple[int, float]]] = {}
        for row in self:
            if row.error is None:
                raise ValueError(f"candidates must be fitted to be drawn: {row.family!r} is not")
            point = (row.num_parameters, max(row.error, _LEAST_ERROR))
            curves.setdefault(row.family, []).append(point)
        drawn, (place,) = new_figure(1, 6.4, 4.2)
        from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

        for number, (family, points) in enumerate(curves.items()):
            # Ten colours, then the next ten with another mark.
            style = {"color": f"C{number % 10}", "marker": "osD^v"[number // 10 % 5]}
            place.plot(*zip(*sorted(points), strict=True), label=family, markersize=5, **style)
        place.set(xscale="log", yscale="log", xlabel="parameters", ylabel="relative error")
        place.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        place.xaxis.set_major_formatter(EngFormatter(sep=""))
        place.xaxis.set_minor_formatter(NullFormatter())
        place.grid(alpha=0.25)
        drawn.legend(loc="outside right upper", fontsize=8)
        return drawn


def _rank(spec: Spec | Supports) -> str:
    """Return the size of a spec for a table, or its ranks, the least and the largest."""
    if isinstance(spec, Supports):
        return ""
    field, unit = ("rank", "") if spec.size is None else ("size", "size ")
    own = getattr(spec, field)
    if not spec.overrides:
        return unit + str(own).strip("()").replace("'", "")
    found = list(integers_in(own))
    for _, fields in spec.overrides:
        found += [0] if fields is None else integers_in(dict(fields).get(field, own))
    return f"{unit}{min(found)} to {max(found)}" if found else str(own)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows, the first of them the heads, as a table without its empty columns."""
    columns = [own for own in zip(*rows, strict=True) if any(own[1:])]
    padded = [[cell.rjust(max(map(len, own))) for cell in own] for own in columns]
    padded[0] = [cell.strip().ljust(len(cell)) for cell in padded[0]]
    return "\n".join("  ".join(row) for row in zip(*padded, strict=True))


def width_of(dtype: Any) -> int:
    """Return the bytes of a number of a dtype, given by its name or of any library."""
    name = str(getattr(dtype, "__name__", dtype)).rpartition(".")[2]
    if name not in _WIDTHS:
        raise ValueError(f"dtype must be one of {', '.join(_WIDTHS)}: got {dtype!r}")
    return _WIDTHS[name]


def candidate(
    family: str,
    plan: Plan,
    width: int,
    deltas: Mapping[str, Array] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Candidate:
    """Return a plan as a candidate, fitted to updates if there are some."""
    count = plan.num_parameters
    if deltas is None:
        return Candidate(family, plan.spec, count, width * count)
    # A spec may leave weights out, whose updates are lost.
    kept = {name: deltas[name] for name in plan.shapes}
    factors, report = plan.fit(kept, **(options or {}))
    norms = {name: float(numpy.linalg.norm(as_numpy(delta))) for name, delta in deltas.items()}
    lost = [norm for name, norm in norms.items() if name not in kept]
    rest = math.hypot(report.error * math.hypot(*(norms[name] for name in kept)), *lost)
    error = rest / math.hypot(*norms.values())
    return Candidate(family, plan.spec, count, width * count, error, report.seconds, factors)
