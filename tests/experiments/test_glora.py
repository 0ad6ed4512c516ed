"""The supernet's task: what is searched, kept, and tested on shifted digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("optuna")
pytest.importorskip("rich")

from experiments.tasks import glora  # noqa: E402

import superlora as sl  # noqa: E402
from superlora.demo.supernet import TARGETS, fuse  # noqa: E402
from superlora.demo.train import Classifier  # noqa: E402
from tests.demo.search_cases import make_base, make_images  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def task(tmp_path: Path) -> glora.Digits:
    base = make_base()
    fused = fuse(base)
    return glora.Digits(
        *(lambda classes: Classifier(fused, classes, 28), make_images, TARGETS),
        **{"epochs": 1, "batch_size": 20, "head_rate": 1e-2, "head_alone": 1e-2, "base": base},
        **{"resolution": 28, "trials": 25, "folder": tmp_path},
    )


def test_a_supernet_is_searched_within_its_limit(task: glora.Digits) -> None:
    found = task.measure(
        glora.Searched((2,), 600, epochs=2), rate=3e-3, scale=1.0, seed=0, test=True
    )
    assert 0 < found["parameters"] <= 600
    assert found["candidate_parameters"] <= 600
    assert found["validation"] >= found["candidate_validation"]
    assert found["candidate_label"]
    assert len(found["epoch_losses"]) == 2
    assert set(found["configuration"]) == {
        f"blocks.{block}.{layer}" for block in (0, 1) for layer in TARGETS
    }
    assert found["searched"] is True
    assert found["diverged"] is False
    for name in (
        "random_test",
        "test",
        "test_turned",
        "test_noisy",
        "test_inverted",
        "candidate_test",
    ):
        assert 0 <= found[name] <= 1


def test_a_supernet_is_trained_once_for_all_its_limits(
    task: glora.Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    own: dict[str, Any] = {"rate": 3e-3, "scale": 1.0, "seed": 0, "test": False}
    first = task.measure(glora.Searched((2,), 600, epochs=1), **own)

    def refuse(*arguments: Any, **settings: Any) -> Any:
        raise AssertionError("it is trained already")

    monkeypatch.setattr("superlora.demo.supernet.fit", refuse)
    other = task.measure(glora.Searched((2,), 300, epochs=1), **own)
    assert other["seconds"] == first["seconds"]
    with pytest.raises(AssertionError):
        task.measure(glora.Searched((2,), 300, epochs=1), **{**own, "rate": 6e-3})


@pytest.mark.parametrize("epochs", [4, 12])
def test_a_supernet_that_diverges_is_ended_once_and_counts_as_a_guess(
    task: glora.Digits, epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    own: dict[str, Any] = {"rate": 1e3, "scale": 1.0, "seed": 0, "test": True}
    found = task.measure(glora.Searched((2,), 600, epochs), **own)
    assert found["diverged"]
    assert found["validation"] == found["test"] == found["test_noisy"] == 1 / 10
    assert found["parameters"] == 600

    def refuse(*arguments: Any, **settings: Any) -> Any:
        raise AssertionError("it is known to diverge")

    monkeypatch.setattr("superlora.demo.supernet.fit", refuse)
    other = task.measure(glora.Searched((2,), 300, epochs), **own)
    assert other == {**found, "parameters": 300}


def test_other_designs_are_trained_as_they_are(task: glora.Digits) -> None:
    found = task.measure(sl.lora(rank=1), rate=1e-2, scale=1.0, seed=0, test=True)
    outputs, inputs = 2 * (48 + 16 + 24 + 16), 2 * (16 + 16 + 16 + 24)
    assert found["parameters"] == outputs + inputs
    assert 0 <= found["test_noisy"] <= 1
    ssf = task.measure(sl.ssf(), rate=1e-2, scale=1.0, seed=0, test=True)
    assert ssf["parameters"] == 2 * outputs
    assert task.measure(None, rate=1e-2, scale=1.0, seed=0, test=True)["parameters"] == 0


def test_shifts_are_what_they_are_called() -> None:
    pixels = torch.zeros(1, 28, 28, dtype=torch.uint8)
    pixels[0, 4, 13:15] = 200  # a dot above the middle, which goes to the left
    moved = glora.turned(pixels)[0].float()
    row, column = divmod(int(moved.argmax()), 28)
    assert (abs(row - 5), abs(column - 8.75)) < (2, 2)
    assert glora.inverted(pixels)[0, 4, 13] == 55
    assert torch.equal(glora.inverted(glora.inverted(pixels)), pixels)
    assert torch.equal(glora.noisy(pixels), glora.noisy(pixels))
    rest = (glora.noisy(torch.full_like(pixels, 128)).float() - 128).std()
    assert 50 < float(rest) < 75
