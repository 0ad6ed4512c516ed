"""A model for the peers, and what they compute."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import superlora.torch as slt
from tests.torch.helpers import seeded

peft = pytest.importorskip("peft")
conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D

# Of PEFT's own use of transformers, and of its hints.
quiet = pytest.mark.filterwarnings(
    "ignore::UserWarning:peft", "ignore::DeprecationWarning", "ignore::FutureWarning:transformers"
)


class Block(nn.Module):
    """Layers of unequal widths, with and without bias, and GPT-2's."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(24, 16)
        self.v = nn.Linear(24, 12, bias=False)
        self.c = conv1d(8, 24)
        nn.init.normal_(self.c.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.v(x), self.c(x)], dim=-1)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.down = nn.Linear(36, 24)
        self.norm = nn.LayerNorm(36)
        self.head = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks[1](self.down(self.blocks[0](x)))))


def make_model(**to: Any) -> Model:
    with seeded(0):
        return Model().to(**to)


def make_x(**to: Any) -> Tensor:
    with seeded(1):
        return torch.randn(7, 24).to(**to)


def randomise(module: nn.Module, seed: int = 2) -> None:
    """Give all that is trainable values as after training."""
    with seeded(seed), torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.5 * torch.randn(parameter.shape))


def save_with_peft(config: Any, folder: Path) -> Tensor:
    """Save a PEFT adapter as after training, and return what PEFT computes with it."""
    model = peft.get_peft_model(make_model(), config)
    randomise(model)
    model.save_pretrained(folder)
    with torch.no_grad():
        return model.eval()(make_x())


def load_with_peft(folder: Path, model: nn.Module | None = None) -> nn.Module:
    return peft.PeftModel.from_pretrained(model or make_model(), folder).eval()


@contextlib.contextmanager
def lycoris() -> Iterator[Any]:
    """Yield LyCORIS, whose presets and logger are those of the whole process."""
    package = pytest.importorskip("lycoris")
    network = package.LycorisNetwork
    kept = {key: value for key, value in vars(network).items() if key.isupper()}
    kept = copy.deepcopy(kept)
    logger = logging.getLogger("LyCORIS")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield package
    finally:
        logger.setLevel(level)
        for key, value in kept.items():
            setattr(network, key, value)


def save_with_lycoris(path: Path, seed: int = 2, **options: Any) -> Tensor:
    """Save a LyCORIS adapter as after training, and return its training forward's output."""
    model = make_model()
    with lycoris() as package:
        package.LycorisNetwork.apply_preset({"target_name": [r".*\.[qv]"], "target_module": []})
        network = package.LycorisNetwork(model, enable_conv=False, **options)
        network.apply_to()
        randomise(network, seed)
        with torch.no_grad():
            output = model(make_x())
        network.save_weights(str(path), torch.float32, {})
    return output


def load_with_lycoris(path: Path, model: nn.Module | None = None) -> nn.Module:
    model = model or make_model()
    with lycoris() as package:
        network, _ = package.create_lycoris_from_weights(1.0, str(path), model)
        network.apply_to()
        model.lycoris_network = network  # keeps it alive
    return model


def attach_random(spec: Any, targets: list[str] = ["q", "v"], **to: Any) -> tuple[Any, slt.Adapter]:  # noqa: B006
    model = make_model(**to)
    adapter = slt.attach(model, spec, targets)
    randomise(adapter)
    return model, adapter


def assert_outputs(actual: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    """Compare relatively to the largest entry."""
    error = (actual.detach() - expected.detach()).abs().max() / expected.detach().abs().max()
    assert error <= tolerance
