"""The matrix of methods and architectures: ``python -m tests.conformance`` prints it, and writes
``docs/conformance.md``. It needs transformers, diffusers, timm and torchvision, and half an hour.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import tempfile
from pathlib import Path

import torch

from tests.conformance import checks
from tests.conformance.models import MODELS, Entry

PAGE = Path(__file__).parent.parent.parent / "docs" / "conformance.md"
HEAD = """# Methods and architectures

`python -m tests.conformance` wrote this page, with {versions}.
Each model is built with random weights and a few narrow layers, and adapted by
`targets="all", tied="once"`: every weight but embeddings, heads and norms. For each method the
command checks that

- at the start the output is that of the frozen base, bit for bit, and every factor has a gradient;
- forward, formed and merged outputs are alike, also of a deep copy;
- `unmerge` and `detach` restore every bit, and a saved file gives a fresh model the same output;
- both kinds of checkpoints give the same gradients;
- `generate` gives the same tokens with a cache, without, and merged;
- bfloat16 and float16 work, and, for LoRA, a compiled block.

A cell is the share of the entries of the model's weights, embeddings and heads included, that the
method reaches. GLoRA has operations that some weights cannot have, such as convolutions, stacks of
experts and weights that a module reads without the bias: it leaves them out, and is refused where
nothing else is left.

"""


def cell(entry: Entry, preset: str) -> str:
    """Check a method on an architecture, and return what the table says of it."""
    with checks.quietly(), tempfile.TemporaryDirectory() as folder:
        tried = checks.attach(entry, preset)
        if isinstance(tried, str):
            return "refused"
        checks.every(entry, preset, Path(folder))
        return f"{tried.adapter.summary()['share']:.0%}"


def main() -> None:
    """Print the matrix as it grows, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [f"| model | {' | '.join(checks.PRESETS)} |", "|---|" + "--:|" * len(checks.PRESETS)]
    print("\n".join(lines))
    failed: list[str] = []
    for name in options.models:
        cells = []
        for preset in checks.PRESETS:
            try:
                cells.append(cell(MODELS[name], preset))
            except Exception as error:
                failed.append(f"{name}, {preset}: {type(error).__name__}: {error}")
                cells.append("FAILED")
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if failed:
        raise SystemExit("\n".join(failed))
    if options.models == list(MODELS):
        libraries = dict.fromkeys(entry.library for entry in MODELS.values())
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries)
        PAGE.write_text(HEAD.format(versions=versions) + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
