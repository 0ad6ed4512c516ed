"""Regular expressions matched in a bounded number of steps, since files hold some.

Python's own engine goes back and tries again, which may take a time exponential in a name's length.
Whether a name matches needs no such search: the set of places that were reached is one integer,
a bit a place, and every part of an expression takes it to another.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

# Of one expression and a name. It takes nested repetitions to come near.
MOST_STEPS = 200_000
# Of all expressions of a file, for each name; some milliseconds.
STEPS_A_NAME = 500
_KINDS: dict[Any, Callable[[str], bool]] = {
    op.CATEGORY_DIGIT: str.isdecimal,
    op.CATEGORY_SPACE: str.isspace,
    op.CATEGORY_WORD: lambda char: char.isalnum() or char == "_",
}
_OPPOSITES = {
    op.CATEGORY_NOT_DIGIT: op.CATEGORY_DIGIT,
    op.CATEGORY_NOT_SPACE: op.CATEGORY_SPACE,
    op.CATEGORY_NOT_WORD: op.CATEGORY_WORD,
}
_STARTS = (op.AT_BEGINNING, op.AT_BEGINNING_STRING)
_ONE_CHARACTER = (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN)
_OTHERS = (op.AT, op.BRANCH, op.SUBPATTERN, op.ASSERT, op.ASSERT_NOT)
_REPEATS = (op.MAX_REPEAT, op.MIN_REPEAT)
_CHOICES = (*_REPEATS, op.BRANCH)


@functools.lru_cache(maxsize=4096)
def check_pattern(pattern: str) -> None:
    """Refuse an expression of a file that cannot be matched in a bounded number of steps."""
    if not _walkable(_tree(pattern)):
        raise ValueError(
            "patterns of a file must have no references to groups, conditions, possessive or "
            f"atomic parts and no flags: got {pattern[:200]!r}"
        )


def check_cost(patterns: Iterable[str], names: Iterable[str]) -> None:
    """Refuse expressions of a file that take too many steps to match with all names."""
    every = list(names)
    walk = _Walk(MOST_STEPS + STEPS_A_NAME * len(every))
    for pattern in patterns:
        check_pattern(pattern)
        for name in () if _is_plain(pattern) else every:
            walk.ends(_tree(pattern), name, starts_of(name), pattern)


def starts_of(name: str) -> list[int]:
    """Return the places where a dotted name and its ends after a dot begin."""
    return [0, *[place for place, before in enumerate(name, 1) if before == "."]]


def ends_of(pattern: str, name: str, starts: Sequence[int] = (0,)) -> int:
    """Return the places where matches end that begin at one of some places, each a bit."""
    return _Walk(MOST_STEPS).ends(_tree(pattern), name, starts, pattern)


def matches(pattern: str, name: str, starts: Sequence[int] = (0,)) -> bool:
    """Return whether an expression matches a name to its end, from one of some places on."""
    if _is_plain(pattern):
        fullmatch = _compile(pattern).fullmatch
        for start in starts:  # noqa: SIM110 - a generator would cost a call for each
            if fullmatch(name, start):
                return True
        return False
    return bool(ends_of(pattern, name, starts) >> len(name) & 1)


_compile = functools.lru_cache(maxsize=4096)(re.compile)


@functools.lru_cache(maxsize=4096)
def _tree(pattern: str) -> Any:
    return _parser.parse(pattern)


@functools.lru_cache(maxsize=4096)
def _is_plain(pattern: str) -> bool:
    """Return whether Python's engine has few choices, or is the only one that can."""
    # Of n letters, three choices one after the other take at most n³ / 6 steps; nested, 2ⁿ.
    tree = _tree(pattern)
    choices = [(kind, own) for kind, own in _parts(tree) if kind in _CHOICES]
    repeated = [own[2] for kind, own in choices if kind in _REPEATS]
    nested = any(kind in _CHOICES for own in repeated for kind, _ in _parts(own))
    return (len(choices) <= 3 and not nested) or not _walkable(tree)


def _walkable(tree: Any) -> bool:
    """Return whether the walk below knows all parts of an expression."""
    known = {*_ONE_CHARACTER, *_OTHERS, *_REPEATS}
    flags = any(kind is op.SUBPATTERN and (own[1] or own[2]) for kind, own in _parts(tree))
    if tree.state.flags & ~re.UNICODE or flags:
        return False
    return all(kind in known for kind, _ in _parts(tree))


