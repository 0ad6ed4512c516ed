"""The E2E NLG dataset with any causal language model of transformers: for a machine with a GPU.

The data are the dataset's own CSV files in a folder, the model a folder as transformers writes it,
such as GPT-2 medium with its tokenizer. Nothing of them is downloaded: `SUPERLORA_E2E` and
`SUPERLORA_LM` name the two folders.
"""

from __future__ import annotations

import csv
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.entries import Entry, Parts, encoded
from experiments.generation import PACKAGES, SOURCES, Generation, scorer

__all__ = ["PACKAGES", "SOURCES", "load"]

FILES = ("trainset.csv", "devset.csv", "testset_w_refs.csv")
COLUMNS = ("mr", "ref")


def read(path: Path) -> list[Entry]:
    """Return a file's meaning representations in order, each once with all its references."""
    texts: dict[str, list[str]] = {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        names = [name.strip().lower() for name in rows.fieldnames or ()]
        rows.fieldnames = names
        for column in COLUMNS:
            if column not in names:
                raise ValueError(
                    f"{path.name} must have the columns {list(COLUMNS)}: got {names}, "
                    f"without {column!r}"
                )
        for row in rows:
            meaning, text = ((row[column] or "").strip() for column in COLUMNS)
            if not meaning or not text:
                raise ValueError(
                    f"{path.name}, line {rows.line_num}, must have a text for mr and for ref: "
                    f"got {meaning!r} and {text!r}"
                )
            texts.setdefault(meaning, []).append(text)
    if not texts:
        raise ValueError(f"{path.name} must have one row or more: got none")
    return [Entry(meaning, tuple(own)) for meaning, own in texts.items()]


def folder_of(variable: str, files: Sequence[str], what: str) -> Path:
    """Return the folder that a variable of the environment names, which must hold some files."""
    if not os.environ.get(variable):
        raise ValueError(f"{variable} must name a folder of {what}: got none")
    folder = Path(os.environ[variable])
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise ValueError(
            f"{variable} must name a folder of {what}: expected {', '.join(files)}, "
            f"got no {', '.join(missing)} in {folder}"
        )
    return folder


def some(entries: Sequence[Entry], count: int | None, argument: str, seed: int) -> list[Entry]:
    """Return so many entries that a seed draws, or all for None."""
    if count is None:
        return list(entries)
    if not 0 < count <= len(entries):
        raise ValueError(f"{argument} must be in [1, {len(entries)}], or None: got {count}")
    order = torch.randperm(len(entries), generator=torch.Generator().manual_seed(seed))
    return [entries[i] for i in order[:count].tolist()]


def query_and_value(model: Any) -> Any:
    """Return the layers to adapt: of GPT-2's joint projection, the rows of each by themselves."""
    if any(name.endswith("attn.c_attn") for name, _ in model.named_modules()):
        width = model.config.hidden_size
        return {"c_attn": {"q": (0, width), "v": (2 * width, 3 * width)}}
    return ["q_proj", "v_proj"]


def load(
    *,
    tokens: int,
    train: int | None = None,
    validation: int | None = None,
    test: int | None = None,
    targets: Sequence[str] | None = None,
    generate: int = 0,
    meteor: bool = True,
    **training: Any,
) -> Generation:
    """Return the task, on a GPU where there is one.

    The counts are of meaning representations, each with all its references; None is all. `tokens`
    bounds the length of a meaning representation with a text; all must fit.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = folder_of("SUPERLORA_E2E", FILES, "the E2E NLG dataset")
    base = folder_of("SUPERLORA_LM", ["config.json"], "a causal language model")
    scores = scorer(generate, meteor)
    tokenizer = AutoTokenizer.from_pretrained(base)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(device)
    files = [read(place / name) for name in FILES]
    for name, entries in zip(FILES, files, strict=True):
        longest = max(len(first) + len(text) for first, text in encoded(tokenizer, entries))
        if longest > tokens:
            raise ValueError(f"tokens must be at least {longest} for {name}: got {tokens}")

    @functools.cache
    def parts(seed: int) -> Parts:
        counts = {"train": train, "validation": validation, "test": test}
        return Parts(
            *(
                some(entries, count, argument, seed)
                for entries, (argument, count) in zip(files, counts.items(), strict=True)
            )
        )

    return Generation(
        *(model, tokenizer, parts, query_and_value(model) if targets is None else list(targets)),
        **{"generate": generate, "scores": scores},
        **training,
    )
