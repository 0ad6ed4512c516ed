"""The task of drawing digits, with a tiny U-Net on made ones: sampler, judge, pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy
import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import torch
from experiments import drawing_figure, flow
from experiments.judge import features_of, frechet_distance, recognised
from experiments.tasks import drawing

import superlora as sl
from superlora.demo.data import Images

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE = 8
SETTINGS: dict[str, Any] = {
    **{"judged": 100, "train": 100, "validation": 50, "test": 100},
    "pretraining": {"steps": 30, "batch_size": 16, "rate": 1e-2},
    "judging": {"steps": 60, "batch_size": 32, "rate": 1e-2},
    "model": {"widths": (8, 16), "heads": 2, "condition": 16},
    **{"steps": 20, "batch_size": 16, "drawn": 8, "sampler_steps": 3},
}
RUN: dict[str, Any] = {"rate": 1e-2, "scale": 1.0, "seed": 0, "test": True}


def made_digits() -> Images:
    """Return 40 noisy images of each of ten classes: a dark image with one bright row or column."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(10).repeat_interleave(40)
    pixels = 40 * torch.rand(len(labels), SIDE, SIDE, generator=generator)
    for image, label in zip(pixels, labels.tolist(), strict=True):
        image = image if label < 5 else image.T
        image[1 + label % 5] += 200
    return Images(pixels.to(torch.uint8), labels)


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> drawing.Drawing:
    monkeypatch.setenv("SUPERLORA_CACHE", str(tmp_path))
    return drawing.load(**SETTINGS, digits=made_digits())


def test_measure_trains_every_design_and_leaves_the_model_as_it_was(task: drawing.Drawing) -> None:
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    rows = {
        name: task.measure(design, **RUN)
        for name, design in {
            "none": None,
            "dense": sl.dense(),
            "lora": sl.lora(rank=2),
            "planar": sl.Spec(rank=4, groups=1, fold="balanced", map=sl.maps.Fastfood(), ratio=0.5),
        }.items()
    }
    after = task.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(own.requires_grad for own in task.model.parameters())
    layers = dict(task.model.named_modules())
    adapted = [own for name, own in layers.items() if name.split(".")[-1] in task.targets]
    assert rows["none"]["parameters"] == 0
    assert rows["dense"]["parameters"] == sum(own.weight.numel() for own in adapted)
    for name, row in rows.items():
        assert numpy.isfinite([row["validation"], row["test"]]).all()
        assert row["test"] < 0 <= row["accuracy"] <= 1
        assert not row["diverged"]
        if name != "none":
            assert row["validation"] > rows["none"]["validation"]
    assert task.measure(sl.lora(rank=2), **RUN) | {"seconds": 0} == rows["lora"] | {"seconds": 0}


def test_a_training_that_diverges_counts_as_guessing(task: drawing.Drawing) -> None:
    row = task.measure(sl.dense(), rate=1e6, scale=1.0, seed=0, test=True)
    assert row["diverged"]
    guess = drawing.guess_loss(task.parts(0).validation)
    assert row["validation"] == -guess
    assert numpy.isfinite(row["test"])


