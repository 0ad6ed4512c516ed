"""The GLoRA experiment and the inference benchmark, tiny and from end to end."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("optuna")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from superlora.search import Evolution  # noqa: E402
from tests.demo.search_cases import SETTINGS, make_base, make_images, make_vtab  # noqa: E402

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "glora-experiment.md"
MARKERS = (
    "glora-settings",
    "glora-table",
    "glora-generations",
    "glora-machine",
    "glora-figures",
)


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
    import importlib

    if not (REPOSITORY / "benchmarks").is_dir():
        pytest.skip("the benchmarks are not part of an installed package")
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def lab(script: Any, tmp_path: Path) -> Any:
    points: ModuleType = script("glora_points")
    setup = points.Setup(
        digits=SETTINGS.digits,
        resolution=28,
        epochs=2,
        supernet_epochs=3,
        batch_size=20,
        head_rate=1e-3,
        supernets=points.supernets("{2}", points.RESTRICTED),
        limits=(300, 600),
        seeds=(0, 1),
        trials=6,
        evolution=Evolution(population=4, parents=2, mutations=2, crossovers=2),
        methods=points.methods(14, 16),
    )
    return points.Lab(make_base(), make_images, setup, tmp_path / "points", {}, lambda text: None)


@pytest.mark.slow
def test_the_experiment_from_end_to_end(
    script: Any, lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points, experiment = script("glora_points"), script("glora_experiment")
    rows = points.all_points(lab)
    methods = [method.name for method in lab.setup.methods]
    searches = [
        f"GLoRA {name}, at most {limit}" for name in lab.setup.supernets for limit in (300, 600)
    ]
    assert [row["method"] for row in rows] == 2 * [*methods, *searches]
    by_name = {(row["method"], row["seed"]): row for row in rows}
    assert by_name["head only", 0]["parameters"] == 0
    outputs, inputs = 2 * (48 + 16 + 24 + 16), 2 * (16 + 16 + 16 + 24)
    sizes = {
        "BitFit": outputs,
        "SSF": 2 * outputs,
        "LoRA r2": 2 * (outputs + inputs),
        "LoRA r4": 4 * (outputs + inputs),
        "LoRA r4, a supernet's steps": 4 * (outputs + inputs),
        "RepAdapter r4": 9 * inputs,
        "dense": 2 * (48 * 16 + 16 * 16 + 24 * 16 + 16 * 24),
        "GLoRA r4 everywhere, no search": 8 * (outputs + inputs) + 4 * (inputs + 8) + 2 * outputs,
    }
    assert {name: by_name[name, 1]["parameters"] for name in sizes} == sizes
    for name in searches:
        for seed in (0, 1):
            row = by_name[name, seed]
            assert 1 <= row["parameters"] <= row["limit"]
            assert row["evaluated"] == 6
            assert row["first_generation_best"] <= row["validation"]
            chosen = {options["add_weight"] for options in row["configuration"].values()}
            assert points.RESTRICTED not in name or chosen <= {4, 2, "none"}
            assert set(row["configuration"]) == {
                f"blocks.{block}.{layer}"
                for block in (0, 1)
                for layer in ("qkv", "proj", "fc1", "fc2")
            }
    assert all(0 <= row["test"] <= 1 and row["seconds"] > 0 for row in rows)

    docs = tmp_path / "docs"
    (docs / "_static").mkdir(parents=True)
    shutil.copy(PAGE, docs)
    experiment.write(rows, lab, tmp_path / "out", docs)
    page = (docs / PAGE.name).read_text()
    shown = experiment.between(page, "glora-table")
    assert shown == experiment.table(rows)
    assert [line.split("|")[1].strip() for line in shown.splitlines()[2:]] == [*methods, *searches]
    assert f"| LoRA r2 | {sizes['LoRA r2']:,} |" in shown
    assert "| images | 60 to train, 20 to search and tune, 40 to test, at 28 px |" in page
    assert "| supernets | 9 such steps, each with a new random configuration |" in page
    assert "| rates of {2} | A 0.003, B 1e-05, C 0.0003, D 0.003, E 0.003 |" in page
    for folder in (tmp_path / "out", docs / "_static"):
        for figure in ("glora-choices.svg", "glora-parameters.svg"):
            assert "<svg" in (folder / figure).read_text()
    found = json.loads((tmp_path / "out" / "glora-experiment.json").read_text())
    assert len(found["rows"]) == len(rows)
    lines = (tmp_path / "out" / "glora-experiment.csv").read_text().splitlines()
    assert len(lines) == 1 + len(rows)

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("every point was measured already")

    monkeypatch.setattr(points, "fit", refuse)
    monkeypatch.setattr("superlora.demo.supernet.fit", refuse)
    assert points.all_points(lab) == rows


def test_tuning_measures_other_rates(script: Any, lab: Any) -> None:
    experiment = script("glora_experiment")
    rows = experiment.tune(lab, "{2}")
    assert [row["rate"] for row in rows] == list(experiment.FACTORS)
    assert {row["method"] for row in rows} == {"supernet {2}, random configurations"}
    folders = {path.parent for path in lab.folder.rglob("supernet.json")}
    rates = [json.loads((path / "supernet.json").read_text())["rates"] for path in folders]
    found = sorted(own["add_bias"] for own in rates)
    assert found == pytest.approx([3e-3 * factor for factor in experiment.FACTORS])
    rows = experiment.tune(lab, "BitFit")
    assert [row["rate"] for row in rows] == pytest.approx([6e-4, 2e-3, 6e-3])


def test_another_setting_is_another_point(script: Any, lab: Any) -> None:
    points = script("glora_points")
    method = lab.setup.methods[1]
    first = points.baseline(lab, method, 0)
    other = points.baseline(lab, dataclasses.replace(method, rate=3e-2), 0)
    assert other["seconds"] != first["seconds"]
    assert points.baseline(lab, method, 0) == first
    assert len(list(lab.folder.iterdir())) == 2


def test_an_interrupted_experiment_goes_on(
    script: Any, lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = script("glora_points")
    own = points.supernets("{2}")
    small = dataclasses.replace(lab.setup, supernets=own, limits=(300,), seeds=(0,))
    small = dataclasses.replace(small, methods=small.methods[1:2])
    lab = dataclasses.replace(lab, setup=small)
    keep = points.keep

    def interrupt(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(points, "keep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        points.all_points(lab)
    monkeypatch.setattr(points, "keep", keep)
    monkeypatch.setattr(points, "fit", interrupt)  # all training lies behind
    monkeypatch.setattr("superlora.demo.supernet.fit", interrupt)
    rows = points.all_points(lab)
    assert [row["method"] for row in rows] == ["BitFit", "GLoRA {2}, at most 300"]


def test_the_summary_has_means_and_deviations(script: Any) -> None:
    points, experiment = script("glora_points"), script("glora_experiment")
    rows = [
        {
            "method": "LoRA",
            "seed": seed,
            "rate": 1e-3,
            "parameters": 10,
            "validation": 0.5,
            "test": test,
            "seconds": 2.0,
        }
        for seed, test in enumerate((0.7, 0.8, 0.9))
    ]
    (line,) = points.summary(rows)
    assert line["test"] == pytest.approx(0.8)
    assert line["test_std"] == pytest.approx(0.1)
    assert experiment.table(rows).splitlines()[-1] == (
        "| LoRA | 10 | 80.0 ± 10.0 | 50.0 ± 0.0 | 2 |  |"
    )


def test_where_the_parameters_went(script: Any, lab: Any) -> None:
    points, plots = script("glora_points"), script("glora_plots")
    space = points.space(lab, points.RESTRICTED)
    configuration = space.fixed(add_weight=2, add_bias="vector")
    assert plots.where({"configuration": configuration}, space) == {
        "qkv": 2 * (2 * 64 + 48),
        "proj": 2 * (2 * 32 + 16),
        "fc1": 2 * (2 * 40 + 24),
        "fc2": 2 * (2 * 40 + 16),
    }
    assert [plots.kind(option, (4, 2)) for option in ("none", "constant", "vector", 2, 4)] == [
        0,
        1,
        2,
        3,
        4,
    ]


def test_agreement_is_counted(script: Any) -> None:
    plots = script("glora_plots")
    layers = [f"{index}.qkv" for index in range(4)]

    def row(options: list[Any]) -> dict[str, Any]:
        others = dict.fromkeys(plots.LETTERS, "none")
        chosen = {
            layer: {**others, "add_weight": option}
            for layer, option in zip(layers, options, strict=True)
        }
        return {"method": "GLoRA", "configuration": chosen}

    rows = [row([2, 2, "none", "none"]), row([2, "none", 2, "none"])]
    # Four operations agree everywhere, by chance too; one in two layers, as it would shuffled.
    assert plots.agreement(rows) == (20, 18, 18)
    assert plots.agreement([rows[0], rows[0]]) == (20, 20, 18)


def test_the_page_has_what_the_experiment_fills_in() -> None:
    if not PAGE.exists():
        pytest.skip("the documentation is not part of an installed package")
    text = PAGE.read_text()
    for marker in MARKERS:
        assert text.count(f"<!-- {marker} -->") == text.count(f"<!-- /{marker} -->") == 1
    assert "Not measured" not in text
    for figure in re.findall(r"\(_static/(\S+)\)", text):
        assert (PAGE.parent / "_static" / figure).exists()


def test_the_table_has_a_row_for_every_method(script: Any) -> None:
    if not PAGE.exists():
        pytest.skip("the documentation is not part of an installed package")
    points, experiment = script("glora_points"), script("glora_experiment")
    setup = points.FULL
    lines = experiment.between(PAGE.read_text(), "glora-table").splitlines()[2:]
    searches = [
        f"GLoRA {name}, at most {limit:,}" for name in setup.supernets for limit in setup.limits
    ]
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines]
    assert names == [*(method.name for method in setup.methods), *searches]
    assert experiment.between(PAGE.read_text(), "glora-settings") == experiment.settings(setup)


def test_the_quick_form_is_smaller(script: Any) -> None:
    points = script("glora_points")
    assert points.QUICK.digits < points.FULL.digits
    assert len(points.FULL.seeds) == 3
    every = ["{2}", "{4, 2}", "{8, 4}", points.RESTRICTED]
    assert list(points.FULL.supernets) == every
    assert [list(own.ranks) for own in points.FULL.supernets.values()] == [
        [2],
        [4, 2],
        [8, 4],
        [4, 2],
    ]
    *whole, restricted = points.FULL.supernets.values()
    assert all(
        own.operations()["add_weight"][-3:] == ("vector", "constant", "none") for own in whole
    )
    assert restricted.operations()["add_weight"] == (4, 2, "none")
    assert set(restricted.operations()["scale_weight"]) == {4, 2, "vector", "constant", "none"}


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
