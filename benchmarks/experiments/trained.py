"""Networks that are trained here, once: their weights are kept in the cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from smollm import cache_folder
from torch import Tensor, nn

import superlora
from experiments.digest import code_digest, content_digest

Module = TypeVar("Module", bound=nn.Module)
PACKAGE = Path(superlora.__file__).parent


def trained(
    name: str,
    make: Callable[[], Module],
    fit: Callable[[Module], object],
    *,
    code: Sequence[str],
    settings: Any,
    tensors: Sequence[Tensor],
) -> Module:
    """Return a frozen network, which is trained where the cache lacks its weights.

    They are found by a digest of the code, of the settings and of the tensors that it learns from.
    Code is files of this folder, or of superlora. Another process that needs them waits.
    """
    here = Path(__file__).parent
    files = [here / own if (here / own).exists() else PACKAGE / own for own in code]
    key = f"{code_digest(files)[:8]}{content_digest(settings, *tensors)[:8]}"
    kept = cache_folder() / "trained" / f"{name}-{key}.safetensors"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = make()
    with FileLock(kept.with_suffix(".lock")):
        if not kept.exists():
            print(f"{name} is trained, which is kept in {kept}", flush=True)
            fit(network)
            partial = kept.with_suffix(".partial")
            save_file(network.state_dict(), partial)
            os.replace(partial, kept)
    network.load_state_dict(load_file(kept))
    return network.requires_grad_(False).eval()