def _parts(tree: Any) -> Iterable[tuple[Any, Any]]:
    for kind, own in tree:
        yield kind, own
        for inner in _inner(kind, own):
            yield from _parts(inner)


def _inner(kind: Any, own: Any) -> list[Any]:
    if kind is op.BRANCH:
        return list(own[1])
    if kind in (*_REPEATS, op.POSSESSIVE_REPEAT, op.SUBPATTERN, op.ASSERT, op.ASSERT_NOT):
        return [own[-1]]
    return [own] if kind is op.ATOMIC_GROUP else []


class _Walk:
    """Steps through expressions, no more than so many in all."""

    def __init__(self, most: int) -> None:
        self.left = most

    def ends(self, tree: Any, name: str, starts: Sequence[int], pattern: str) -> int:
        """Return where matches end that begin at one of some places."""
        self.name, self.pattern = name, pattern
        self.whole = (2 << len(name)) - 1
        self.fitting: dict[Any, int] = {}
        return self._sequence(tree, sum(1 << start for start in starts))

    def _sequence(self, tree: Any, places: int) -> int:
        for kind, own in tree:
            if not places:
                break
            self.left -= 1
            if self.left < 0:
                raise ValueError(f"patterns must take fewer steps to match: {self.pattern[:200]!r}")
            places = self._part(kind, own, places)
        return places

    def _part(self, kind: Any, own: Any, places: int) -> int:
        if kind in _ONE_CHARACTER:
            return (places & self._fitting(kind, own)) << 1
        if kind in _REPEATS:
            return self._repeated(own[0], own[1], own[2], places)
        if kind is op.SUBPATTERN:
            return self._sequence(own[-1], places)
        if kind is op.BRANCH:
            found = 0
            for tree in own[1]:
                found |= self._sequence(tree, places)
            return found
        if kind is op.AT:
            return places & self._at(own)
        direction, tree = own
        if direction < 0:  # what was matched ends here
            there = self._sequence(tree, self.whole)
        else:
            each = [1 << n for n in range(places.bit_length()) if places >> n & 1]
            there = sum(place for place in each if self._sequence(tree, place))
        return places & (there if kind is op.ASSERT else ~there)

    def _repeated(self, least: int, most: int, tree: Any, places: int) -> int:
        # More often than the name has places, it would have gone round empty.
        for _ in range(min(least, len(self.name) + 1)):
            places = self._sequence(tree, places)
        found, new = places, places
        for _ in range(min(most - least, len(self.name) + 1)):
            new = self._sequence(tree, new) & ~found
            if not new:
                break
            found |= new
        return found

    def _fitting(self, kind: Any, own: Any) -> int:
        """Return the places whose character fits."""
        key = (kind, id(own) if isinstance(own, list) else own)
        if key not in self.fitting:
            fits = (1 << n for n, char in enumerate(self.name) if _fits(kind, own, char))
            self.fitting[key] = sum(fits)
        return self.fitting[key]

    def _at(self, own: Any) -> int:
        """Return the places that an anchor allows."""
        if own in _STARTS:
            return 1
        end = 1 << len(self.name)
        if own is op.AT_END_STRING:
            return end
        if own is op.AT_END:
            return end | (end >> 1 if self.name.endswith("\n") else 0)
        word = self._fitting(op.CATEGORY, op.CATEGORY_WORD)
        edges = word ^ (word << 1)
        return edges if own is op.AT_BOUNDARY else self.whole & ~edges


def _fits(kind: Any, own: Any, char: str) -> bool:
    if kind is op.ANY:
        return char != "\n"
    if kind is op.IN:
        negated = bool(own) and own[0][0] is op.NEGATE
        return negated != any(_fits(item[0], item[1], char) for item in own[negated:])
    if kind is op.RANGE:
        return bool(own[0] <= ord(char) <= own[1])
    if kind is op.CATEGORY:
        known = _KINDS.get(own)
        return known(char) if known else not _KINDS[_OPPOSITES[own]](char)
    return bool(ord(char) == own) == (kind is op.LITERAL)
