"""SmolLM2-135M on WordNet's nouns: `name[lane], type[road] -> a narrow way or road`.

The E2E NLG challenge in small, on data that a package has. The type is a noun's hypernym.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from smollm import smollm, smollm_tokenizer
from wordnet import wordnet_folder

from experiments.entries import Entry, Parts, encoded
from experiments.generation import PACKAGES, SOURCES, Generation, scorer

__all__ = ["PACKAGES", "SOURCES", "load"]


@dataclass(frozen=True)
class Noun:
    """A synset: its names, the first name of its hypernym, and its gloss without the examples."""

    names: tuple[str, ...]
    kind: str
    gloss: str

    @property
    def entry(self) -> Entry:
        return Entry(f"name[{self.names[0]}], type[{self.kind}]", (self.gloss,))

    @property
    def keys(self) -> set[str]:
        """What no other part may have."""
        return {f"name {name.lower()}" for name in self.names} | {f"gloss {self.gloss.lower()}"}


def nouns(text: str) -> list[Noun]:
    """Return the synsets of `data.noun` that have a hypernym; instances, such as people, have none.

    Raises
    ------
    ValueError
        If a line is not of that format, as wndb(5WN) states it.
    """
    found: list[tuple[tuple[str, ...], str, str]] = []
    first: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line or line.startswith(" "):  # the licence
            continue
        head, bar, gloss = line.partition(" | ")
        fields = head.split()
        try:
            count = int(fields[3], 16)
            names = tuple(name.replace("_", " ") for name in fields[4 : 4 + 2 * count : 2])
            pointers = int(fields[4 + 2 * count])
        except (IndexError, ValueError):
            names, pointers = (), -1
        rest = fields[5 + 2 * len(names) :]
        if not bar or len(rest) != 4 * pointers or not names:
            raise ValueError(
                f"data.noun, line {number}, must have an offset, names, pointers and a gloss: "
                f"got {line[:60]!r}"
            )
        first[fields[0]] = names[0]
        above = [rest[i + 1] for i in range(0, len(rest), 4) if rest[i] == "@"]
        if above:
            found.append((names, above[0], gloss.partition('; "')[0].strip()))
    return [Noun(names, first[kind], gloss) for names, kind, gloss in found if gloss]


def drawn(
    found: Sequence[Noun], sizes: tuple[int, int, int], fits: Callable[[Entry], bool], seed: int
) -> Parts:
    """Draw the parts of a seed among the entries that fit; none has another's name or gloss."""
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    seen: set[str] = set()
    entries: list[Entry] = []
    for place in order:
        if len(entries) == sum(sizes):
            break
        noun = found[place]
        if seen.isdisjoint(noun.keys) and fits(noun.entry):
            seen |= noun.keys
            entries.append(noun.entry)
    if len(entries) < sum(sizes):
        raise ValueError(
            "train, validation, test must be no more than the entries of different names and "
            f"glosses that fit: expected at most {len(entries)} in all, got {sizes}"
        )
    train, validation, _ = sizes
    first, second = train, train + validation
    return Parts(entries[:first], entries[first:second], entries[second:])


def load(
    *,
    train: int,
    validation: int,
    test: int,
    tokens: int,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    generate: int = 0,
    meteor: bool = True,
    **training: Any,
) -> Generation:
    """Return the task; the model and WordNet are fetched once.

    `tokens` bounds an entry's length, all of it; entries that are longer are not drawn.
    """
    scores = scorer(generate, meteor)
    tokenizer = smollm_tokenizer()
    found = nouns((wordnet_folder() / "data.noun").read_text("utf-8"))

    def fits(entry: Entry) -> bool:
        return all(len(own) + len(text) <= tokens for own, text in encoded(tokenizer, [entry]))

    @functools.cache
    def parts(seed: int) -> Parts:
        return drawn(found, (train, validation, test), fits, seed)

    return Generation(
        *(smollm(), tokenizer, parts, list(targets)),
        **{"generate": generate, "scores": scores},
        **training,
    )
