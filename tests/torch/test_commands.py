"""The commands for files: what they print, write and refuse, and that the page says it all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import superlora as sl
import superlora.torch as slt
from superlora import commands

pytest.importorskip("transformers")
pytest.importorskip("typer")

from typer.testing import CliRunner

from superlora.cli import build
from tests.torch.on_disk import bert, gpt2, randomise, saved, tensors_in

PAGE = Path(__file__).parents[2] / "docs" / "command-line.md"


def run(*arguments: Any, code: int = 0) -> Any:
    """Run a command, and return what it printed."""
    found = CliRunner().invoke(build(), [*map(str, arguments)])
    assert found.exit_code == code, found.output
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    assert "Traceback" not in found.output
    return found


def said(*arguments: Any, code: int = 0) -> Any:
    """Run a command with ``--json``, and return what it said."""
    return json.loads(run(*arguments, "--json", code=code).stdout)


def refused(*arguments: Any, code: int = 1) -> str:
    """Run a command that is refused, and return its one line."""
    found = run(*arguments, code=code)
    assert found.stdout == ""
    assert len(found.stderr.splitlines()) == 1, found.stderr
    return str(found.stderr)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(bert(), tmp_path / "base", "6KB")


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return adapter(bert(), tmp_path / "lora.safetensors", sl.lora(rank=3), ["query", "value"])


def adapter(model: nn.Module, path: Path, spec: Any, targets: Any, **options: Any) -> Path:
    randomise(slt.attach(model, spec, targets=targets, **options)).save(path)
    return path


def tuned(base: Path, folder: Path, noise: float = 0.0, rank: int = 2) -> Path:
    """Save a fine-tune whose query and value weights changed by matrices of a small rank."""
    generator = torch.Generator().manual_seed(3)
    model = bert()
    model.load_state_dict(tensors_in(base))
    with torch.no_grad():
        for name, own in model.named_parameters():
            if name.endswith(("query.weight", "value.weight")):
                pair = [torch.randn(16, rank, generator=generator) for _ in range(2)]
                rest = noise * torch.randn(own.shape, generator=generator)
                own += 0.1 * (pair[0] @ pair[1].T + rest)
        model.classifier.bias += 1
    return saved(model, folder)


# --- plan


def test_a_plan_is_that_of_the_model(base: Path) -> None:
    for preset, options in (("lora", ["--rank", "2"]), ("loha", ["--set", "rank=2"])):
        found = said("plan", base, "--preset", preset, *options)
        model = bert()
        expected = slt.attach(model, getattr(sl, preset)(rank=2), targets="all-linear").plan
        assert found["parameters"] == expected.num_parameters
        shapes = sorted(map(list, expected.factor_shapes.values()))
        assert sorted(found["factors"].values()) == shapes
        assert found["weights"] == {n: [*s] for n, s in expected.shapes.items()}
    assert "classifier" in found["left_out"]
    shown = run("plan", base, "--preset", "lora", "--targets", "query", "--targets", "value")
    assert "6 weights" in shown.stdout


def test_layers_are_planned_by_their_numbers(tmp_path: Path) -> None:
    held = {f"layers.{place}.q.weight": torch.ones(4, 4) for place in range(12)}
    save_file(held, tmp_path / "base.safetensors")
    found = said("plan", tmp_path / "base.safetensors", "--preset", "lotr", "--rank", 2)
    assert list(found["weights"]) == [f"layers.{place}.q" for place in range(12)]


def test_a_plan_reads_no_tensor(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from superlora.torch.on_disk.checkpoint import Checkpoint

    monkeypatch.delattr(Checkpoint, "_array")
    run("plan", base, "--preset", "glora", "--targets", "query,value")


def test_transposed_weights_are_planned_as_they_are_used(tmp_path: Path) -> None:
    folder = saved(gpt2(), tmp_path / "base")
    found = said("plan", folder, "--preset", "lora", "--targets", "c_attn,c_fc")
    assert set(map(tuple, found["weights"].values())) == {(48, 16), (64, 16)}
    (folder / "config.json").unlink()
    assert "must have a config.json" in refused("plan", folder, "--preset", "lora")


def test_bad_plans_are_one_line(base: Path) -> None:
    assert "--preset must be one of" in refused("plan", base, "--preset", "no")
    assert "matched no layer" in refused("plan", base, "--preset", "lora", "--targets", "qq")
    assert "--set must be field=value" in refused("plan", base, "--preset", "lora", "--set", "r")
    message = refused("plan", base, "--preset", "lora", "--set", "no=1")
    assert "--set must name one of rank, rslora, order" in message
    assert message.endswith("got 'no'\n")
    assert "no checkpoint at" in refused("plan", base / "no", "--preset", "lora")
    run("plan", base, code=2)


# --- merge


def test_merge_says_what_it_does(base: Path, lora: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    shown = run("merge", base, lora, "-o", output)
    assert "6 weights, 0 biases, 0 replaced parameters" in shown.stderr
    assert shown.stdout == f"wrote {output}\n"
    assert "--force replaces it" in refused("merge", base, lora, "-o", output)
    found = said("merge", base, lora, "-o", output, "--force", "--dtype", "float16")
    assert len(found["weights"]) == 6
    assert {own.dtype for own in tensors_in(output).values()} == {torch.float16}
    lora.write_bytes(lora.read_bytes()[:-5])
    assert "whole safetensors file" in refused("merge", base, lora, "-o", tmp_path / "x")


def test_files_of_other_libraries_are_merged(base: Path, lora: Path, tmp_path: Path) -> None:
    run("merge", base, lora, "-o", tmp_path / "expected")
    for kind in ("peft", "lycoris", "comfy", "diffusers"):
        run("convert", lora, tmp_path / kind, "--to", kind)
        run("merge", base, tmp_path / kind, "-o", tmp_path / f"{kind}-merged")
        found = tensors_in(tmp_path / f"{kind}-merged")
        for name, own in tensors_in(tmp_path / "expected").items():
            torch.testing.assert_close(own, found[name], msg=name)


# --- inspect


def test_inspect_measures_the_updates(lora: Path, tmp_path: Path) -> None:
    found = said("inspect", lora)
    model = bert()
    own = slt.load(model, lora)
    assert found["format"] == "superlora"
    assert found["parameters"] == own.num_parameters
    for name, update in found["updates"].items():
        numbers = torch.linalg.svdvals(own.delta(name).detach().double())
        assert update["spectral"] == pytest.approx(float(numbers[0]), rel=1e-5)
        assert 1 < update["effective_rank"] < 3.001
    run("convert", lora, tmp_path / "folder", "--to", "peft")
    run("convert", lora, tmp_path / "flat", "--to", "kohya")
    for path, kind in ((tmp_path / "folder", "PEFT"), (tmp_path / "flat", "LyCORIS")):
        other = said("inspect", path)
        assert other["format"] == kind
        for one, two in zip(found["updates"].values(), other["updates"].values(), strict=True):
            assert one["shape"] == two["shape"]
            assert one["frobenius"] == pytest.approx(two["frobenius"], rel=1e-5)


def test_inspect_shows_biases_heads_and_a_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = adapter(
        bert(), tmp_path / "a.safetensors", sl.lora(rank=1), ["query"], also=["classifier"]
    )
    shown = run("inspect", path, "--plot", tmp_path / "norms.png")
    assert "brings classifier.weight of shape [3, 16]" in shown.stdout
    assert (tmp_path / "norms.png").read_bytes()[1:4] == b"PNG"
    linear = nn.ModuleDict({"q": nn.Linear(4, 4, bias=False), "k": nn.Linear(4, 6)})
    path = adapter(linear, tmp_path / "b.safetensors", sl.glora(rank=1), ["q", "k"])
    assert said("inspect", path)["gains_bias"] == ["q"]


@pytest.mark.parametrize(
    "spec", [sl.lokr(2), sl.loha(2), sl.vera(3), sl.lotr(2), sl.fourierft(4), sl.dense()]
)
def test_inspect_reads_every_structure(spec: sl.Spec, tmp_path: Path) -> None:
    model = bert()
    path = adapter(model, tmp_path / "a.safetensors", spec, ["query", "value"])
    norms = model.superlora.norms()
    found = said("inspect", path)["updates"]
    assert found.keys() == norms.keys()
    for name, own in norms.items():
        assert found[name]["frobenius"] == pytest.approx(own.frobenius)


def test_an_adapter_of_singular_vectors_is_read_with_its_base(base: Path, tmp_path: Path) -> None:
    path = adapter(bert(), tmp_path / "a.safetensors", sl.lora_xs(rank=2), ["query"])
    assert "give --base" in refused("inspect", path)
    assert said("inspect", path, "--base", base)["parameters"] == 12


# --- diff and average


def test_diff_of_checkpoints(base: Path, lora: Path, tmp_path: Path) -> None:
    assert said("diff", base, base) == []
    run("merge", base, lora, "-o", tmp_path / "merged")
    found = said("diff", base, tmp_path / "merged", code=1)
    one, two = tensors_in(base), tensors_in(tmp_path / "merged")
    assert {own["name"] for own in found} == {n for n in one if not torch.equal(one[n], two[n])}
    norms = [own["norm"] for own in found]
    assert norms == sorted(norms, reverse=True)
    name = found[0]["name"]
    change = two[name].double() - one[name].double()
    assert norms[0] == pytest.approx(float(change.norm() / one[name].double().norm()))
    assert found[0]["largest"] == pytest.approx(float(change.abs().max()))
    held = {**one, "more": torch.ones(2), "ids": torch.arange(3)}
    held["classifier.bias"] = torch.ones(4)
    save_file(held, tmp_path / "one.safetensors")
    save_file({**one, "ids": torch.ones(3, dtype=torch.int64)}, tmp_path / "two.safetensors")
    shown = run("diff", tmp_path / "one.safetensors", tmp_path / "two.safetensors", code=1).stdout
    for part in ("only in", "shape [4] and [3]", "values of I64 and I64"):
        assert part in shown
    assert "both must be adapters" in refused("diff", base, lora, code=2)
    assert "no file or folder" in refused("diff", base, tmp_path / "no", code=2)


def test_diff_of_adapters_compares_updates(lora: Path, tmp_path: Path) -> None:
    run("convert", lora, tmp_path / "peft", "--to", "peft")
    assert said("diff", lora, tmp_path / "peft") == []
    run("resize", lora, "--rank", 1, "-o", tmp_path / "small.safetensors")
    found = said("diff", lora, tmp_path / "small.safetensors", code=1)
    assert len(found) == 6
    assert all(0 < own["norm"] < 1 for own in found)


def test_the_mean_of_checkpoints(base: Path, tmp_path: Path) -> None:
    other = tuned(base, tmp_path / "tuned")
    run("average", base, other, "-o", tmp_path / "mean", "--weights", "3,1")
    one, two, mean = map(tensors_in, (base, other, tmp_path / "mean"))
    for name, own in mean.items():
        expected = 0.75 * one[name].double() + 0.25 * two[name].double()
        assert torch.equal(own, expected.float())
    refusals = {
        ("--weights", "1"): "weights must be as many as files",
        ("--weights", "1,x"): "--weights must be numbers",
        ("--weights", "1,-1"): "must have a sum to divide by",
    }
    for options, message in refusals.items():
        assert message in refused("average", base, other, "-o", tmp_path / "no", *options)
    save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    assert "must have the tensors of" in refused(
        "average", base, tmp_path / "w.safetensors", "-o", tmp_path / "no"
    )


def test_the_mean_of_adapters(lora: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    adapter(bert(), other, sl.lora(rank=2, alpha=5), ["query", "value"])
    run("average", lora, other, "-o", tmp_path / "mean.safetensors")
    model = bert()
    names = ("one", "two", "mean")
    files = (lora, other, tmp_path / "mean.safetensors")
    one, two, mean = (
        slt.load(model, file, name=name) for name, file in zip(names, files, strict=True)
    )
    for name in one.plan.shapes:
        expected = 0.5 * one.delta(name) + 0.5 * two.delta(name)
        torch.testing.assert_close(mean.delta(name), expected)
    adapter(bert(), other, sl.glora(rank=2), ["query", "value"])
    assert "must only add to weights" in refused("average", lora, other, "-o", tmp_path / "no")


# --- extract, convert, resize


def test_extract_finds_what_was_planted(base: Path, tmp_path: Path) -> None:
    other = tuned(base, tmp_path / "tuned")
    path = tmp_path / "a.safetensors"
    options = ("--preset", "lora", "--rank", 2, "--targets", "query,value")
    found = said("extract", base, other, "-o", path, *options, "--also", "all")
    assert found["error"] < 1e-5
    assert not tensors_in(base)["classifier.bias"].any()
    assert found["replaced"] == {"classifier.bias": None}  # infinitely more than nothing
    assert found["left"] == {}
    run("merge", base, path, "-o", tmp_path / "merged")
    for name, own in tensors_in(tmp_path / "merged").items():
        torch.testing.assert_close(own, tensors_in(other)[name])
    slt.load(bert(), path)  # opens on the model
    shown = run("extract", base, other, "-o", path, *options, "--force")
    assert "changed too, and left out: classifier.bias" in shown.stdout


def test_extract_by_budget(base: Path, tmp_path: Path) -> None:
    other = tuned(base, tmp_path / "tuned", noise=1.0)
    path = tmp_path / "a.safetensors"
    options = ("--preset", "lora", "--targets", "query,value", "--force")
    for budget in ("500", "2kB", "0.5k"):
        found = said("extract", base, other, "-o", path, *options, "--budget", budget)
        assert (found["spec"]["rank"], found["parameters"]) == (2, 384)
    errors = [
        said("extract", base, other, "-o", path, *options, "--rank", rank)["error"]
        for rank in (1, 4, 16)
    ]
    assert 1 > errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5
    message = refused("extract", base, other, "-o", path, *options, "--budget", "100")
    assert "budget must be at least 192 parameters" in message
    message = refused("extract", base, other, "-o", path, *options, "--budget", "many")
    assert "--budget must be a number" in message


def test_extract_takes_the_weights_that_differ(base: Path, tmp_path: Path) -> None:
    other = tuned(base, tmp_path / "tuned")
    path = tmp_path / "a.safetensors"
    shown = run("extract", base, other, "-o", path, "--preset", "lora", "--rank", 2)
    assert shown.stderr.startswith("6 weights, 384 parameters; at most")
    assert len(shown.stderr.splitlines()) == 1
    weights = set(said("inspect", path)["updates"])
    assert {name.rpartition(".")[2] for name in weights} == {"query", "value"}
    # A design of weights of one shape, which all linear weights are not.
    lotr = said("extract", base, other, "-o", path, "--preset", "lotr", "--rank", 12, "--force")
    assert set(lotr["errors"]) == weights
    assert lotr["error"] < 1e-5
    options = ("--preset", "lora", "--budget", 384, "--force", "--json")
    assert json.loads(run("extract", base, other, "-o", path, *options).stdout)["parameters"] == 384


def test_extract_brings_what_is_named(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "tuned"
    other.mkdir()
    held = tensors_in(tuned(base, tmp_path / "first"))
    norm = next(name for name in held if name.endswith("LayerNorm.weight"))
    held[norm] = held[norm] + 1
    save_file(held, other / "model.safetensors")
    options = ("-o", tmp_path / "a.safetensors", "--preset", "lora", "--rank", 2)
    for also, names in (("classifier", {"classifier.bias"}), (r".*\.weight", {norm})):
        found = said("extract", base, other, *options, "--force", "--also", also)
        assert set(found["replaced"]) == names
        assert set(found["left"]) == {norm, "classifier.bias"} - names
        changes = found["replaced"] | found["left"]
        one, two = tensors_in(base)[norm].double(), held[norm].double()
        assert changes[norm] == pytest.approx(float((two - one).norm() / one.norm()))
        model = bert()
        model.load_state_dict(tensors_in(base))
        slt.load(model, tmp_path / "a.safetensors").merge()
        assert torch.equal(model.state_dict()[(name := names.pop())], held[name])
    message = refused("extract", base, other, *options, "--force", "--also", "pooler")
    assert "also must match what changed besides the targets" in message
    message = refused("extract", base, other, *options, "--force", "--also", "nothing")
    assert "also must match the model" in message


def test_the_error_is_that_of_the_file(base: Path, tmp_path: Path) -> None:
    other = tuned(base, tmp_path / "tuned")
    path = tmp_path / "a.safetensors"
    found = said("extract", base, other, "-o", path, "--preset", "lora", "--rank", 1)
    assert 0.1 < found["error"] < 1
    run("merge", base, path, "-o", tmp_path / "merged")
    one, two, three = map(tensors_in, (base, other, tmp_path / "merged"))
    for name, error in found["errors"].items():
        key = f"{name}.weight"
        left = (two[key] - three[key]).norm() / (two[key] - one[key]).norm()
        assert error == pytest.approx(float(left), rel=1e-4)


def test_frozen_blocks_are_drawn_from_the_seed(base: Path, tmp_path: Path) -> None:
    other = tuned(base, tmp_path / "tuned")
    path = tmp_path / "a.safetensors"
    options = ("-o", path, "--preset", "vera", "--rank", 4, "--force")
    errors = [said("extract", base, other, *options, "--seed", seed)["error"] for seed in (0, 1, 1)]
    assert errors[0] != errors[1] == errors[2]


def test_the_memory_of_a_fit_is_that_of_its_largest_part() -> None:
    from superlora.torch.on_disk.fitting import fit_memory

    shapes = {f"{place}.q": (64, 64) for place in range(4)}
    lora, lotr = (sl.Plan(own, shapes) for own in (sl.lora(rank=1), sl.lotr(rank=1)))
    assert fit_memory(lora) == 96 * 64 * 64 + 16 * lora.num_parameters + (32 << 20)
    assert fit_memory(lotr) == 96 * 4 * 64 * 64 + 16 * lotr.num_parameters + (32 << 20)


def test_extract_refuses(base: Path, tmp_path: Path) -> None:
    other = tuned(base, tmp_path / "tuned")
    path = tmp_path / "a.safetensors"
    options = ("-o", path, "--preset", "lora", "--rank", 2)
    assert "all tensors are the same" in refused("extract", base, base, *options)
    message = refused("extract", base, other, *options, "--targets", "pooler.dense")
    assert "targets must match weights that differ" in message
    held = tensors_in(other)
    single = tmp_path / "single"
    single.mkdir()
    held["classifier.bias"][1] = torch.nan
    save_file(held, single / "model.safetensors")
    assert "'classifier.bias' has NaN or infinity" in refused("extract", base, single, *options)
    del held["classifier.bias"]
    save_file(held, single / "model.safetensors")
    assert "missing 'classifier.bias'" in refused("extract", base, single, *options)
    (single / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes()[:-9])
    assert "whole safetensors file" in refused("extract", base, single, *options)
    path.write_text("mine")
    assert "--force replaces it" in refused("extract", base, other, *options)
    assert path.read_text() == "mine"


def test_buffers_of_integers_may_be_in_one_checkpoint_alone(base: Path, tmp_path: Path) -> None:
    """As releases of transformers differ in: the fine-tune of an old file lacks position_ids."""
    other = tuned(base, tmp_path / "tuned")
    old = tmp_path / "old"
    old.mkdir()
    ids = {"bert.embeddings.position_ids": torch.arange(4)[None]}
    save_file({**tensors_in(base), **ids}, old / "model.safetensors")
    options = ("--preset", "lora", "--rank", 2, "--targets", "query,value")
    for one, two in ((old, other), (other, old)):
        found = said("extract", one, two, "-o", tmp_path / "a", *options, "--force")
        assert found["error"] < 1e-5
        assert list(found["left"]) == ["classifier.bias"]
        run("average", one, two, "-o", tmp_path / "mean", "--force")
        assert tensors_in(tmp_path / "mean").keys() == tensors_in(one).keys()


def test_differences_are_read_a_group_at_a_time(base: Path, tmp_path: Path) -> None:
    """No more of them are alive than one group of the design has weights."""
    import gc
    import weakref

    from superlora.torch.on_disk.fitting import Deltas

    alive: list[Any] = []
    most = 0
    generator = torch.Generator().manual_seed(0)

    def make(name: str) -> torch.Tensor:
        nonlocal most
        made = torch.randn(6, 5, generator=generator)
        gc.collect()
        alive.append(weakref.ref(made))
        most = max(most, sum(own() is not None for own in alive))
        return made

    shapes = {f"{place}.q": (6, 5) for place in range(8)}
    sl.Plan(sl.lora(rank=1), shapes).fit(Deltas(shapes, make))
    assert most <= 3


@pytest.mark.parametrize("to", ["peft", "lycoris", "comfy", "superlora"])
def test_convert_to_a_lora_of_an_energy(to: str, tmp_path: Path) -> None:
    source = adapter(bert(), tmp_path / "a.safetensors", sl.lokr(2), ["query", "value"])
    found = said("convert", source, tmp_path / to, "--to", to, "--as", "lora", "--energy", 0.9)
    assert all(0 <= error <= (1 - 0.9) ** 0.5 + 1e-6 for error in found["errors"].values())
    differences = said("diff", source, tmp_path / to, code=1) if to != "lycoris" else []
    for own in differences:
        assert own["norm"] == pytest.approx(found["errors"][own["name"]], abs=1e-5)


def test_convert_to_another_design(lora: Path, tmp_path: Path) -> None:
    path = tmp_path / "lotr.safetensors"
    options = ("--to", "superlora", "--as", "lotr", "--budget", "1k")
    found = said("convert", lora, path, *options)
    inspected = said("inspect", path)
    assert 500 < inspected["parameters"] <= 1000
    for own in said("diff", lora, path, code=1):
        assert own["norm"] == pytest.approx(found["errors"][own["name"]], abs=1e-5)
    assert "--to" in run("convert", lora, path, code=2).stderr
    assert "to must be one of" in refused("convert", lora, tmp_path / "x", "--to", "no")
    assert "must have a --rank" in refused(
        "convert", lora, tmp_path / "x", "--to", "peft", "--as", "lora"
    )
    assert "must come with --as" in refused(
        "convert", lora, tmp_path / "x", "--to", "peft", "--budget", "1k"
    )


def test_heads_are_converted_and_resized_too(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    adapter(bert(), path, sl.lora(rank=3), ["query"], also=["classifier"])
    run("resize", path, "--rank", 1, "-o", tmp_path / "b.safetensors")
    run("convert", tmp_path / "b.safetensors", tmp_path / "peft", "--to", "peft")
    run("convert", tmp_path / "peft", tmp_path / "c.safetensors", "--to", "superlora")
    for name in ("model.classifier.weight", "model.classifier.bias"):
        one, two = (load_file(tmp_path / f"{n}.safetensors")[name] for n in ("a", "c"))
        assert torch.equal(one, two)


def test_resize_keeps_the_largest_singular_values(lora: Path, tmp_path: Path) -> None:
    found = said("resize", lora, "--rank", 2, "-o", tmp_path / "small.safetensors")
    own = slt.load(bert(), lora)
    for name, error in found["errors"].items():
        numbers = torch.linalg.svdvals(own.delta(name).detach().double())
        assert error == pytest.approx(float(numbers[2:].norm() / numbers.norm()), rel=1e-4)
    assert "rank must be below 3" in refused("resize", lora, "--rank", 3, "-o", tmp_path / "x")
    lotr = adapter(bert(), tmp_path / "lotr.safetensors", sl.lotr(4), ["query", "value"])
    small = tmp_path / "small-lotr.safetensors"
    errors = said("resize", lotr, "--rank", 2, "-o", small)["errors"]
    assert said("inspect", small)["parameters"] < said("inspect", lotr)["parameters"]
    assert all(0 < error < 1.5 for error in errors.values())
    assert "rank must be below" in refused("resize", lotr, "--rank", 4, "-o", tmp_path / "x")


def planted(path: Path) -> dict[str, torch.Tensor]:
    """Save a LoRA of rank 4 whose updates' norms differ much; return its singular values."""
    model = bert()
    own = slt.attach(model, sl.lora(rank=4), targets=["query", "value"])
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for place, name in enumerate(own.plan.shapes):
            left, right = (
                torch.linalg.qr(torch.randn(16, 4, generator=generator)).Q for _ in range(2)
            )
            numbers = torch.tensor([8.0, 4.0, 2.0, 1.0]) * 2.0 ** (-place)
            update = (left * numbers) @ right.T
            group = own.plan.layout.grouping.pieces[name][0].group
            factors = own.plan.fit({n: update.clone() for n in own.plan.shapes})[0]
            for key, values in factors.items():
                if key.startswith(f"{group}."):
                    own.blocks[key].copy_(values)
    own.save(path)
    return {n: torch.linalg.svdvals(own.delta(n).detach().double()) for n in own.plan.shapes}