def test_new_digits_have_the_old_labels_and_no_part_has_another_s_images(
    task: drawing.Drawing,
) -> None:
    parts = task.parts(0)
    seen: list[bytes] = []
    for part, size in ((parts.train, 50), (parts.validation, 25), (parts.test, 50)):
        assert len(part) == size
        assert part.labels.bincount().tolist() == [size // 5] * 5
        assert all(
            int(image.float().mean(0).argmax()) == 1 + label
            for image, label in zip(part.pixels, part.labels.tolist(), strict=True)
        )
        seen += [image.numpy().tobytes() for image in part.pixels]
    assert len(set(seen)) == len(seen)


def test_weights_are_trained_once(task: drawing.Drawing, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []
    monkeypatch.setattr(drawing, "pretrain", lambda *args, **options: trained.append("unet"))
    monkeypatch.setattr(drawing, "train_judge", lambda *args, **options: trained.append("judge"))
    again = drawing.load(**SETTINGS, digits=made_digits())
    assert trained == []
    for own, other in ((task.model, again.model), (task.judge, again.judge)):
        found = other.state_dict()
        assert all(torch.equal(found[name], value) for name, value in own.state_dict().items())
    longer = {**SETTINGS, "pretraining": {**SETTINGS["pretraining"], "steps": 31}}
    drawing.load(**longer, digits=made_digits())
    assert trained == ["unet"]


def test_the_judge_knows_what_it_learned(task: drawing.Drawing) -> None:
    test = task.parts(0).test
    real = Images(test.pixels, test.labels + 5)
    assert recognised(task.judge, real) > 0.9


def test_exact_velocities_give_no_loss_and_lead_to_the_image() -> None:
    pixels = made_digits().pixels[:3]
    image, labels = flow.scaled(pixels), torch.arange(3)

    def exact(noisy: torch.Tensor, times: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (noisy - image) / times[:, None, None, None]

    times, noise = torch.tensor([0.2, 0.5, 1.0]), torch.randn(3, 1, SIDE, SIDE)
    assert float(flow.loss_of(exact, image, labels, times, noise)) < 1e-10
    assert float(flow.loss_of(lambda *own: 0 * noise, image, labels, times, noise)) == (
        pytest.approx(float((noise - image).square().mean()))
    )
    assert torch.equal(flow.sample(exact, labels, side=SIDE, steps=4, seed=0), pixels)


def test_drawings_depend_on_the_seed_alone(task: drawing.Drawing) -> None:
    options: dict[str, Any] = {"side": SIDE, "steps": 3}
    labels = torch.arange(5)
    torch.manual_seed(1)
    first = flow.sample(task.model, labels, **options, seed=0)
    torch.manual_seed(2)
    assert torch.equal(first, flow.sample(task.model, labels, **options, seed=0))
    assert not torch.equal(first, flow.sample(task.model, labels, **options, seed=1))


def sample_of(mean: list[float], covariance: list[list[float]], seed: int) -> numpy.ndarray:
    """Return points with exactly this mean and this covariance."""
    points = numpy.random.default_rng(seed).normal(size=(50, len(mean)))
    points -= points.mean(0)
    root = numpy.linalg.cholesky(numpy.cov(points, rowvar=False))
    white = points @ numpy.linalg.inv(root).T
    return white @ numpy.linalg.cholesky(numpy.array(covariance)).T + mean


def test_frechet_distance_of_known_gaussians() -> None:
    first = sample_of([0, 0], [[1, 0], [0, 4]], seed=0)
    # 3² + 4² between the means, (1 - 3)² + (2 - 1)² between the standard deviations.
    assert frechet_distance(first, sample_of([3, 4], [[9, 0], [0, 1]], seed=1)) == pytest.approx(30)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-8)
    # C₁ C₂ = [[2, 4], [1, 8]], whose root's trace is √(trace + 2 √determinant) = √(10 + 2 √12).
    first = sample_of([1, 0], [[2, 1], [1, 2]], seed=2)
    other = sample_of([1, 0], [[1, 0], [0, 4]], seed=3)
    assert frechet_distance(first, other) == pytest.approx(9 - 2 * (10 + 2 * 12**0.5) ** 0.5)


def test_the_picture_has_a_panel_for_each_design(task: drawing.Drawing, tmp_path: Path) -> None:
    tiles = torch.arange(6).view(6, 1, 1).expand(6, 2, 2)
    assert drawing_figure.mosaic(tiles, 3)[::2, ::2].tolist() == [[0, 1, 2], [3, 4, 5]]
    panels = [("not adapted", None, 0.0), ("LoRA", sl.lora(rank=1), 1e-2)]
    figure = drawing_figure.drawings(task, panels, seed=0, each=2)
    assert [axes.get_title() for axes in figure.axes] == ["real", "not adapted", "LoRA"]
    assert figure.axes[0].images[0].get_array().shape == (5 * SIDE, 2 * SIDE)
    drawing_figure.save(figure, tmp_path / "drawings.png")
    assert (tmp_path / "drawings.png").stat().st_size > 0


def test_the_checks_measure_the_real_digits_and_the_old_ones(task: drawing.Drawing) -> None:
    parts = task.parts(0)
    near, read = re.findall(r"[\d.]+", drawing_figure.checks(task, [0]))[1:]
    features = [features_of(task.judge, part.pixels) for part in (parts.test, parts.train)]
    assert float(near) == pytest.approx(frechet_distance(*features), abs=0.05)
    drawn = task.draw(None, rate=0.0, scale=1.0, seed=0, each=task.drawn)
    assert float(read) == round(100 * recognised(task.judge, drawn))
