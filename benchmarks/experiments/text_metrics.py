"""BLEU, NIST, METEOR, ROUGE-L and CIDEr of generated texts, by public packages.

They are those of the E2E NLG challenge, but for METEOR, which is nltk's with WordNet's synonyms
instead of the Java program's with its paraphrases, and for the words of METEOR, ROUGE-L and CIDEr,
which are split by nltk instead of Stanford's program in Java.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nltk
from nltk.corpus.reader import WordNetCorpusReader
from nltk.tokenize import NLTKWordTokenizer
from nltk.translate.meteor_score import meteor_score
from nltk.translate.nist_score import corpus_nist
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from sacrebleu import corpus_bleu
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

LONGEST = 5  # words of NIST's n-grams


def scores(
    generated: Sequence[str], references: Sequence[Sequence[str]], synonyms: Any = None
) -> dict[str, float]:
    """Return the scores of texts, of any number of references each; of all, more is better.

    BLEU, METEOR and ROUGE-L are out of 100, CIDEr out of 10. No score depends on upper case.
    METEOR needs `synonyms`, a reader of WordNet, and is left out without.
    """
    if len(generated) != len(references) or not generated or not all(references):
        raise ValueError(
            "references must have one or more texts for each of the generated ones, and there must "
            f"be one: got {[len(own) for own in references]} for {len(generated)} texts"
        )
    words = [spoken(text) for text in generated]
    right = [[spoken(text) for text in own] for own in references]
    most = max(len(own) for own in references)
    streams = [[own[i] if i < len(own) else None for own in references] for i in range(most)]
    found = {
        "bleu": corpus_bleu(list(generated), streams, lowercase=True).score,
        "nist": nist(generated, references),
    }
    if synonyms is not None:
        values = [
            meteor_score(own, text, wordnet=synonyms)
            for own, text in zip(right, words, strict=True)
        ]
        found["meteor"] = 100 * sum(values) / len(values)
    results = {place: [" ".join(text)] for place, text in enumerate(words)}
    truths = {place: [" ".join(text) for text in own] for place, own in enumerate(right)}
    found["rouge_l"] = 100 * float(Rouge().compute_score(truths, results)[0])
    found["cider"] = float(Cider().compute_score(truths, results)[0])
    return found


def nist(generated: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return NIST over the words of mteval-v13a; n-grams longer than all texts add nothing."""
    split = Tokenizer13a()
    texts = [split(text.lower()).split() for text in generated]
    right = [[split(text.lower()).split() for text in own] for own in references]
    longest = min(LONGEST, max(len(text) for text in texts))
    return float(corpus_nist(right, texts, n=longest)) if longest else 0.0


def spoken(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    words = NLTKWordTokenizer().tokenize(text.lower())
    return [word for word in words if any(letter.isalnum() for letter in word)]


class Synonyms(WordNetCorpusReader):
    """nltk's reader of WordNet from a folder of one's own, in English alone."""

    def __init__(self, folder: Path) -> None:
        if str(folder) not in nltk.data.path:
            nltk.data.path.append(str(folder))  # nltk reads from no other folders
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The multilingual functions")
            super().__init__(str(folder), None)

    def map_wn(self, version: str = "wordnet") -> None:
        """Map nothing: the map to other releases serves the other languages."""