def test_ranks_of_an_energy(tmp_path: Path) -> None:
    numbers = planted(tmp_path / "a.safetensors")
    path = tmp_path / "small.safetensors"
    errors = said("resize", tmp_path / "a.safetensors", "-o", path, "--energy", 0.95)["errors"]
    count = 0
    for name, own in numbers.items():
        left = (own.square().flip(0).cumsum(0).flip(0) / own.square().sum()).tolist()
        rank = next(rank for rank in range(1, 5) if left[rank] <= 0.05)
        assert errors[name] == pytest.approx(left[rank] ** 0.5, rel=1e-3)
        count += 32 * rank
    assert said("inspect", path)["parameters"] == count


def test_bad_sizes_are_one_line(lora: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    refusals = {
        (): "one of rank and energy must be given",
        ("--energy", 0.9, "--rank", 1): "one of rank and energy must be given",
        ("--energy", 1.5): "energy must be in (0, 1]",
        ("--energy", "nan"): "energy must be in (0, 1]",
    }
    for options, message in refusals.items():
        assert message in refused("resize", lora, "-o", path, *options)
    lotr = adapter(bert(), tmp_path / "lotr.safetensors", sl.lotr(4), ["query", "value"])
    message = refused("resize", lotr, "-o", path, "--energy", 0.9)
    assert "energy must be that of a LoRA" in message
    assert not path.exists()


def test_biases_go_to_peft_and_back(base: Path, tmp_path: Path) -> None:
    """Of the layers alone where files are all that is known; others need the base."""
    held = tensors_in(base)
    for name in held:
        if name.endswith(("query.weight", "query.bias")):
            held[name] = held[name] + 0.1
    other = tmp_path / "tuned"
    other.mkdir()
    save_file(held, other / "model.safetensors")
    options = ("--preset", "lora", "--rank", 2, "--targets", "query", "--also", "all")
    run("extract", base, other, "-o", tmp_path / "a", *options)
    run("convert", tmp_path / "a", tmp_path / "peft", "--to", "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["bias"] == "lora_only"
    run("merge", base, tmp_path / "a", "-o", tmp_path / "one")
    run("merge", base, tmp_path / "peft", "-o", tmp_path / "two")
    one, two = tensors_in(tmp_path / "one"), tensors_in(tmp_path / "two")
    for name, own in one.items():
        torch.testing.assert_close(two[name], own, rtol=0, atol=1e-6)
    norm = next(name for name in held if name.endswith("LayerNorm.bias"))
    held[norm] = held[norm] + 0.1
    save_file(held, other / "model.safetensors")
    run("extract", base, other, "-o", tmp_path / "b", *options)
    message = refused("convert", tmp_path / "b", tmp_path / "more", "--to", "peft")
    assert "base must be given for PEFT" in message
    run("convert", tmp_path / "b", tmp_path / "more", "--to", "peft", "--base", base)
    run("merge", base, tmp_path / "more", "-o", tmp_path / "three")
    torch.testing.assert_close(tensors_in(tmp_path / "three")[norm], held[norm])


def test_resized_adapters_and_those_of_peft_have_a_mean(tmp_path: Path) -> None:
    numbers = planted(tmp_path / "a.safetensors")
    run("resize", tmp_path / "a.safetensors", "--rank", 3, "-o", tmp_path / "b.safetensors")
    run("convert", tmp_path / "a.safetensors", tmp_path / "peft", "--to", "peft")
    run("convert", tmp_path / "peft", tmp_path / "c.safetensors", "--to", "superlora")
    run("average", *(tmp_path / f"{own}.safetensors" for own in "abc"), "-o", tmp_path / "mean")
    found = said("inspect", tmp_path / "mean")["updates"]
    for name, own in numbers.items():
        third = own[:4] - torch.tensor([0.0, 0.0, 0.0, float(own[3]) / 3])
        assert found[name]["frobenius"] == pytest.approx(float(third.norm()), rel=1e-4)
    message = refused("average", tmp_path / "peft", tmp_path / "peft", "-o", tmp_path / "x")
    assert "convert them first" in message


def test_what_would_be_ignored_or_mean_nothing_is_refused(lora: Path, tmp_path: Path) -> None:
    options = ("convert", lora, tmp_path / "x", "--to", "superlora")
    for energy in (0, -1, 1.5, "nan"):
        message = refused(*options, "--as", "lora", "--energy", energy)
        assert "energy must be in (0, 1]" in message
    for option in (("--energy", 0.5), ("--rank", 1)):
        assert "rank and energy must come with a spec" in refused(*options, *option)


@pytest.mark.parametrize("to", ["lycoris", "kohya", "comfy", "diffusers"])
def test_resize_keeps_the_names_of_a_file(to: str, lora: Path, tmp_path: Path) -> None:
    run("convert", lora, tmp_path / "a", "--to", to)
    run("resize", tmp_path / "a", "--rank", 1, "-o", tmp_path / "b")
    assert load_file(tmp_path / "a").keys() == load_file(tmp_path / "b").keys()


def test_nan_is_no_small_difference_and_has_no_mean(base: Path, tmp_path: Path) -> None:
    held = tensors_in(base)
    for place, value in (((0, 0), torch.nan), ((2, 15), torch.inf)):
        wrong = {**held, "classifier.weight": held["classifier.weight"].clone()}
        wrong["classifier.weight"][place] = value
        (tmp_path / "wrong").mkdir(exist_ok=True)
        save_file(wrong, tmp_path / "wrong" / "model.safetensors")
        for pair in ((base, tmp_path / "wrong"), (tmp_path / "wrong", base)):
            (found,) = said("diff", *pair, code=1)
            assert found["largest"] is None
            message = refused("average", *pair, "-o", tmp_path / "mean")
            assert "the mean of 'classifier.weight' must be finite" in message
            assert not (tmp_path / "mean").exists()
    message = refused("average", base, base, "-o", tmp_path / "mean", "--weights", "1e308,1e308")
    assert "must have a sum to divide by" in message


def test_a_plot_replaces_no_adapter(lora: Path, tmp_path: Path) -> None:
    before = lora.read_bytes()
    assert "must not be an input" in refused("inspect", lora, "--plot", lora, "--force")
    (tmp_path / "norms.png").write_text("mine")
    assert "--force replaces it" in refused("inspect", lora, "--plot", tmp_path / "norms.png")
    assert (tmp_path / "norms.png").read_text() == "mine"
    assert lora.read_bytes() == before


def test_a_checkpoint_is_no_adapter_and_the_other_way_round(
    base: Path, lora: Path, tmp_path: Path
) -> None:
    run("convert", lora, tmp_path / "peft", "--to", "peft")
    message = refused("plan", tmp_path / "peft", "--preset", "lora")
    assert "must be a checkpoint: it is an adapter of PEFT" in message
    for other in (base, tmp_path / "nothing"):
        assert "no adapter at" in refused("merge", base, other, "-o", tmp_path / "x")


def test_a_field_is_set_once_and_a_name_may_have_numbers(base: Path) -> None:
    options = ("plan", base, "--preset", "lora")
    for more in (("--rank", 2), ("--set", "rank=2")):
        assert "must give a field once" in refused(*options, "--set", "rank=3", *more)
    found = said(*options, "--targets", "0.attention.self.query")
    assert list(found["weights"]) == ["bert.encoder.layer.0.attention.self.query"]
    found = said(*options, "--targets", r".*[02].*query")
    assert len(found["weights"]) == 2


def test_diff_of_adapters_on_their_base(base: Path, lora: Path, tmp_path: Path) -> None:
    run("convert", lora, tmp_path / "flat", "--to", "kohya")
    assert len(said("diff", lora, tmp_path / "flat", code=1)) == 12  # names with underscores
    assert said("diff", lora, tmp_path / "flat", "--base", base) == []
    path = adapter(bert(), tmp_path / "a.safetensors", sl.lora_xs(rank=2), ["query"])
    assert "give --base" in refused("diff", path, path, code=2)
    assert said("diff", path, path, "--base", base) == []


# --- the page


@pytest.mark.parametrize("command", [own.__name__ for own in commands.COMMANDS])
def test_the_page_has_every_option(command: str) -> None:
    text = PAGE.read_text(encoding="utf-8")
    part = text.split(f"\n## `superlora {command}", 1)[1].split("\n## ", 1)[0]
    shown = run(command, "--help").stdout
    options = set(re.findall(r"--[a-z-]+", shown)) - {"--help"}
    common = {"--json", "--force", "--output"}
    assert {own for own in options - common if f"`{own}" not in part} == set()
    assert set(re.findall(r"`(--[a-z-]+)", part)) <= options
    for own in common & options:
        assert f"`{own}`" in text.split("\n## ", 1)[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("100k", (100_000, "parameters")),
        ("1.5M", (1_500_000, "parameters")),
        ("400kB", (400_000, "bytes")),
        ("2GB", (2_000_000_000, "bytes")),
        ("77", (77, "parameters")),
    ],
)
def test_budgets(text: str, expected: tuple[int, str]) -> None:
    assert commands.parse_budget(text) == expected


@pytest.mark.parametrize("text", ["", "k", "B", "-1k", "nan", "infM", "1kk", "0"])
def test_no_budgets(text: str) -> None:
    with pytest.raises(ValueError, match="--budget must be a number such as"):
        commands.parse_budget(text)
