"""Integer arithmetic of folds: how many entries become how many modes.

Nothing here touches an array. A *fold* of ``size`` entries is a tuple of mode
sizes whose product is at least ``size``; the tail beyond ``size`` is cropped
when the group is unfolded. Entries are never floored away.
"""

from __future__ import annotations

import bisect
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
    """Return the divisors of `size`, ascending."""
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
    """Factor `size` exactly into `order` modes of least sum."""
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
    """Return the least integer whose `degree`-th power is at least `size`."""
    most = 1 << ceil_divide(size.bit_length(), degree)
    return bisect.bisect_left(range(most), size, key=lambda root: root**degree)


def ceil_divide(size: int, by: int) -> int:
    """Return `size` divided by `by`, rounded up."""
    return -(-size // by)


@lru_cache(maxsize=4096)
def cover(size: int, order: int) -> Shape:
    """Choose `order` nearly equal modes whose product is at least `size`."""
    modes: list[int] = []
    rest = size
    for remaining in range(order, 0, -1):
        modes.append(integer_root(rest, remaining))
        rest = ceil_divide(rest, modes[-1])
    modes[0] = ceil_divide(size, math.prod(modes[1:]))
    return tuple(modes)


def split_modes(fold: Sequence[int], splits: int) -> tuple[Shape, ...]:
    """Factor every mode of a fold exactly over the splits of a Kronecker product."""
    per_mode = [balanced(mode, splits) for mode in fold]
    return tuple(tuple(sizes[k] for sizes in per_mode) for k in range(splits))


def bounded_splits(fold: Sequence[int], splits: int, bound: int | None) -> tuple[Shape, ...]:
    """Factor every mode of a fold over the splits, the first of bounded size."""
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
    """Fold `size` entries to square-like modes and split them for a Kronecker product."""
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
    """Fold `size` entries so that the last mode divides every input width."""
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
