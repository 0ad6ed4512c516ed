"""`Spec`: one point in the design space, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from superlora.checks import hashable
from superlora.design import spec_checks as checks
from superlora.design.patterns import matches, starts_of
from superlora.design.spec_checks import Rank
from superlora.maps import Identity, Map, map_from_dict


@dataclass(frozen=True, repr=False)
class Spec:
    """The hyper-parameters of the equation; every method is one value of this class.

    Parameters
    ----------
    rank : int, "full" or nested tuple
        An integer is the rank of every mode of every split. Where it exceeds a
        mode's size that mode is left un-factored, and a matrix of lower rank
        becomes dense (``Plan.describe`` says so); a CP rank (identity core, M > 2)
        may exceed the sizes, since a tensor's rank may.
        ``"full"`` leaves every split un-factored: dense. A tuple has one entry
        a split, each an integer, ``"full"``, or a tuple with one entry a mode;
        with ``splits=1`` the outer tuple may be left out. Where factors are frozen, an
        integer is lowered to what they can have instead. A train has M - 1 ranks, each
        between two neighbouring modes: an integer is lowered, and an entry ``"full"``
        is set, to the largest that modes of these sizes can have there.
    order : int or tuple of int
        Number of modes M of the fold, 1 to 16. A tuple gives every split its own
        order, and the fold the largest of them: a split of lower order has
        neighbouring modes of the fold as one.
    splits : int
        Number of factors K of the product, 1 to 16.
    groups : {"weight", "layer"} or int
        Which updates share one tensor: each its own, one a layer, or that many
        contiguous pieces G of all updates, whatever the weights' boundaries. A layer is
        an item of a numbered list in the weights' names, of nested lists the innermost
        whose items are built alike: ``layers.0.blocks.1`` of Swin's
        ``layers.0.blocks.1.attn.qkv``, ``blocks.3`` of ``blocks.3.mlp.2``.
    fold : {"natural", "stack", "balanced", "aligned"} or tuple
        ``"natural"`` keeps one weight's own modes, (output, input · window), where those
        in a stack (`superlora.Axes`) are a group each; ``"stack"`` concatenates
        weights of equal input width (order 2) or of equal shape (order 3), also
        those of a stack;
        ``"balanced"`` makes the modes nearly equal; ``"aligned"`` does so with a
        last mode that divides every input width, so that whole weights can be
        applied as factors. A tuple of integers says the mode sizes, a tuple of
        tuples the mode sizes of every split; None there, once for the outputs and once
        for the inputs, is what is left of one weight's own, whose outputs have the
        first half of the modes. A fold of order 1 is the vector itself.
    core : {"identity", "diagonal", "full", "train"}, None, or a tuple with one of these a split
        ``"identity"`` is the fixed superdiagonal core of ones: LoRA for M = 2, CP
        above; ``"diagonal"`` has trainable numbers there. ``"train"`` is a tensor
        train: a core ``(r_{m-1}, d_m, r_m)`` for every mode in the order of the fold
        and no factors; for M = 1 a vector is dense, as with any core. None takes the
        paper's choice, identity up to M = 2 and full above, and full wherever the
        ranks of a split differ between its modes.
    combine : {"kronecker", "hadamard"}
        How the splits are multiplied; for ``"hadamard"`` each has the whole fold.
    terms : int
        Number of such products that are summed, 1 to 16. Split k of term t has the
        index ``t * splits + k`` in the names of its blocks.
    first_split : int, optional
        Bound on the mode sizes of the first split: in every mode it takes this
        divisor, or the largest below it, as LoKr's ``factor``. None balances the
        splits.
    dense_from : {"rank", "half", "never"}
        From which integer rank a matrix split is dense: above the smaller mode, where
        a factorisation says no more; from half of the larger mode on, LoKr's rule; or
        never, as in the peers' LoRA.
    frozen : mapping of str to str
        Blocks that are fixed, ``"split.block"``, and where they come from:
        ``"random"`` (normal, from `seed`), ``"ones"``, ``"stored"`` (in the
        adapter's file), or the leading singular vectors of the weight itself:
        ``"singular"``, times the singular values (``"singular_scaled"``) or their
        roots (``"singular_root"``).
    frozen_terms : int
        Number of the last of the `terms` whose blocks are all fixed, and ``"stored"``: what is
        trained is then added to a fixed update, as `superlora.torch.attach` does it to keep a
        model's output at the start.
    tied : sequence of str
        Blocks that all groups share, ``"split.block"``. The largest group has the
        whole block, a smaller one its leading slices.
    seed : int
        Of the random frozen blocks, in [0, 2**64).
    ratio : float
        Entries before the map over entries after it, in (0, 1]; rounded up to whole modes
        of the fold. A fold of explicit sizes says it by itself.
    size : int, optional
        Entries before the map in every group, instead of a ratio.
    map : Map
        The fixed linear map F between a fold and its group. But for `maps.Separable` and maps
        that keep the size, it takes a balanced fold, explicit sizes or order 1.
    factor_map : Map, optional
        A fixed linear map F_in from the trained parameters to the trainable blocks, which
        are the blocks themselves without it. The update is then not linear in them.
    factor_size : int, optional
        How many parameters it takes.
    factor_scope : {"all", "block"}
        Whether one vector of so many is mapped to all blocks, joined in the order of their
        names' first appearance, or each block has one of its own.
    alpha : float, optional
        The scale is ``alpha / rank``; a nested rank must have one integer only.
    rslora : bool
        Divide alpha by the root of the rank instead.
    scale : float, optional
        The scale itself. Neither given: 1.
    cut : {"even", "pad"}
        How an integer `groups` cuts a total that it does not divide: into sizes that differ by
        at most one, or into equal ones of which the last is padded.
    overrides : mapping of str to mapping
        Other fields for some weights: a regular expression that matches a whole
        name or its end after a dot, and the fields that differ; None leaves these weights
        out. The first that matches counts. Weights with the same fields make up groups
        among themselves.

    Raises
    ------
    TypeError, ValueError
        If a value is out of its range or two of them contradict each other.

    Notes
    -----
    The equation, [1]_ Section 2, with sums of terms and the Hadamard product as
    further choices::

        dW_group = scale * F( sum_t kron_k( C_tk x_1 A_tk1 ... x_M A_tkM ) )
        [C, A] = F_in(theta)

    Four fields are there so that parameters are laid out as in other code; a new design leaves
    them as they are. `first_split` is ``factor`` of LoKr in LyCORIS and PEFT. `dense_from` is
    ``"half"`` for their LoKr, and ``"never"`` for their LoRA and for GLoRA. `factor_scope` is
    ``"block"`` for NOLA. `cut` is ``"pad"`` for groups as ``torch.chunk`` cuts them.

    References
    ----------
    .. [1] X. Chen et al., "SuperLoRA: Parameter-Efficient Unified Adaptation for
       Large Vision Models", 2024.

    Examples
    --------
    >>> spec = Spec(rank=4, order=3, groups=1, fold="balanced")
    >>> Spec.from_dict(spec.to_dict()) == spec
    True
    >>> Spec(rank=8, alpha=16, overrides={"query": {"rank": 4}}).of("0.query").scaling
    4.0
    """

    rank: Rank = 4
    order: int | tuple[int, ...] = 2
    splits: int = 1
    groups: str | int = "weight"
    fold: str | tuple[Any, ...] = "natural"
    core: str | tuple[str | None, ...] | None = None
    combine: str = "kronecker"
    terms: int = 1
    first_split: int | None = None
    dense_from: str = "rank"
    frozen: Any = ()
    frozen_terms: int = 0
    tied: Any = ()
    seed: int = 0
    ratio: float = 1.0
    size: int | None = None
    map: Map = field(default_factory=Identity)
    factor_map: Map | None = None
    factor_size: int | None = None
    factor_scope: str = "all"
    alpha: float | None = None
    rslora: bool = False
    scale: float | None = None
    cut: str = "even"
    overrides: Any = ()

    def __post_init__(self) -> None:
        for name in ("frozen", "overrides"):
            object.__setattr__(self, name, checks.pairs(name, getattr(self, name)))
        for item in dataclasses.fields(self):
            if item.name not in ("map", "factor_map"):
                object.__setattr__(self, item.name, hashable(getattr(self, item.name)))
        checks.check_values(self)
        checks.check_fold(self)
        checks.check_map(self)
        checks.check_factor_map(self)
        checks.check_scale(self)
        checks.check_blocks(self)
        for pattern, fields in self.overrides:
            self._check_override(pattern, () if fields is None else fields)

    def __repr__(self) -> str:
        plain = Spec()
        fields = [(item.name, getattr(self, item.name)) for item in dataclasses.fields(self)]
        changed = [f"{name}={own!r}" for name, own in fields if own != getattr(plain, name)]
        return f"Spec({', '.join(changed)})"

    @property
    def orders(self) -> tuple[int, ...]:
        """The order of every split."""
        return self.order if isinstance(self.order, tuple) else (self.order,) * self.splits

    @property
    def modes(self) -> int:
        """The order of the fold, the largest of the splits'."""
        return max(self.orders)

    @property
    def has_sizes(self) -> bool:
        """Whether the fold gives the mode sizes of every split."""
        return isinstance(self.fold[0], tuple)

    @property
    def cores(self) -> tuple[str | None, ...]:
        """The kind of core of every split."""
        return self.core if isinstance(self.core, tuple) else (self.core,) * self.splits

    @property
    def split_ranks(self) -> tuple[Any, ...]:
        """One entry for each split: an int, ``"full"``, or a tuple, as `rank` has them."""
        return checks.split_ranks(self.rank, self.orders, self.cores)

    @property
    def trained_terms(self) -> int:
        """The number of the first terms that are trained."""
        return self.terms - self.frozen_terms

    @property
    def scaling(self) -> float:
        """The number s in front of the equation, resolved from `scale` and `alpha`."""
        if self.alpha is not None:
            (rank,) = checks.integers_in(self.rank)
            return float(self.alpha / (math.sqrt(rank) if self.rslora else rank))
        return 1.0 if self.scale is None else float(self.scale)

    def of(self, name: str) -> Spec | None:
        """Return the spec of one weight, without overrides.

        Parameters
        ----------
        name : str
            The weight's dotted name.

        Returns
        -------
        Spec or None
            This spec with the fields of the first override that matches `name`; None where
            that leaves it out.
        """
        matched = self.override_of(name)
        changes = {} if matched is None else dict(self.overrides)[matched]
        return None if changes is None else self._with(changes)

    def override_of(self, name: str) -> str | None:
        """Return the pattern of the override that a weight takes, if any.

        Parameters
        ----------
        name : str
            The weight's dotted name.

        Returns
        -------
        str or None
            The first that matches.
        """
        starts = starts_of(name)
        for pattern, _ in self.overrides:
            if matches(pattern, name, starts):
                return str(pattern)
        return None

    def _with(self, changes: Any) -> Spec:
        changes = dict(changes)
        if "scale" in changes or "alpha" in changes:  # one takes the place of the other
            number = {"scale": None, "alpha": None, "rslora": self.rslora and "alpha" in changes}
            changes = {**number, **changes}
        return self.replace(**{**changes, "overrides": ()})

    def _check_override(self, pattern: str, changes: Any) -> None:
        known = {item.name for item in dataclasses.fields(self)} - {"overrides"}
        place = f"overrides[{pattern!r}]"
        changes = checks.pairs(place, changes)
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{place} must be a valid regular expression: {error}") from None
        unknown = sorted(set(dict(changes)) - known)
        if unknown:
            raise ValueError(f"{place} must change fields of a spec: got {unknown}")
        try:
            other = self._with(changes)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{place}: {error}") from None
        if self.scaling == 0 != other.scaling:
            raise ValueError(f"{place} must not change the scale where that of the spec is 0")

    def replace(self, **changes: Any) -> Spec:
        """Return a copy with some values changed, checked again.

        Parameters
        ----------
        **changes : Any
            Fields of the spec by name.

        Returns
        -------
        Spec
            The changed copy.
        """
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as plain JSON values.

        Returns
        -------
        dict
            Every field; tuples become lists, the map its own dict.
        """
        return {
            item.name: _plain(item.name, getattr(self, item.name))
            for item in dataclasses.fields(self)
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Spec:
        """Make a spec from what `to_dict` gave, also after a round trip through JSON.

        Parameters
        ----------
        values : mapping
            Fields by name; absent ones take their default.

        Returns
        -------
        Spec
            The spec, checked.

        Raises
        ------
        TypeError
            If `values` is not a mapping.
        ValueError
            If a field is unknown, or its value is refused.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"spec must be a mapping: got {type(values).__name__}")
        known = {item.name for item in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"spec must have only the fields {sorted(known)}: got also {unknown}")
        return cls(**_parsed(values))


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Map):
        return value.to_dict()
    if name == "frozen":
        return dict(value)
    if name == "overrides":
        return {
            pattern: None if fields is None else {key: _plain(key, item) for key, item in fields}
            for pattern, fields in value
        }
    return [_plain("", item) for item in value] if isinstance(value, tuple) else value


def _parsed(values: Mapping[str, Any]) -> dict[str, Any]:
    fields = dict(values)
    for name in ("map", "factor_map"):
        if fields.get(name) is not None:
            fields[name] = map_from_dict(fields[name])
    if isinstance(fields.get("overrides"), Mapping):
        fields["overrides"] = {
            pattern: _parsed(changes) if isinstance(changes, Mapping) else changes
            for pattern, changes in fields["overrides"].items()
        }
    return fields
