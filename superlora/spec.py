"""`Spec`: one point in the design space, checked when it is made."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from superlora.maps import Identity, Map, map_from_dict
from superlora.shapes import check_count, frozen

Rank = int | str | tuple[Any, ...]

_GROUPS = ("weight", "layer")
_FOLDS = ("natural", "stack", "balanced", "aligned")
_CORES = ("identity", "full")
_CUTS = ("even", "pad")
# Array libraries bound the number of axes; a Kronecker product takes two a mode.
_MOST = 16


@dataclass(frozen=True)
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
        with ``splits=1`` the outer tuple may be left out.
    order : int
        Number of modes M of the fold, 1 to 16.
    splits : int
        Number of factors K of the Kronecker product, 1 to 16.
    groups : {"weight", "layer"} or int
        Which updates share one tensor: each its own, one a layer, or that many
        contiguous pieces G of all updates, whatever the weights' boundaries.
    fold : {"natural", "stack", "balanced", "aligned"} or tuple of int
        ``"natural"`` keeps one weight's own modes; ``"stack"`` concatenates
        weights of equal input width (order 2) or of equal shape (order 3);
        ``"balanced"`` makes the modes nearly equal; ``"aligned"`` does so with a
        last mode that divides every input width, so that whole weights can be
        applied as factors; a tuple says the mode sizes. A fold of order 1 is the vector itself.
    core : {"identity", "full"} or None
        ``"identity"`` is the frozen superdiagonal core: LoRA for M = 2, CP above.
        None takes the paper's choice, identity up to M = 2 and full above, and
        full wherever the ranks of a split differ between its modes.
    ratio : float
        Entries before the map over entries after it, in (0, 1].
    map : Map
        The fixed linear map F between a fold and its group.
    alpha : float, optional
        The scale is ``alpha / rank``; a nested rank must have one integer only.
    scale : float, optional
        The scale itself. Neither given: 1.
    cut : {"even", "pad"}
        How an integer `groups` cuts a total that it does not divide.

    Raises
    ------
    TypeError, ValueError
        If a value is out of its range or two of them contradict each other.

    Notes
    -----
    The equation, [1]_ Section 2::

        dW_group = scale * F( kron_k( C_k x_1 A_k1 ... x_M A_kM ) )

    References
    ----------
    .. [1] X. Chen et al., "SuperLoRA: Parameter-Efficient Unified Adaptation for
       Large Vision Models", 2024.

    Examples
    --------
    >>> spec = Spec(rank=4, order=3, groups=1, fold="balanced")
    >>> Spec.from_dict(spec.to_dict()) == spec
    True
    """

    rank: Rank = 4
    order: int = 2
    splits: int = 1
    groups: str | int = "weight"
    fold: str | tuple[int, ...] = "natural"
    core: str | None = None
    ratio: float = 1.0
    map: Map = field(default_factory=Identity)
    alpha: float | None = None
    scale: float | None = None
    cut: str = "even"

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            if item.name != "map":
                object.__setattr__(self, item.name, frozen(getattr(self, item.name)))
        for name in ("order", "splits"):
            if check_count(name, getattr(self, name)) > _MOST:
                raise ValueError(f"{name} must be at most {_MOST}: got {getattr(self, name)}")
        _check_groups(self.groups)
        _check_choice("core", self.core, (*_CORES, None))
        _check_choice("cut", self.cut, _CUTS)
        _check_fold(self.fold, self.order)
        self.split_ranks  # noqa: B018  (raises for a wrongly nested rank)
        _check_map(self.map, self.ratio)
        _check_scale(self)

    @property
    def split_ranks(self) -> tuple[Any, ...]:
        """One entry for each split: an int, ``"full"``, or a tuple with one entry a mode."""
        return _split_ranks(self.rank, self.order, self.splits)

    @property
    def scaling(self) -> float:
        """The number s in front of the equation, resolved from `scale` and `alpha`."""
        if self.alpha is not None:
            (rank,) = _integers(self.rank)
            return self.alpha / rank
        return 1.0 if self.scale is None else self.scale

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
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {
            **values,
            "rank": _thaw(self.rank),
            "fold": _thaw(self.fold),
            "map": self.map.to_dict(),
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
        fields = dict(values)
        if "map" in fields:
            fields["map"] = map_from_dict(fields["map"])
        return cls(**fields)


def _thaw(value: Any) -> Any:
    return [_thaw(item) for item in value] if isinstance(value, tuple) else value


def _check_choice(name: str, value: object, choices: tuple[Any, ...], other: str = "") -> None:
    if value not in choices:
        listed = " ".join([", ".join(map(repr, choices)), other]).strip()
        raise ValueError(f"{name} must be one of {listed}: got {value!r}")


def _check_groups(groups: object) -> None:
    if isinstance(groups, str):
        _check_choice("groups", groups, _GROUPS, "or an integer")
    elif isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"groups must be 'weight', 'layer' or an integer: got {groups!r}")
    else:
        check_count("groups", groups)


