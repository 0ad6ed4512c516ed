"""Training, on a tiny transformer and made-up digits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

import superlora as sl  # noqa: E402
from superlora.demo.data import Images, split  # noqa: E402
from superlora.demo.points import QUICK, Point, Result  # noqa: E402
from superlora.demo.train import Trainer, count_correct, reload  # noqa: E402
from superlora.demo.vit import VisionTransformer  # noqa: E402

SETTINGS = dataclasses.replace(
    QUICK, train=100, validation=20, test=50, resolution=28, epochs=3, head_only_epochs=3
)
POINTS = [
    Point("head only", None, None, 0.0),
    Point("LoRA", 2, sl.presets.lora(rank=2), 1e-2),
    Point("2-D", 1, sl.Spec(rank=1, order=2, groups=1, fold="balanced"), 1e-2),
    Point("LoRTA", 3, sl.presets.lorta(rank=3, order=3, groups=1), 1e-2),
    Point("dense", None, sl.presets.dense(), 1e-3),
]


def make_model() -> VisionTransformer:
    torch.manual_seed(1)
    model = VisionTransformer(width=16, depth=2, heads=2, hidden=16, patch=14, grid=2)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def digits() -> Images:
    """Return a bright bar a class, in noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 10
    pixels = torch.randint(0, 60, (200, 28, 28), generator=generator)
    for image, label in zip(pixels, labels.tolist(), strict=True):
        image[2 * label : 2 * label + 6, :14] += 180
    return Images(pixels.to(torch.uint8), labels)


@pytest.fixture
def trainer(digits: Images) -> Trainer:
    parts = split(digits, train=100, validation=20, test=50, seed=0)
    return Trainer(make_model(), parts, SETTINGS)


def measure(trainer: Trainer, point: Point, folder: Path) -> tuple[Result, int]:
    steps: list[None] = []
    folder.mkdir()
    return trainer.train(point, "key", folder, lambda: steps.append(None)), len(steps)


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.family)
def test_a_point_is_measured_saved_and_found_again(
    trainer: Trainer, point: Point, tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    result, steps = measure(trainer, point, tmp_path / "point")
    assert steps == trainer.steps(point)
    assert result.test_correct == round(50 * result.test_accuracy)
    assert result.seconds > 0
    after = trainer.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    if point.spec is None:
        assert (result.parameters, result.file_bytes) == (0, 0)
        return
    file = tmp_path / "point" / "adapter.safetensors"
    assert result.file_bytes == file.stat().st_size > 4 * result.parameters
    model = make_model()
    head = reload(model, tmp_path / "point")
    assert model.superlora.num_parameters == result.parameters
    found = count_correct(model, head, trainer.splits.test, 28, lambda: None)
    assert found == result.test_correct


def test_the_adapter_is_trained(trainer: Trainer, tmp_path: Path) -> None:
    measure(trainer, POINTS[1], tmp_path / "point")
    model = make_model()
    reload(model, tmp_path / "point")
    for delta in model.superlora.deltas().values():
        assert delta.abs().max() > 0


def test_a_seed_decides_the_result(trainer: Trainer, tmp_path: Path) -> None:
    first, again = (measure(trainer, POINTS[2], tmp_path / name)[0] for name in ("a", "b"))
    assert first == dataclasses.replace(again, seconds=first.seconds)
    assert (tmp_path / "a" / "adapter.safetensors").read_bytes() == (
        tmp_path / "b" / "adapter.safetensors"
    ).read_bytes()
    other = dataclasses.replace(trainer, settings=dataclasses.replace(SETTINGS, seed=1))
    measure(other, POINTS[2], tmp_path / "c")
    assert (tmp_path / "c" / "adapter.safetensors").read_bytes() != (
        tmp_path / "a" / "adapter.safetensors"
    ).read_bytes()
