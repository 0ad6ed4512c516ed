"""The scripts of GLoRA's benchmarks, tiny: VTAB's protocol, and inference."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("optuna")
pytest.importorskip("rich")

import bench_inference as inference
import glora_vtab as vtab
import torch

from superlora.search import Evolution
from tests.demo.search_cases import make_base, make_vtab

pytestmark = pytest.mark.usefixtures("one_thread")


def test_vtab_is_searched_as_its_authors_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_merged_adapter_costs_no_flops_and_an_unmerged_one_does() -> None:
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


def test_inference_is_timed_in_turns() -> None:
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