def _check_fold(fold: object, order: int) -> None:
    if isinstance(fold, str):
        _check_choice("fold", fold, _FOLDS)
        return
    if not isinstance(fold, tuple):
        raise TypeError(f"fold must be one of {_FOLDS} or a tuple of mode sizes: got {fold!r}")
    if len(fold) != order:
        raise ValueError(f"fold must have {order} modes, the order: got {tuple(fold)}")
    for mode, size in enumerate(fold):
        check_count(f"fold[{mode}]", size)


def _check_one_rank(name: str, rank: object) -> None:
    if isinstance(rank, str):
        _check_choice(name, rank, ("full",), "or an integer")
    else:
        check_count(name, rank)


def _split_ranks(rank: Rank, order: int, splits: int) -> tuple[Any, ...]:
    if not isinstance(rank, tuple):
        _check_one_rank("rank", rank)
        return (rank,) * splits
    # One split's modes, without the outer tuple; (r,) is that split's rank.
    bare = not any(isinstance(item, tuple) for item in rank)
    if splits == 1 and bare and (len(rank) != 1 or order == 1):
        rank = (rank,)
    if len(rank) != splits:
        raise ValueError(f"rank must have one entry for each of {splits} splits: got {rank}")
    for split, item in enumerate(rank):
        if not isinstance(item, tuple):
            _check_one_rank(f"rank[{split}]", item)
            continue
        if len(item) != order:
            raise ValueError(
                f"rank[{split}] must have one entry for each of {order} modes: got {item}"
            )
        for mode, value in enumerate(item):
            _check_one_rank(f"rank[{split}][{mode}]", value)
    return rank


def _check_map(fixed: object, ratio: object) -> None:
    if not isinstance(fixed, Map):
        raise TypeError(f"map must be a superlora.maps.Map: got {fixed!r}")
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1]: got {ratio!r}")
    if isinstance(fixed, Identity) and ratio != 1:
        raise ValueError(
            f"ratio must be 1 with map=Identity(), which has as many entries after as before: "
            f"got {ratio}"
        )


def _check_scale(spec: Spec) -> None:
    for name in ("alpha", "scale"):
        value = getattr(spec, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number: got {value!r}")
        if not abs(value) <= sys.float_info.max:
            raise ValueError(f"{name} must be finite: got {value}")
    if spec.alpha is None:
        return
    if spec.scale is not None:
        raise ValueError(f"alpha must not be given beside scale={spec.scale}: got {spec.alpha}")
    if len(_integers(spec.rank)) != 1:
        raise ValueError(f"alpha must come with one integer rank: got rank={spec.rank!r}")


def _integers(rank: object) -> set[int]:
    if isinstance(rank, tuple):
        return set().union(*map(_integers, rank))
    return {rank} if isinstance(rank, int) else set()
