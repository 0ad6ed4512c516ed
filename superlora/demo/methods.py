"""What the demo compares, at which sizes, and what is measured of a method."""

from __future__ import annotations

from dataclasses import dataclass

from superlora import Spec, presets


@dataclass(frozen=True)
class Settings:
    """What all methods of a run share."""

    train: int = 500  # images in each part
    validation: int = 200
    test: int = 800
    resolution: int = 56  # side of an image, in pixels
    epochs: int = 4
    batch_size: int = 32
    head_rate: float = 1e-3  # beside an adapter
    head_only_epochs: int = 60  # of the head alone, on features that are computed once
    head_only_rate: float = 3e-3
    seed: int = 0  # of the split, the order of the images and the adapters' start


@dataclass(frozen=True)
class Method:
    """An adapter of the query and value weights, or None to train the head alone."""

    family: str
    rank: int | None
    spec: Spec | None
    rate: float  # of the adapter, chosen on the validation part

    @property
    def name(self) -> str:
        """The family, with the rank where there is one to choose."""
        return self.family if self.rank is None else f"{self.family} r{self.rank}"


HEAD = "head only"
LORA = "LoRA"


def methods() -> list[Method]:
    """Return the methods, in the order in which they are measured."""
    # None of the few other learning rates tried was better on the validation part (56 px, seed 0).
    found = [Method(HEAD, None, None, 0.0)]
    found += [Method(LORA, rank, presets.lora(rank=rank), 5e-3) for rank in (1, 4)]
    for rank in (1, 4):
        planar = Spec(rank=rank, order=2, groups=1, fold="balanced")
        found.append(Method("SuperLoRA 2-D, one group", rank, planar, 1e-2))
    lorta = presets.lorta(rank=8, order=3, groups=1)
    return [*found, Method("LoRTA 3-D, one group", 8, lorta, 2e-2)]


@dataclass(frozen=True)
class Result:
    """What was measured of a method: a row of the table."""

    method: str  # the name, of family and rank
    family: str
    rank: int | None
    parameters: int  # trained numbers of the adapter; the head's are not counted, all have them
    rate: float
    validation_accuracy: float
    test_accuracy: float
    test_correct: int
    seconds: float  # wall time of the training alone
    file_bytes: int  # 0 without an adapter
