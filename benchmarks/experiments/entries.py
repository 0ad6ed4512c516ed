"""Meaning representations with their texts, and the tokens of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Pair = tuple[list[int], list[int]]
"""Tokens of a meaning representation, and those of its text with the token of the end."""


@dataclass(frozen=True)
class Entry:
    """A meaning representation and the texts that say it."""

    meaning: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Parts:
    """What is trained on, what the rate is chosen on, and what is reported."""

    train: Sequence[Entry]
    validation: Sequence[Entry]
    test: Sequence[Entry]


def encoded(tokenizer: Any, entries: Sequence[Entry]) -> list[Pair]:
    """Return the tokens of each text, with those of the meaning representation it follows."""
    pairs = [(entry.meaning, text) for entry in entries for text in entry.texts]
    plain = {"add_special_tokens": False, "return_attention_mask": False}
    meanings = tokenizer([f"{meaning} ->" for meaning, _ in pairs], **plain)["input_ids"]
    texts = tokenizer([f" {text}" for _, text in pairs], **plain)["input_ids"]
    end = [tokenizer.eos_token_id]
    return [(meaning, text + end) for meaning, text in zip(meanings, texts, strict=True)]


def batched(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens (n, longest), and where they count at all and where as a text's."""
    longest = max(len(meaning) + len(text) for meaning, text in pairs)
    tokens = torch.zeros(len(pairs), longest, dtype=torch.long)
    used, wanted = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    for row, (meaning, text) in enumerate(pairs):
        length = len(meaning) + len(text)
        tokens[row, :length] = torch.tensor(meaning + text)
        used[row, :length] = 1
        wanted[row, len(meaning) : length] = True
    return tokens, used, wanted
