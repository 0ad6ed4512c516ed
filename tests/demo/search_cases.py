"""A tiny transformer and made-up digits, for tests of searches."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from superlora.demo.data import Images, split
from superlora.demo.search_config import Config, DigitSizes, SearchSettings, SupernetSettings
from superlora.demo.tasks import Task
from superlora.demo.vit import VisionTransformer

CONFIG = Config(
    data="digits",
    resolution=28,
    digits=DigitSizes(train=60, validation=20, test=40),
    supernet=SupernetSettings(ranks=(4, 2), epochs=3, batch_size=20, rate=1e-2),
    search=SearchSettings(trials=12, population=6, parents=3, mutations=3, crossovers=3),
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


def make_task(seed: int = 0) -> Task:
    """Return the bars in three parts."""
    sizes = dataclasses.asdict(CONFIG.digits)
    parts = split(make_bars(), **sizes, seed=seed)
    return Task("bars", 10, 28, parts.train, parts.validation, parts.test)


def make_vtab(folder: Path, task: str = "dsprites_loc", classes: int = 16) -> Path:
    """Write a small task in the layout of VTAB-1K's lists, and return the folder of tasks."""
    from PIL import Image

    own = folder / task
    sizes = {"train800": 32, "val200": 16, "test": 16}
    lines: dict[str, list[str]] = {}
    for part, count in sizes.items():
        (own / "images" / part).mkdir(parents=True)
        for number in range(count):
            label = number % classes
            name = f"images/{part}/{number:06d}.png"
            Image.new("RGB", (20, 12), (15 * label, 255 - 15 * label, 40)).save(own / name)
            lines.setdefault(part, []).append(f"{name} {label}")
    lines["train800val200"] = lines["train800"] + lines["val200"]
    for part, own_lines in lines.items():
        (own / f"{part}.txt").write_text("\n".join(own_lines) + "\n")
    return folder
