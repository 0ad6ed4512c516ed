"""`suggest`: the specs that fit a budget, and how near they come to given updates."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy
from scipy.special import digamma

from superlora import presets
from superlora._backend import Array
from superlora.algebra.fit import check_updates
from superlora.checks import check_count
from superlora.choose.budget import Captured, allot, ladder, largest_rank, with_ranks
from superlora.choose.candidates import Candidate, Candidates, candidate, width_of
from superlora.choose.deltas import axes_of, singular_values
from superlora.design.axes import Axes
from superlora.design.grouping import check_shapes
from superlora.design.spec import Spec
from superlora.errors import some
from superlora.plan import Plan

Family = Callable[[int], Any]
Families = Mapping[str, str | Family] | Iterable[str | Family]

_FAMILIES: dict[str, Family] = {
    "lora": presets.lora,
    "lokr": presets.lokr,
    "loha": presets.loha,
    "lonkr": presets.lonkr,
    "tt_lora": presets.tt_lora,
    "lotr": presets.lotr,
    "fact_tk": presets.fact_tk,
    "metatt": presets.metatt,
    "lorta": presets.lorta,
    "lorta of order 4": functools.partial(presets.lorta, order=4),
    "one matrix": lambda rank: Spec(rank=rank, groups=1, fold="balanced"),
    "a matrix a layer": lambda rank: Spec(rank=rank, groups="layer", fold="balanced"),
    "waveft": presets.waveft,
}


def suggest(
    weights: Mapping[str, Any],
    *,
    budget: int | None = None,
    budget_bytes: int | None = None,
    dtype: Any = "float32",
    families: Families | None = None,
    sensitivity: Mapping[str, float] | None = None,
    shapes: Mapping[str, tuple[int, ...] | Axes] | None = None,
    **options: Any,
) -> Candidates:
    """Return the specs that fit a budget: of every family the one of the largest rank or size.

    Parameters
    ----------
    weights : mapping of str to shape, or mapping of str to array
        The shapes of the weights, as `Plan` takes them; or their updates ΔW, to which every
        candidate is then fitted. A gradient is an update too: that of a step.
    budget : int
        Trainable parameters at most; or give `budget_bytes`.
    budget_bytes : int
        Bytes of those at most.
    dtype : str or dtype
        In which the factors are stored, ``"float16"``, ``"bfloat16"``, ``"float32"`` or
        ``"float64"``: what a parameter takes.
    families : sequence or mapping, optional
        Names of presets, or functions of a rank, or of another size, that return a spec; a mapping
        names them. By default the main families, those that the shapes allow; a table shows
        WaveFT's size for a rank.
    sensitivity : mapping of str to float, optional
        A score for every weight, as `superlora.torch.sensitivity` finds: every weight then has
        a rank of its own. For shapes alone; updates say more.
    shapes : mapping of str to shape, optional
        Of updates with more axes than two, what they are.
    **options : Any
        Those of `Plan.fit`.

    Returns
    -------
    Candidates
        With updates by their relative error, the least first; else in the order of the families.
        ``[0].spec`` is the first one's spec. Families without a spec under the budget stand in
        ``left_out``.

    Raises
    ------
    TypeError
        If an argument is of another kind.
    ValueError
        If no family fits the budget: the message has the smallest. If updates are not finite, or
        all of them are zero.

    Notes
    -----
    The rank is found by counting alone: the number of parameters rises with it.

    *A rank for each weight.* Ranks rise one by one, and the next is that of the weight ``l`` that
    gains most for each parameter it takes, until the budget is spent. For LoRA and given updates
    the gain of the rank ``r`` is ``σ_lr²``, so that the ranks are those of the least error of all
    weights together (by Eckart and Young; but for what is left of the budget). This is the row
    ``"lora, ranks by weight"``. With scores ``s_l`` it is ``s_l / r``, as if the energies of a
    weight fell like ``1 / r``: parameters in proportion to scores, as in GoRA [1]_, where AdaLoRA
    [2]_ and EVA [3]_ rank single directions. It takes a family whose weights have separate blocks.

    References
    ----------
    .. [1] H. He et al., "GoRA: Gradient-driven Adaptive Low Rank Adaptation", 2025.
    .. [2] Q. Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient
       Fine-Tuning", 2023.
    .. [3] F. Paischer et al., "One Initialization to Rule them All: Fine-tuning via Explained
       Variance Adaptation", 2024.

    Examples
    --------
    >>> import superlora as sl
    >>> shapes = {"0.q": (64, 64), "0.up": (256, 64), "1.q": (64, 64), "1.up": (256, 64)}
    >>> sl.suggest(shapes, budget=2_000, families=["lora", "tt_lora", "lorta"])
    family   rank  parameters  bytes
    lora        2       1,792  7,168
    tt_lora     4       1,600  6,400
    lorta       9       1,665  6,660
    >>> scores = {"0.q": 1.0, "0.up": 4.0, "1.q": 8.0, "1.up": 8.0}
    >>> best = sl.suggest(shapes, budget=2_000, families=["lora"], sensitivity=scores)[0]
    >>> [best.spec.of(name).rank for name in shapes]
    [1, 1, 7, 2]
    """
    width = width_of(dtype)
    most = _budget(budget, budget_bytes, width)
    given = isinstance(weights, Mapping) and any(hasattr(own, "dtype") for own in weights.values())
    if not given and (shapes is not None or options):
        extra = some(["shapes"] * (shapes is not None) + list(options))
        raise TypeError(f"{extra} must come with updates: got shapes alone")
    if given and sensitivity is not None:
        raise TypeError("sensitivity must come with shapes: got updates, whose values say more")
    axes = axes_of(weights, shapes) if given else check_shapes(weights)
    if given:
        check_updates(weights)
    deltas = weights if given else None
    scores = None if sensitivity is None else _score(sensitivity, axes)
    plans: list[tuple[str, Plan]] = []
    left_out: dict[str, str] = {}
    least: dict[str, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of modes of size 1, which cost and err as counted
        for name, family in _named(families).items():
            try:
                least[name], own = _plans(name, family, axes, most, scores, deltas)
            except ValueError as error:
                left_out[name] = str(error)
                continue
            plans += own.items()
            if not own:
                left_out[name] = f"takes {least[name]:,} parameters at rank 1"
    if least and not plans:
        name = min(least, key=least.__getitem__)
        unit, one = ("", 1) if budget_bytes is None else ("_bytes", width)
        raise ValueError(
            f"budget{unit} must be at least {one * least[name]:,}, what {name!r} takes at rank "
            f"or size 1, the smallest: got {budget or budget_bytes:,}"
        )
    rows: list[Candidate] = []
    for name, plan in plans:
        try:
            rows.append(candidate(name, plan, width, deltas, options))
        except ValueError as error:
            left_out[name] = str(error)
    if not rows:
        reasons = some(f"{name}: {reason}" for name, reason in left_out.items())
        raise ValueError(f"families must have one for these weights: {reasons}")
    return Candidates(sorted(rows, key=lambda row: row.error or 0.0), left_out)


def _budget(budget: int | None, budget_bytes: int | None, width: int) -> int:
    """Return a budget as a number of parameters."""
    if (budget is None) == (budget_bytes is None):
        raise TypeError(
            f"one of budget and budget_bytes must be given: got {budget!r} and {budget_bytes!r}"
        )
    if budget_bytes is None:
        return check_count("budget", budget)
    return check_count("budget_bytes", budget_bytes, width) // width


def _named(families: Families | None) -> dict[str, Family]:
    """Return functions of a rank by name."""
    if families is None:
        return _FAMILIES
    if isinstance(families, str) or not isinstance(families, (Mapping, Iterable)):
        raise TypeError(f"families must be a sequence or a mapping: got {families!r}")
    given: Mapping[str, str | Family] = (
        families
        if isinstance(families, Mapping)
        else {own if isinstance(own, str) else own.__name__: own for own in families}
    )
    found: dict[str, Family] = {}
    for name, own in given.items():
        if isinstance(own, str):
            if own not in _FAMILIES and own not in presets.__all__:
                raise ValueError(f"families must name presets: got {own!r}")
            own = _FAMILIES.get(own) or getattr(presets, own)
        if not callable(own):
            raise TypeError(f"families[{name!r}] must be a function of a rank: got {own!r}")
        found[name] = own
    if not found:
        raise ValueError("families must name one at least: got none")
    return found


def _plan(name: str, family: Family, axes: Mapping[str, Axes], rank: int) -> Plan:
    try:
        spec = family(rank)
    except TypeError as error:
        raise TypeError(f"families[{name!r}] must take a rank alone: {error}") from None
    return Plan(spec, axes)


def _plans(
    name: str,
    family: Family,
    axes: Mapping[str, Axes],
    budget: int,
    scores: Captured | None,
    deltas: Mapping[str, Array] | None,
) -> tuple[int, dict[str, Plan]]:
    """Return what a family's smallest plan takes, and its plans under a budget, none or more."""
    plan = functools.partial(_plan, name, family, axes)
    if scores is not None:
        return _by_weight(name, family, axes, budget, scores, name)
    least = plan(1).num_parameters
    rank = largest_rank(plan, budget)
    found = {name: plan(rank)} if rank else {}
    if deltas is not None and len(axes) > 1 and _is_low_rank(plan(1).spec):
        label, energy = f"{name}, ranks by weight", _energy(deltas, axes)
        least, own = _by_weight(name, family, axes, budget, energy, label)
        if [each.spec for each in own.values()] != [each.spec for each in found.values()]:
            found |= own
    return least, found


