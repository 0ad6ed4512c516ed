"""A vision transformer of transformers on CIFAR, by the paper's schedule: for a machine with a GPU.

SuperLoRA's Figure 4: SGD, a batch of 128, 5,000 steps, OneCycle. The data are the binary versions
of CIFAR-10 or CIFAR-100 in a folder, the model a folder as transformers writes it, such as
ViT-B/16 pre-trained on ImageNet-21k. Nothing is downloaded: `SUPERLORA_CIFAR` and
`SUPERLORA_VIT` name the two folders.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.classification import attached
from superlora.demo.data import Images

SOURCES = ("classification.py", "demo/data.py")
PACKAGES = ("transformers",)
# The classes, the files, and the bytes of labels before an image: of two, the last is the finer.
FORMATS = {
    "cifar10": (10, tuple(f"data_batch_{part}.bin" for part in range(1, 6)), "test_batch.bin", 1),
    "cifar100": (100, ("train.bin",), "test.bin", 2),
}
SIDE = 32


def read(folder: Path, data: str) -> tuple[Images, Images]:
    """Return the training and the test part of a folder in the binary format."""
    if data not in FORMATS:
        raise ValueError(f"data must be one of {list(FORMATS)}: got {data!r}")
    classes, train, test, labels = FORMATS[data]

    def part(names: Sequence[str]) -> Images:
        blocks = []
        for name in names:
            file = folder / name
            if not file.is_file():
                raise ValueError(f"{folder} must have the file {name} of {data}'s binary version")
            content = numpy.fromfile(file, dtype=numpy.uint8)
            record = labels + 3 * SIDE * SIDE
            if not len(content) or len(content) % record:
                raise ValueError(
                    f"{file} must have records of {record} bytes: got {len(content)} bytes"
                )
            blocks.append(content.reshape(-1, record))
        whole = numpy.concatenate(blocks)
        found = torch.from_numpy(whole[:, labels - 1].astype(numpy.int64))
        if int(found.max()) >= classes:
            raise ValueError(f"{folder} must have labels below {classes}: got {int(found.max())}")
        pixels = torch.from_numpy(whole[:, labels:].reshape(-1, 3, SIDE, SIDE).copy())
        return Images(pixels, found)

    return part(train), part([test])


@dataclass
class Cifar:
    """The model, the images, and the schedule."""

    model: nn.Module
    train: Images
    test: Images
    classes: int
    targets: Sequence[str]
    steps: int
    batch_size: int
    validation: int  # of the training images, the last of a seed's order
    device: str

    def measure(
        self, design: Any, *, rate: float, scale: float, seed: int, test: bool
    ) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.train), generator=generator)
        kept, own = order[-self.validation :], order[: -self.validation]
        head = nn.Linear(self.model.config.hidden_size, self.classes).to(self.device)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        start = time.perf_counter()
        with attached(self.model, design, self.targets, scale, seed) as adapter:
            factors = [] if design is None else list(adapter.parameters())
            optimizer = torch.optim.SGD([*factors, *head.parameters()], lr=rate)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, self.steps)
            loss = torch.tensor(float("nan"))
            for _ in range(self.steps):
                drawn = torch.randint(len(own), (self.batch_size,), generator=generator)
                batch = self.train[own[drawn]]
                loss = F.cross_entropy(
                    head(self.features(batch.pixels)), batch.labels.to(self.device)
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            seconds = time.perf_counter() - start
            return {
                "parameters": 0 if design is None else adapter.num_parameters,
                "validation": self.accuracy(head, self.train[kept]),
                **({"test": self.accuracy(head, self.test)} if test else {}),
                "seconds": seconds,
                "loss": float(loss.detach()),
            }

    def features(self, pixels: Tensor) -> Tensor:
        """Map pixels of uint8 to the class token (n, width)."""
        side = self.model.config.image_size
        shown = pixels.to(self.device).float() / 127.5 - 1
        shown = F.interpolate(shown, side, mode="bilinear", align_corners=False)
        found: Tensor = self.model(pixel_values=shown).last_hidden_state[:, 0]
        return found

    @torch.no_grad()
    def accuracy(self, head: nn.Module, images: Images) -> float:
        correct = 0
        for index in torch.arange(len(images)).split(self.batch_size):
            batch = images[index]
            found = head(self.features(batch.pixels)).argmax(1).cpu()
            correct += int((found == batch.labels).sum())
        return correct / len(images)


def load(
    *,
    data: str,
    steps: int = 5000,
    batch_size: int = 128,
    validation: int = 5000,
) -> Cifar:
    """Return the task, on a GPU where there is one."""
    from transformers import AutoModel

    folders = {}
    for name in ("SUPERLORA_CIFAR", "SUPERLORA_VIT"):
        if not os.environ.get(name):
            raise ValueError(f"{name} must name a folder, as experiments/tasks/cifar.py says")
        folders[name] = Path(os.environ[name])
    train, test = read(folders["SUPERLORA_CIFAR"], data)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModel.from_pretrained(folders["SUPERLORA_VIT"], add_pooling_layer=False)
    model = model.requires_grad_(False).eval().to(device)
    # Releases of transformers name these layers differently.
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = ("query", "value") if "query" in names else ("q_proj", "v_proj")
    return Cifar(
        model, train, test, FORMATS[data][0], targets, steps, batch_size, validation, device
    )
