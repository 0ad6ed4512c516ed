"""GLoRA's protocol on a task of VTAB-1K, with its authors' settings; this project ran none of it.

The folder has the task's images and the lists ``train800.txt``, ``val200.txt`` and ``test.txt``.
Here the model is the demo's ViT-S/14; the authors' is a ViT-B. They take a rate of 1e-4 for some
of the tasks.

Run: ``python benchmarks/glora_vtab.py FOLDER [--limit 300000]``.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import platformdirs

from superlora.demo.fetch import VIT, fetch
from superlora.demo.folders import read_folder
from superlora.demo.search import run
from superlora.demo.supernet import Settings
from superlora.demo.vit import load_onnx
from superlora.search import Evolution
from superlora.search.options import KINDS

AUTHORS = Settings(
    resolution=224,
    ranks=(8, 4),
    every_option=True,
    epochs=500,
    batch_size=64,
    rates=dict.fromkeys(KINDS, 5e-4),
    head_rate=5e-4,
    weight_decay=1e-4,
    trials=1000,
    evolution=Evolution(),
)


def main() -> None:
    """Train, search and test one task."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="the task's")
    parser.add_argument("--limit", type=int, help="most parameters")
    parser.add_argument("--output", type=Path, default=Path("benchmark-results/glora-vtab"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    cache = Path(os.environ.get("SUPERLORA_CACHE") or platformdirs.user_cache_path("superlora"))
    images = read_folder(options.folder, AUTHORS.resolution, options.seed)
    output = options.output / images.name
    base = load_onnx(fetch(VIT, cache))
    run(base, images, AUTHORS, output, limits=(options.limit,), seed=options.seed)


if __name__ == "__main__":
    main()