def _is_low_rank(spec: object) -> bool:
    """Return whether a spec of rank 1 is LoRA's, but for its scale."""
    return isinstance(spec, Spec) and spec.replace(scale=None, alpha=None, rslora=False) == Spec(1)


def _by_weight(
    name: str,
    family: Family,
    axes: Mapping[str, Axes],
    budget: int,
    captured: Captured,
    label: str,
) -> tuple[int, dict[str, Plan]]:
    """Return what the smallest rank takes, and the plan that gives each weight one of its own."""
    joint, least = _plan(name, family, axes, 1), {}
    spec = joint.spec
    alone = {own: functools.partial(_plan, name, family, {"w": own}) for own in axes.values()}
    if isinstance(spec, Spec) and spec.groups == "weight" and not spec.overrides:
        least = {own: plan(1).num_parameters for own, plan in alone.items()}
    if sum(least.get(own, 0) for own in axes.values()) != joint.num_parameters:
        raise ValueError("its weights share blocks, and have no ranks of their own")
    ladders = {own: ladder(plan, budget) for own, plan in alone.items()}
    ranks = allot({weight: ladders[own] for weight, own in axes.items()}, captured, budget)
    found = {label: Plan(with_ranks(family, ranks), axes)} if any(ranks.values()) else {}
    return min(least.values()), found


