"""The scores of texts against values worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nltk")
pytest.importorskip("pycocoevalcap")
pytest.importorskip("sacrebleu")

from experiments.text_metrics import Synonyms, nist, scores, spoken

TREES, HEDGES = "A narrow way between trees", "a narrow way between hedges"


class NoSynonyms:
    """WordNet without a word."""

    def synsets(self, word: str) -> list[Any]:
        return []


def test_a_text_with_one_other_word() -> None:
    found = scores([TREES], [[HEDGES]], NoSynonyms())
    # 4 of 5 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 fours: their geometric mean.
    assert found["bleu"] == pytest.approx(100 * (1 / 5) ** (1 / 4))
    # Precision and recall 4/5; four words in one piece cost half of (1/4) ** 3.
    assert found["meteor"] == pytest.approx(100 * 0.8 * (1 - 0.5 / 64))
    assert found["rouge_l"] == pytest.approx(80)
    # Each word is one of the five of the one reference: log2(5); what follows a word is certain.
    assert found["nist"] == pytest.approx(4 / 5 * math.log2(5))
    assert found["cider"] == 0  # no word tells one text from the only other


def test_several_references() -> None:
    texts, references = ["a red car"], [["a red car", "a blue car"]]
    # Of six words two are "a" and "car"; after "a" both colours are equally frequent.
    assert nist(texts, references) == pytest.approx((2 * math.log2(3) + math.log2(6)) / 3 + 1 / 2)
    assert scores(texts, references)["rouge_l"] == 100
    # More references for one text than for another.
    assert scores(["a red car", "x"], [*references, ["x"]])["rouge_l"] == 100


def test_recall_counts_more_than_precision_in_rouge() -> None:
    # Precision 1, recall 2/3, beta 1.2.
    expected = (1 + 1.44) * (2 / 3) / (2 / 3 + 1.44)
    assert scores(["a car"], [["a red car"]])["rouge_l"] == pytest.approx(100 * expected)


def test_cider_of_texts_that_share_one_word_of_two() -> None:
    # All words have one weight: half of the angle's cosine in words, none in pairs, a quarter of
    # the orders; the other text shares nothing.
    found = scores(["red car", "big cat"], [["red truck"], ["small dog"]])
    assert found["cider"] == pytest.approx(10 * (1 / 2) / 4 / 2)
    same = ["one two three four", "five six seven eight"]
    assert scores(same, [[text] for text in same])["cider"] == pytest.approx(10)


def test_the_same_texts_have_the_best_scores_and_empty_ones_the_worst() -> None:
    best = scores([TREES], [[HEDGES, TREES]], NoSynonyms())
    assert (best["bleu"], best["rouge_l"]) == pytest.approx((100, 100))
    worst = scores([""], [[HEDGES]], NoSynonyms())
    assert set(worst.values()) == {0}
    assert nist(["way", ""], [["way"], ["road"]]) < nist(["way", "road"], [["way"], ["road"]])
    assert "meteor" not in scores([TREES], [[HEDGES]])


@pytest.mark.parametrize("references", [[], [["a"], ["b"]], [[]]])
def test_each_text_needs_references(references: list[list[str]]) -> None:
    with pytest.raises(ValueError, match=r"references must have one or more texts .* for 1 texts"):
        scores(["a"], references)


def test_words_are_without_case_and_punctuation() -> None:
    assert spoken("It's £20-25 (cheap), near The Eagle.") == [
        *("it", "'s", "£20-25", "cheap", "near", "the", "eagle")
    ]


def test_meteor_takes_synonyms_of_a_folder_of_wordnet(tmp_path: Path) -> None:
    for part in ("noun", "verb", "adj", "adv"):
        for kind in ("index", "data"):
            (tmp_path / f"{kind}.{part}").write_text("", "utf-8")
        (tmp_path / f"{part}.exc").write_text("", "utf-8")
    (tmp_path / "lexnames").write_text("00\tadj.all\t3\n01\tnoun.act\t1\n", "utf-8")
    (tmp_path / "data.noun").write_text("00000000 01 n 02 car 0 auto 0 000 | a vehicle  \n")
    (tmp_path / "index.noun").write_text(
        "auto n 1 0 1 0 00000000  \ncar n 1 0 1 0 00000000  \n", "utf-8"
    )
    own = Synonyms(tmp_path)
    try:
        found = scores(["a red auto"], [["a red car"]], own)
        assert found["meteor"] == pytest.approx(100 * (1 - 0.5 / 27))
    finally:
        for file in own._data_file_map.values():  # nltk leaves them open
            file.close()
