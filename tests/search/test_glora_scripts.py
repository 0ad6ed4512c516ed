"""The scripts of GLoRA's benchmarks, tiny: VTAB's protocol, and inference."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("optuna")
pytest.importorskip("rich")

from superlora.search import Evolution  # noqa: E402
from tests.demo.search_cases import make_base, make_vtab  # noqa: E402

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Train on one thread: for so small a model, more of them wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that imports a script of the benchmarks by name."""
    if not (REPOSITORY / "benchmarks").is_dir():
        pytest.skip("the benchmarks are not part of an installed package")
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return importlib.import_module


def test_vtab_is_searched_as_its_authors_did(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vtab = script("glora_vtab")
    settings = vtab.AUTHORS
    assert (settings.resolution, settings.epochs, settings.trials) == (224, 500, 1000)
    assert settings.evolution == Evolution()
    changes = {"resolution": 14, "epochs": 2, "trials": 5}
    monkeypatch.setattr(vtab, "AUTHORS", dataclasses.replace(settings, **changes))
    monkeypatch.setattr(vtab, "fetch", lambda wheel, cache: b"")
    monkeypatch.setattr(vtab, "load_onnx", lambda data: make_base())
    folder = make_vtab(tmp_path / "svhn", classes=10)
    monkeypatch.setattr("sys.argv", ["", str(folder), "--output", str(tmp_path), "--limit", "900"])
    vtab.main()
    assert (tmp_path / "svhn" / "limit-900" / "results.json").exists()


def test_a_merged_adapter_costs_no_flops_and_an_unmerged_one_does(script: Any) -> None:
    inference = script("bench_inference")
    found = inference.models(2, tiny=True)
    images = torch.randn(3, 3, 28, 28)
    flops = {name: inference.flops(model, images) for name, model in found.items()}
    assert flops[inference.MERGED] == flops[inference.BASE] > 0
    assert flops[inference.UNMERGED] > flops[inference.BASE]
    assert flops[inference.LORA] > flops[inference.BASE]
    with torch.no_grad():
        outputs = {name: model(images) for name, model in found.items()}
    torch.testing.assert_close(
        outputs[inference.MERGED], outputs[inference.UNMERGED], rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(outputs[inference.MERGED], outputs[inference.BASE], atol=1e-3)


def test_inference_is_timed_in_turns(script: Any) -> None:
    inference = script("bench_inference")
    rows = inference.measure(inference.models(2, tiny=True), 2, 28, 3)
    assert [row["model"] for row in rows] == [
        inference.BASE,
        inference.MERGED,
        inference.UNMERGED,
        inference.LORA,
    ]
    assert rows[0]["over_base"] == 1
    assert all(row["images_per_second"] > 0 for row in rows)
    assert len(inference.table(rows).splitlines()) == 2 + len(rows)
