"""A folder of an adapter to keep or to share: its file, its design as JSON, and a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from superlora.plan import Plan
from superlora.torch.files import strict_json
from superlora.torch.files.safetensors_file import read_metadata, write_text
from superlora.torch.files.state import KEY

TENSORS, DESIGN, CARD = "adapter.safetensors", "adapter.json", "README.md"
# In a card that may be written again.
_MARK = "<!-- Written by superlora; without this line it is kept as it is. -->"


def file_of(path: Path) -> Path:
    """Return the file of an adapter, of its folder too, whose design in words must agree."""
    if not path.is_dir() or not (path / TENSORS).is_file():
        return path
    design = path / DESIGN
    if design.is_file():
        try:
            said = strict_json.parse(design.read_text(encoding="utf-8"))
            held = json.loads(read_metadata(path / TENSORS).get(KEY, ""))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{design} must be JSON: {error}") from None
        if said != held:
            raise ValueError(
                f"{design} must say what the header of {TENSORS} says, which it is a copy of: it "
                "was edited, or is another adapter's; delete it, or save the adapter again"
            )
    return path / TENSORS


def write_beside(folder: Path, card: str) -> None:
    """Write the design and the card of a folder whose tensors were written."""
    header = json.loads(read_metadata(folder / TENSORS)[KEY])
    write_text(folder / DESIGN, json.dumps(header, indent=2) + "\n")
    known = folder / CARD
    if not known.is_file() or _MARK in known.read_text(encoding="utf-8", errors="replace"):
        write_text(known, card)


def card_of(
    plan: Plan,
    model: nn.Module | None,
    also: Mapping[str, int],
    base: str | None,
    scores: Mapping[str, float] | None,
    licence: str | None,
) -> str:
    """Return a model card: what was adapted, how, and how to load it."""
    base = base or _name_of(model)
    head: dict[str, Any] = {"library_name": "superlora", "tags": ["superlora", "adapter"]}
    if base:
        head |= {"base_model": base, "base_model_relation": "adapter"}
    if licence:
        head["license"] = licence
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", _MARK]
    lines += ["", f"# Adapter of {base}" if base else "# Adapter", ""]
    lines += [
        f"{plan.num_parameters:,} parameters in place of {plan.num_dense:,}, in "
        f"{len(plan.layout.supports):,} weights."
    ]
    if also:
        lines += ["", "Parameters of the model that were trained with it:", ""]
        lines += [f"- `{name}`, {size:,} entries" for name, size in also.items()]
    if scores:
        lines += ["", "| score | value |", "|---|--:|"]
        lines += [f"| {name} | {value:.6g} |" for name, value in scores.items()]
    lines += ["", "## The equation's numbers", "", "```text", plan.describe(), "```"]
    lines += [
        *("", "## Load", "", "```python", "import superlora.torch as slt", ""),
        f"model = ...  # {base or 'the base model'}",
        'adapter = slt.load(model, "this folder")',
        "adapter.merge()  # if it is only used",
        "```",
    ]
    return "\n".join(lines) + "\n"


def _name_of(model: nn.Module | None) -> str | None:
    """Return what a model says it was loaded from, of a path on a disk its last part."""
    name = getattr(model, "name_or_path", None)
    if not isinstance(name, str) or not name:
        return None
    return Path(name).name if Path(name).exists() else name
