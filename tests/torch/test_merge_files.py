"""`merge_files`: bit for bit what load, merge and save_pretrained give, and nothing by halves."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import superlora as sl
import superlora.torch as slt
from superlora.torch.on_disk import merge, merge_files, writing

pytest.importorskip("transformers")

from tests.torch.on_disk import assert_same, bert, gpt2, llama, places, randomise, saved, tensors_in

GLORA = sl.glora(rank=2)
CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "LoRA": (bert, sl.lora(rank=2, alpha=3), {"targets": "all-linear"}),
    "over layers": (bert, sl.lotr(rank=2), {"targets": ["query", "value"]}),
    "LoKr": (bert, sl.lokr(rank=2), {"targets": "all-linear"}),
    "a map": (bert, sl.fourierft(5), {"targets": ["query"]}),
    "GLoRA": (bert, GLORA, {"targets": ["query", "output.dense"]}),
    "a head": (bert, sl.lora(rank=2), {"targets": ["query"], "also": ["classifier"]}),
    "embeddings": (bert, sl.lora(rank=2), {"targets": ["word_embeddings", "LayerNorm"]}),
    "some rows": (
        bert,
        sl.lora(rank=2),
        {"targets": {"query": {"upper": (0, 4), "lower": (9, 16)}}},
    ),
    "transposed": (gpt2, sl.lora(rank=2), {"targets": ["c_attn", "c_proj", "c_fc"]}),
    "transposed GLoRA": (gpt2, GLORA, {"targets": ["attn.c_proj"]}),
    "tied": (gpt2, sl.lora(rank=2), {"targets": ["wte"], "tied": "once"}),
    "gains biases": (llama, GLORA, {"targets": ["q_proj", "v_proj"]}),
    "Hadamard": (llama, sl.loha(rank=2), {"targets": ["q_proj", "v_proj"]}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_bits_are_those_of_load_and_merge(case, dtype, tmp_path):
    make, spec, options = CASES[case]
    model = make().to(dtype)
    base = saved(model, tmp_path / "base", "6KB")
    adapter = randomise(slt.attach(model, spec, **options))
    adapter.save(tmp_path / "adapter.safetensors")
    adapter.detach()
    adapter = slt.load(model, tmp_path / "adapter.safetensors")
    adapter.merge(bias="ignore")
    adapter.detach(keep_merged=True)
    expected = saved(model, tmp_path / "expected")
    merge_files(base, tmp_path / "adapter.safetensors", tmp_path / "merged")
    assert_same(expected, tmp_path / "merged")
    before, after = places(base), places(tmp_path / "merged")
    assert len(set(before.values())) > 2
    assert {name: after[name] for name in before} == before
    changed, own = tensors_in(tmp_path / "merged"), tensors_in(base)
    assert any(not torch.equal(own[name], changed[name]) for name in own)


def test_the_folder_is_kept(tmp_path):
    base = saved(bert(), tmp_path / "base", "6KB")
    (base / "tokenizer.json").write_text("{}")
    (base / "pytorch_model.bin").write_text("the old weights")
    (base / "part").mkdir()
    (base / "part" / "config.json").write_text("[1]")
    adapter(base, tmp_path)
    merge_files(base, tmp_path / "adapter.safetensors", tmp_path / "merged", dtype="bfloat16")
    merged = tmp_path / "merged"
    files = {str(path.relative_to(base)) for path in base.rglob("*") if path.is_file()}
    found = {str(path.relative_to(merged)) for path in merged.rglob("*") if path.is_file()}
    assert found == files - {"pytorch_model.bin"}
    assert (merged / "part" / "config.json").read_text() == "[1]"
    assert json.loads((merged / "config.json").read_text())["dtype"] == "bfloat16"
    assert {own.dtype for own in tensors_in(merged).values()} == {torch.bfloat16}
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(own.nbytes for own in tensors_in(merged).values())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_order_and_the_metadata_of_a_file_are_kept(tmp_path):
    model = bert()
    base = saved(model, tmp_path / "base") / "model.safetensors"
    adapter(model, tmp_path)
    merge_files(base, tmp_path / "adapter.safetensors", tmp_path / "merged.safetensors")
    headers = []
    for path in (base, tmp_path / "merged.safetensors"):
        with safe_open(path, "pt") as file:
            headers.append((file.metadata(), list(file.offset_keys())))
    assert headers[0] == headers[1]


def adapter(base: Any, folder: Path, spec: Any = None, **options: Any) -> Path:
    """Save an adapter of a model, or of a small BERT."""
    model = bert() if isinstance(base, Path) else base
    options = {"targets": ["query"], **options}
    own = randomise(slt.attach(model, spec or sl.lora(rank=2), **options))
    own.save(folder / "adapter.safetensors")
    own.detach()
    return folder / "adapter.safetensors"


@pytest.mark.parametrize("outer", [True, False])
def test_names_with_and_without_the_prefix_of_a_head_model(outer, tmp_path):
    """An adapter of the model in a head model, and the other way round."""
    model = bert()
    whole, inner = model, model.bert
    base = saved(whole if outer else inner, tmp_path / "base")
    file = adapter(inner if outer else whole, tmp_path)
    merge_files(base, file, tmp_path / "merged")
    slt.load(inner if outer else whole, file).merge()
    expected, found = tensors_in(base), tensors_in(tmp_path / "merged")
    own = (whole if outer else inner).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], own[name]) for name in found)


def test_names_that_fit_twice_or_not_at_all_are_refused(tmp_path):
    file = adapter(torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4)}), tmp_path, targets=["q"])
    weight = torch.ones(4, 4)
    for names, message in (
        (("a.q.weight", "b.q.weight"), "in one way: 'q' can be 'a.q', 'b.q'"),
        (("a.k.weight",), "it lacks 'q'"),
    ):
        save_file({name: weight.clone() for name in names}, tmp_path / "base.safetensors")
        with pytest.raises(ValueError, match=message):
            merge_files(tmp_path / "base.safetensors", file, tmp_path / "out.safetensors")
    save_file({"q.weight": torch.ones(4, 5)}, tmp_path / "base.safetensors")
    with pytest.raises(ValueError, match=r"'q' has shape \(4, 5\) instead of \(4, 4\)"):
        merge_files(tmp_path / "base.safetensors", file, tmp_path / "out.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter.safetensors",
        "base.safetensors",
    ]


def without_transposed(file: Path) -> None:
    """Let a file be one of an older release, which does not say how weights are stored."""
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["superlora"])
    del header["transposed"]
    save_file(load_file(file), file, {"superlora": json.dumps(header)})


def test_a_square_weight_that_nothing_says_how_it_is_stored_is_refused(tmp_path):
    model = gpt2()
    base = saved(model, tmp_path / "base")
    file = adapter(model, tmp_path, targets=["attn.c_proj"])
    slt.load(model, file).merge()
    expected = saved_merged(model, tmp_path / "expected")
    without_transposed(file)
    merge_files(base, file, tmp_path / "merged")  # the config says it
    assert_same(expected, tmp_path / "merged")
    (base / "config.json").unlink()
    with pytest.raises(
        ValueError, match=r"it is square, and neither the adapter nor a config\.json"
    ):
        merge_files(base, file, tmp_path / "again")


def test_a_detached_adapter_says_how_its_weights_are_stored(tmp_path):
    model = gpt2()
    file = adapter(model, tmp_path, targets=["attn.c_proj"])
    own = slt.load(model, file)
    own.detach()
    own.save(tmp_path / "detached.safetensors")
    assert file.read_bytes() == (tmp_path / "detached.safetensors").read_bytes()


def saved_merged(model: torch.nn.Module, folder: Path) -> Path:
    model.superlora.detach(keep_merged=True)
    return saved(model, folder)


def test_an_interrupted_merge_goes_on(tmp_path, monkeypatch):
    base = saved(bert(), tmp_path / "base", "6KB")
    file = adapter(base, tmp_path)
    merge_files(base, file, tmp_path / "expected")
    size, done = 0, 0
    parts = sorted(base.glob("*.safetensors"))

    def interrupt(count: int) -> None:
        nonlocal size
        size += count
        if size > 20_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_files(base, file, tmp_path / "merged", advance=interrupt)
    assert not (tmp_path / "merged").exists()
    left = tmp_path / ".merged.unfinished"
    done = {path.name: path.stat().st_ino for path in left.glob("*.safetensors")}
    assert 0 < len(done) < len(parts)
    assert not list(left.glob("*.part"))
    merge_files(base, file, tmp_path / "merged")
    assert_same(tmp_path / "expected", tmp_path / "merged")
    assert done == {name: (tmp_path / "merged" / name).stat().st_ino for name in done}
    assert not left.exists()


@pytest.mark.parametrize("other", ["adapter", "dtype", "base", "a cut shard"])
def test_what_another_merge_left_is_not_taken(other, tmp_path):
    base = saved(bert(), tmp_path / "base", "6KB")
    file = adapter(base, tmp_path)

    def stop(count: int) -> None:
        if len(list((tmp_path / ".merged.unfinished").glob("model-*.safetensors"))) > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_files(base, file, tmp_path / "merged", advance=stop)
    options = {"dtype": "bfloat16"} if other == "dtype" else {}
    if other == "adapter":
        adapter(base, tmp_path, sl.lora(rank=3))
    elif other == "base":
        for shard in base.glob("*.safetensors"):
            held = {name: own + 1 for name, own in load_file(shard).items()}
            save_file(held, shard, {"format": "pt"})
    elif other == "a cut shard":
        shard = next((tmp_path / ".merged.unfinished").glob("*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-4])
    merge_files(base, file, tmp_path / "merged", **options)
    merge_files(base, file, tmp_path / "expected", **options)
    assert_same(tmp_path / "expected", tmp_path / "merged")


def test_an_output_that_is_there_is_replaced_if_asked(tmp_path):
    base = saved(bert(), tmp_path / "base")
    file = adapter(base, tmp_path)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "note").write_text("mine")
    with pytest.raises(ValueError, match="output must not exist already"):
        merge_files(base, file, tmp_path / "merged")
    with pytest.raises(ValueError, match="with safetensors files, or empty, to be replaced"):
        merge_files(base, file, tmp_path / "merged", force=True)
    assert (tmp_path / "merged" / "note").exists()
    shutil.copy(base / "model.safetensors", tmp_path / "merged")
    (tmp_path / ".merged.before").mkdir()
    (tmp_path / ".merged.before" / "left").write_text("of a killed run")
    merge_files(base, file, tmp_path / "merged", force=True)
    assert not (tmp_path / "merged" / "note").exists()
    assert not (tmp_path / ".merged.before").exists()
    for output in (base, tmp_path, base / "merged", base / "model.safetensors"):
        with pytest.raises(ValueError, match="output must not be an input"):
            merge_files(base, file, output, force=True)
    assert tensors_in(base)
    os.mkfifo(tmp_path / "pipe")
    for source in (base, base / "model.safetensors"):
        with pytest.raises(ValueError, match="must be a file or a folder: got"):
            merge_files(source, file, tmp_path / "pipe", force=True)
    assert (tmp_path / "pipe").is_fifo()


def test_bad_input_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    base = saved(bert(), tmp_path / "base", "6KB")
    file = adapter(base, tmp_path)
    shards = sorted(base.glob("*.safetensors"))

    def refused(match: str, error: type[Exception] = ValueError, **options: Any) -> None:
        before = sorted(tmp_path.iterdir())
        with pytest.raises(error, match=match):
            merge_files(base, file, tmp_path / "out", **options)
        assert sorted(tmp_path.iterdir()) == before

    refused("dtype must be one of", dtype="int8")
    bits = shards[0].read_bytes()
    shards[0].write_bytes(bits[:-3])
    refused("must be a whole safetensors file")
    shards[0].unlink()
    refused("which is a part of", FileNotFoundError)
    shards[0].write_bytes(bits)
    index = base / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {**said["weight_map"], "no": "../else"}}))
    refused("must have a weight_map of names to file names")
    index.write_text(json.dumps({"weight_map": {**said["weight_map"], "no": shards[0].name}}))
    refused("contradicts the files for 'no'")
    index.write_text(json.dumps(said))
    config = json.loads((base / "config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (base / "config.json").write_text(json.dumps(quantised))
    refused("it is quantised by bitsandbytes")
    (base / "config.json").write_text(json.dumps(config))
    factors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    first = next(iter(factors))
    save_file({**factors, first: factors[first] * torch.nan}, file, metadata)
    refused("must hold finite numbers")
    save_file({name: 1e30 * own for name, own in factors.items()}, file, metadata)
    with pytest.raises(ValueError, match="must be finite to be merged"):
        merge_files(base, file, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save_file(factors, file, metadata)
    shutil.rmtree(tmp_path / ".out.unfinished")
    monkeypatch.setattr(
        writing.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 9, 0)
    )
    with pytest.raises(OSError, match="bytes free: it has 0"):
        merge_files(base, file, tmp_path / "out")


def test_codes_are_no_weights(tmp_path):
    file = adapter(torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4)}), tmp_path, targets=["q"])
    codes = {"q.weight": torch.zeros(4, 4, dtype=torch.int8), "q.SCB": torch.ones(4)}
    save_file(codes, tmp_path / "base.safetensors")
    with pytest.raises(ValueError, match=r"it is quantised, 'q.(SCB|weight)'"):
        merge_files(tmp_path / "base.safetensors", file, tmp_path / "out.safetensors")


def test_a_copy_of_a_tied_weight_in_the_file_is_merged_too(tmp_path):
    model = gpt2()
    file = adapter(model, tmp_path, targets=["wte"], tied="once")
    held = dict(model.state_dict())
    held["lm_head.weight"] = held["lm_head.weight"].clone()
    (tmp_path / "base").mkdir()
    save_file(held, tmp_path / "base" / "model.safetensors")
    merge_files(tmp_path / "base", file, tmp_path / "merged")
    found = tensors_in(tmp_path / "merged")
    assert torch.equal(found["lm_head.weight"], found["transformer.wte.weight"])
    assert not torch.equal(found["lm_head.weight"], held["lm_head.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("rank", "rows"), [(1, 1000), (8, 1001), (8, 1022), (33, 1027), (33, 1085), (2, 70)]
)
def test_rows_made_in_parts_have_the_same_bits(rank, rows, dtype, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"q": torch.nn.Linear(300, rows, bias=False)}).to(dtype)
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    file = adapter(model, tmp_path, sl.lora(rank=rank, alpha=3), targets=["q"])
    slt.load(model, file).merge()
    monkeypatch.setattr(merge, "_CHUNK", 1 << 14)
    monkeypatch.setattr(merge, "_PART", 1 << 16)
    merge_files(tmp_path / "base.safetensors", file, tmp_path / "out.safetensors")
    assert torch.equal(load_file(tmp_path / "out.safetensors")["q.weight"], model["q"].weight)


def test_rounding_is_done_once(tmp_path):
    """A float32 base is not rounded to bfloat16 before the update is added."""
    model = torch.nn.ModuleDict({"q": torch.nn.Linear(64, 64, bias=False)})
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    file = adapter(model, tmp_path, targets=["q"])
    slt.load(model, file).merge()
    merge_files(tmp_path / "base.safetensors", file, tmp_path / "out.safetensors", dtype="bfloat16")
    expected = model["q"].weight.detach().bfloat16()
    assert torch.equal(load_file(tmp_path / "out.safetensors")["q.weight"], expected)


def test_what_is_said_before_work_begins(tmp_path):
    base = saved(llama(), tmp_path / "base")
    file = adapter(llama(), tmp_path, GLORA, targets=["q_proj"])
    said = []
    counted = []

    def started(merge: Any) -> None:
        assert not (tmp_path / "merged").exists()
        said.append(merge)

    merge_files(base, file, tmp_path / "merged", started=started, advance=counted.append)
    (merge,) = said
    assert len(merge.weights) == len(merge.gained) == 3
    assert merge.nbytes == sum(own.nbytes for own in tensors_in(tmp_path / "merged").values())
    assert sum(counted) == merge.nbytes
