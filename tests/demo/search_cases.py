"""A tiny transformer and made-up digits, for tests of training and searching."""

from __future__ import annotations

from pathlib import Path

import torch

from superlora.demo.data import Images, Splits, split
from superlora.demo.supernet import Settings
from superlora.demo.vit import VisionTransformer
from superlora.search import Evolution
from superlora.search.options import KINDS

SETTINGS = Settings(
    digits=(60, 20, 40),
    resolution=28,
    ranks=(4, 2),
    every_option=True,
    epochs=3,
    batch_size=20,
    rates=dict.fromkeys(KINDS, 1e-2),
    trials=8,
    evolution=Evolution(population=4, parents=2, mutations=2, crossovers=2),
)


def make_base() -> VisionTransformer:
    """Return a transformer with random weights, all of them other than the defaults."""
    torch.manual_seed(1)
    model = VisionTransformer(width=16, depth=2, heads=2, hidden=24, patch=14, grid=2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False).eval()


def make_bars() -> Images:
    """Return a bright bar a class, in noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 10
    pixels = torch.randint(0, 60, (120, 28, 28), generator=generator)
    for image, label in zip(pixels, labels.tolist(), strict=True):
        image[2 * label : 2 * label + 6, :14] += 180
    return Images(pixels.to(torch.uint8), labels)


def make_images(seed: int = 0) -> Splits:
    """Return the bars in three parts."""
    return split(make_bars(), train=60, validation=20, test=40, seed=seed)


def make_vtab(folder: Path, classes: int = 16) -> Path:
    """Write a small task in the layout of VTAB-1K's lists, and return its folder."""
    from PIL import Image

    for name, count in {"train800": 32, "val200": 16, "test": 16}.items():
        (folder / "images" / name).mkdir(parents=True)
        lines = []
        for number in range(count):
            label = number % classes
            path = f"images/{name}/{number:06d}.png"
            Image.new("RGB", (20, 12), (15 * label, 255 - 15 * label, 40)).save(folder / path)
            lines.append(f"{path} {label}")
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder
