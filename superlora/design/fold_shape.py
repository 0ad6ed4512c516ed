"""Integer arithmetic of folds: how many entries become how many modes.

Nothing here touches an array. A *fold* of ``size`` entries is a tuple of mode
sizes whose product is at least ``size``; the tail beyond ``size`` is cropped
when the group is unfolded. Entries are never floored away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

Shape = tuple[int, ...]

# A cofactor left after this bound counts as one prime: two primes above it can
# only make a lopsided fold, and then a cover is used instead.
_LARGEST_TRIAL_DIVISOR = 1 << 20
# An exact fold may cost this many times the parameters of the best cover.
_LOPSIDED = 1.25


@lru_cache(maxsize=4096)
def divisors(size: int) -> Shape:
    """Return the divisors of `size`, ascending.

    Parameters
    ----------
    size : int
        At least 1. A cofactor whose prime factors all exceed 2**20 is kept in
        one piece, so that the cost stays bounded for any size.

    Returns
    -------
    tuple of int
        Every divisor that the bound above lets us find.

    Examples
    --------
    >>> divisors(12)
    (1, 2, 3, 4, 6, 12)
    """
    found = [1]
    rest, prime = size, 2
    while prime * prime <= rest and prime <= _LARGEST_TRIAL_DIVISOR:
        power, start = 1, list(found)
        while rest % prime == 0:
            rest //= prime
            power *= prime
            found += [divisor * power for divisor in start]
        prime += 1 if prime == 2 else 2
    if rest > 1:
        found += [divisor * rest for divisor in found]
    return tuple(sorted(found))


@lru_cache(maxsize=4096)
def balanced(size: int, order: int) -> Shape:
    """Factor `size` exactly into `order` modes of least sum.

    Parameters
    ----------
    size : int
        Number of entries, at least 1.
    order : int
        Number of modes M, at least 1.

    Returns
    -------
    tuple of int
        Ascending mode sizes whose product is `size`. Among all such tuples the
        sum is the least, so that a rank-r CP or LoRA of it has the fewest
        parameters, r times that sum.

    Notes
    -----
    The greedy choice is not optimal for three modes or more; this is a search
    over the divisors, bounded by the sum that equal modes would reach.

    Examples
    --------
    >>> balanced(24 * 768 * 768, 3)
    (216, 256, 256)
    >>> balanced(97, 2)
    (1, 97)
    """
    best: list[Shape] = []

    def search(rest: int, modes: int, least: int, chosen: Shape, total: int) -> None:
        if modes == 1:
            if not best or total + rest < sum(best[0]):
                best[:] = [(*chosen, rest)]
            return
        candidates = divisors(rest)
        for mode in reversed(candidates):
            if mode < least:
                break
            if mode**modes > rest:
                continue
            # What equal modes would cost from here on is a lower bound, and it
            # only grows as this mode shrinks.
            bound = total + mode + (modes - 1) * (rest / mode) ** (1 / (modes - 1))
            if best and bound >= sum(best[0]) - 1e-6:
                break
            search(rest // mode, modes - 1, mode, (*chosen, mode), total + mode)

    search(size, order, 1, (), 0)
    return best[0]


def integer_root(size: int, degree: int) -> int:
    """Return the least integer whose `degree`-th power is at least `size`.

    Parameters
    ----------
    size, degree : int
        At least 1 each. Exact for any size: no floating-point root is trusted.

    Returns
    -------
    int
        ``ceil(size ** (1 / degree))``, computed exactly.

    Examples
    --------
    >>> integer_root(64, 3), integer_root(65, 3)
    (4, 5)
    """
    low, high = 1, 1 << ceil_divide(size.bit_length(), degree)
    while low < high:
        middle = (low + high) // 2
        if middle**degree < size:
            low = middle + 1
        else:
            high = middle
    return low


def ceil_divide(size: int, by: int) -> int:
    """Return `size` divided by `by`, rounded up."""
    return -(-size // by)


@lru_cache(maxsize=4096)
def cover(size: int, order: int) -> Shape:
    """Choose `order` nearly equal modes whose product is at least `size`.

    Parameters
    ----------
    size : int
        Number of entries to cover, at least 1.
    order : int
        Number of modes M, at least 1.

    Returns
    -------
    tuple of int
        Mode sizes. The first is no larger than needed: without its last slice
        the fold would not cover `size`, so no slice of mode 0 lies wholly in
        the cropped tail.

    Examples
    --------
    >>> cover(1415578, 2)
    (1190, 1190)
    """
    modes: list[int] = []
    rest = size
    for remaining in range(order, 0, -1):
        modes.append(integer_root(rest, remaining))
        rest = ceil_divide(rest, modes[-1])
    modes[0] = ceil_divide(size, math.prod(modes[1:]))
    return tuple(modes)


def split_modes(fold: Sequence[int], splits: int) -> tuple[Shape, ...]:
    """Factor every mode of a fold exactly over the splits of a Kronecker product.

    Parameters
    ----------
    fold : sequence of int, M modes
        The mode sizes ``D_m``.
    splits : int
        Number of splits K.

    Returns
    -------
    tuple of K tuples of int
        ``sizes[k][m]`` with ``prod_k sizes[k][m] == fold[m]``, ascending over k.
        For two splits and one mode this is LyCORIS' factorisation.

    Examples
    --------
    >>> split_modes((768, 2304), 2)
    ((24, 48), (32, 48))
    """
    per_mode = [balanced(mode, splits) for mode in fold]
    return tuple(tuple(sizes[k] for sizes in per_mode) for k in range(splits))


def bounded_splits(fold: Sequence[int], splits: int, bound: int | None) -> tuple[Shape, ...]:
    """Factor every mode of a fold over the splits, the first of bounded size.

    Parameters
    ----------
    fold : sequence of int, M modes
        The mode sizes ``D_m``.
    splits : int
        Number of splits K.
    bound : int or None
        The first split takes `bound` where that divides a mode, else the largest divisor
        below it; of two splits the smaller part, as LyCORIS does. None is `split_modes`.

    Returns
    -------
    tuple of K tuples of int
        ``sizes[k][m]`` with ``prod_k sizes[k][m] == fold[m]``.

    Examples
    --------
    >>> bounded_splits((128, 250), 2, 16)
    ((8, 10), (16, 25))
    """
    if bound is None:
        return split_modes(fold, splits)
    first = []
    for mode in fold:
        divisor = max(d for d in divisors(mode) if d <= bound)
        if splits == 2:
            if mode % bound:
                divisor = max(d for d in divisors(mode) if d <= bound and d * d <= mode)
            divisor = min(divisor, mode // divisor)
        first.append(divisor)
    rest = [mode // divisor for mode, divisor in zip(fold, first, strict=True)]
    return (tuple(first), *split_modes(rest, splits - 1))


def _is_degenerate(sizes: Sequence[Shape]) -> bool:
    return len(sizes) > 1 and any(math.prod(split) == 1 for split in sizes)


def _total(sizes: Sequence[Shape]) -> int:
    return sum(map(sum, sizes))


def balanced_splits(size: int, order: int, splits: int) -> tuple[Shape, ...]:
    """Fold `size` entries to square-like modes and split them for a Kronecker product.

    Parameters
    ----------
    size, order, splits : int
        Entries, modes M and splits K, at least 1 each.

    Returns
    -------
    tuple of K tuples of M int
        ``sizes[k][m]``; mode m of the fold is ``prod_k sizes[k][m]``. Exact where
        that is nearly square, else the ``K * M``-way cover: a prime number of
        entries must not become ``1 x p``.

    Examples
    --------
    >>> balanced_splits(24 * 768 * 768, 2, 1)
    ((3456, 4096),)
    >>> balanced_splits(10007, 2, 1)
    ((101, 100),)
    """
    exact = split_modes(balanced(size, order), splits)
    # Ascending over the splits in each mode, then trim the most significant
    # digit so that no slice lies wholly beyond the end.
    covering = cover(size, order * splits)
    digits = [sorted(covering[mode * splits : (mode + 1) * splits]) for mode in range(order)]
    digits[0][0] = 1
    digits[0][0] = ceil_divide(size, math.prod(map(math.prod, digits)))
    candidate = tuple(tuple(mode[k] for mode in digits) for k in range(splits))
    if _is_degenerate(candidate):
        return exact
    dear = _is_degenerate(exact) or _total(exact) > _LOPSIDED * _total(candidate)
    return candidate if dear else exact


def aligned_splits(size: int, order: int, splits: int, divisor: int) -> tuple[Shape, ...]:
    """Fold `size` entries so that the last mode divides every input width.

    Parameters
    ----------
    size : int
        Entries of the group; a multiple of `divisor`.
    order, splits : int
        Modes M (at least 2) and splits K.
    divisor : int
        The greatest common divisor of all input widths and cut positions.

    Returns
    -------
    tuple of K tuples of M int
        Of all folds whose last mode divides `divisor` the one of least sum. A
        cover's overshoot lies in the leading modes, so that it stays at the end.

    Raises
    ------
    ValueError
        If `order` is below 2 or `divisor` is 1: then no such fold exists.

    Examples
    --------
    >>> aligned_splits(24 * 768 * 768, 2, 1, 768)
    ((18432, 768),)
    """
    if order < 2:
        raise ValueError(f"fold='aligned' must have order 2 or more: got order {order}")
    if divisor < 2:
        raise ValueError(
            "fold='aligned' must find a divisor above 1 common to all input widths and group "
            "boundaries: got 1; use fold='balanced', or groups=1 or 'layer'"
        )
    found = []
    for last in divisors(divisor)[1:]:
        leading = balanced_splits(size // last, order - 1, splits)
        lasts = balanced(last, splits)
        found.append(tuple((*leading[k], lasts[k]) for k in range(splits)))
    best = min(found, key=lambda sizes: (_is_degenerate(sizes), _total(sizes)))
    if _is_degenerate(best):
        raise ValueError(f"splits must leave every split more than one entry: got sizes {best}")
    return best
