"""`compare`: the errors of several specs against their numbers of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from superlora._backend import Array
from superlora.algebra.fit import check_updates
from superlora.choose.candidates import Candidates, candidate, width_of
from superlora.choose.deltas import axes_of
from superlora.design.axes import Axes
from superlora.design.spec import Spec
from superlora.plan import Plan


def compare(
    specs: Mapping[str, Spec | Sequence[Spec]],
    deltas: Mapping[str, Array],
    *,
    dtype: Any = "float32",
    shapes: Mapping[str, tuple[int, ...] | Axes] | None = None,
    **options: Any,
) -> Candidates:
    """Fit several specs to given updates, and list their errors beside what they cost.

    Parameters
    ----------
    specs : mapping of str to Spec or sequence of Spec
        By the name of a curve: a spec, or several, such as a family's for some ranks.
    deltas : mapping of str to array
        The updates ΔW of all weights, of one library, as `Plan.deltas` returns them.
    dtype : str or dtype
        In which the factors are stored: ``"float16"``, ``"bfloat16"``, ``"float32"`` or
        ``"float64"``. It says what a parameter takes.
    shapes : mapping of str to shape, optional
        Of updates with more axes than two, what they are.
    **options : Any
        Those of `Plan.fit`.

    Returns
    -------
    Candidates
        In the order of `specs`. It prints as a table, and ``plot`` draws the error against the
        number of parameters, a curve a name.

    Raises
    ------
    TypeError
        If an argument is of another kind.
    ValueError
        If a spec does not serve these shapes, or updates are not finite, or all of them are zero.

    Examples
    --------
    >>> import numpy as np, superlora as sl
    >>> rng = np.random.default_rng(0)
    >>> deltas = {name: rng.normal(size=(8, 6)) for name in "qv"}
    >>> table = sl.compare({"lora": [sl.lora(1), sl.lora(2)], "dense": sl.dense()}, deltas)
    >>> [row.num_parameters for row in table], table[2].error < 1e-12
    ([28, 56, 96], True)
    """
    width = width_of(dtype)
    if not isinstance(specs, Mapping) or not specs:
        raise TypeError(f"specs must map names to specs: got {specs!r}")
    axes = axes_of(deltas, shapes)
    check_updates(deltas)
    plans: list[tuple[str, Plan]] = []
    for name, own in specs.items():
        several = [own] if isinstance(own, Spec) else own
        if not isinstance(several, Sequence) or not all(isinstance(each, Spec) for each in several):
            raise TypeError(f"specs[{name!r}] must be a superlora.Spec, or several: got {own!r}")
        for each in several:
            try:
                plans.append((name, Plan(each, axes)))
            except ValueError as error:
                raise ValueError(f"specs[{name!r}]: {error}") from None
    return Candidates(candidate(name, plan, width, deltas, options) for name, plan in plans)
