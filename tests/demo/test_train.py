"""Training, on a tiny transformer and made-up digits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("optuna")
pytest.importorskip("rich")
pytest.importorskip("safetensors")

import superlora as sl  # noqa: E402
import superlora.torch as slt  # noqa: E402
from superlora.demo.data import Splits  # noqa: E402
from superlora.demo.methods import HEAD, Method, Result, Settings  # noqa: E402
from superlora.demo.run import measure  # noqa: E402
from superlora.demo.supernet import fuse  # noqa: E402
from superlora.demo.train import Classifier, check_saved, fit, rate_share  # noqa: E402
from superlora.search import Supernet  # noqa: E402
from tests.demo.search_cases import make_base, make_images  # noqa: E402

SETTINGS = Settings(resolution=28, epochs=3, head_only_epochs=3)
METHODS = [
    Method(HEAD, None, None, 0.0),
    Method("LoRA", 2, sl.presets.lora(rank=2), 1e-2),
    Method("2-D", 1, sl.Spec(rank=1, order=2, groups=1, fold="balanced"), 1e-2),
    Method("dense", None, sl.presets.dense(), 1e-3),
]


@pytest.fixture(scope="module")
def images() -> Splits:
    return make_images()


def measured(images: Splits, method: Method, folder: Path, settings: Settings = SETTINGS) -> Result:
    return measure(make_base(), images, settings, method, folder)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.family)
def test_a_method_is_measured_and_saved(images: Splits, method: Method, tmp_path: Path) -> None:
    model = make_base()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = measure(model, images, SETTINGS, method, tmp_path)
    assert result.test_correct == round(40 * result.test_accuracy)
    assert result.seconds > 0
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    if method.spec is None:
        assert (result.parameters, result.file_bytes) == (0, 0)
        return
    file = tmp_path / "adapter.safetensors"
    assert result.file_bytes == file.stat().st_size > 4 * result.parameters
    loaded = make_base()
    check_saved(loaded, 10, 28, tmp_path, images.test, result.test_correct)
    expected = f"expected {result.test_correct + 1} of 40 images right, got {result.test_correct}"
    with pytest.raises(ValueError, match=f"classify as before it was saved: {expected}"):
        check_saved(loaded, 10, 28, tmp_path, images.test, result.test_correct + 1)
    adapter = slt.load(loaded, file)
    assert adapter.num_parameters == result.parameters
    assert all(delta.abs().max() > 0 for delta in adapter.deltas().values())


def test_a_seed_decides_the_result(images: Splits, tmp_path: Path) -> None:
    method = METHODS[2]
    first, again = (measured(images, method, tmp_path / name) for name in ("a", "b"))
    assert first == dataclasses.replace(again, seconds=first.seconds)
    measured(images, method, tmp_path / "c", dataclasses.replace(SETTINGS, seed=1))
    a, b, c = ((tmp_path / name / "adapter.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_factors_move_at_their_own_rates(images: Splits) -> None:
    classifier = Classifier(fuse(make_base()), 10, 28)
    supernet = Supernet(classifier.model, ["proj"], (2,))
    supernet.use(supernet.space.fixed(add_weight=2, add_bias="vector"))
    found = supernet.stored("blocks.0.proj")
    factors = {1e-2: [found["add_weight"][0]], 1e-4: [found["add_bias"][0]]}
    torch.nn.init.normal_(classifier.head.weight)
    # One step of AdamW, which moves each number by its rate.
    fit(classifier, classifier.head, factors, images.train, 1, 1e-3, batch_size=60, seed=0)
    for rate, (factor,) in factors.items():
        moved = factor.detach().abs()
        expected = torch.full_like(moved, rate_share(0, 1) * rate)
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=0)


def test_losses_fall_and_steps_and_epochs_are_told(images: Splits) -> None:
    classifier = Classifier(make_base(), 10, 28)
    steps: list[int] = []
    epochs: list[tuple[int, float]] = []
    losses = fit(
        *(classifier, classifier.head, {}, images.train, 2, 1e-2),
        batch_size=25,
        seed=0,
        before_step=steps.append,
        after_epoch=lambda epoch, loss: epochs.append((epoch, loss)),
    )
    assert steps == list(range(6))  # 60 images are three batches
    assert [epoch for epoch, _ in epochs] == [1, 2]
    assert epochs[0][1] == pytest.approx(sum(losses[:3]) / 3)
    assert epochs[1][1] < epochs[0][1]


def test_accuracy_is_the_share_classified_right(images: Splits) -> None:
    classifier = Classifier(make_base(), 10, 28)
    zero = int((images.validation.labels == 0).sum()) / 20
    assert classifier.accuracy(images.validation) == zero  # a head of zeros says class 0
    with torch.no_grad():
        classifier.head.bias[3] = 1
    three = int((images.validation.labels == 3).sum()) / 20
    assert classifier.accuracy(images.validation) == three