def _energy(deltas: Mapping[str, Array], axes: Mapping[str, Axes]) -> Captured:
    """Return the energy that a rank of a weight has: its squared singular values."""
    found = {name: singular_values(delta, axes[name]) for name, delta in deltas.items()}
    largest = max(float(values.max()) for values in found.values())
    # Of all matrices of a stack, which have one rank.
    energies = {
        name: numpy.square(values / largest).sum(axis=0).cumsum() for name, values in found.items()
    }
    # Beyond all singular values a weight is dense.
    return lambda name, rank: float(energies[name][min(rank, len(energies[name])) - 1])


def _score(sensitivity: Mapping[str, float], axes: Mapping[str, Axes]) -> Captured:
    """Return what a rank of a weight gains, as if its energies fell like 1, 1/2, 1/3."""
    if not isinstance(sensitivity, Mapping):
        raise TypeError(f"sensitivity must map names to scores: got {type(sensitivity).__name__}")
    differ = sorted({*sensitivity} ^ {*axes}, key=str)
    if differ:
        raise ValueError(
            "sensitivity must have a score for every weight and no other: got one alone of "
            f"{some(map(repr, differ))}"
        )
    scores = {name: float(score) for name, score in sensitivity.items()}
    for name, score in scores.items():
        if not 0 <= score < math.inf:
            raise ValueError(f"sensitivity[{name!r}] must be finite and not below 0: got {score}")
    if not any(scores.values()):
        raise ValueError("sensitivity must have a score above 0: all are 0")
    return lambda name, rank: scores[name] * float(digamma(rank + 1) + numpy.euler_gamma)
