"""Checkpoints that are wrong: refused with a list, and nothing attached."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import superlora.torch as slt
from tests.interop.models import make_model, peft, quiet, save_with_lycoris, save_with_peft
from tests.torch.helpers import unchanged

pytestmark = quiet

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASE = "base_model.model.blocks.0.q."


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders that PEFT wrote, by method."""
    folder = tmp_path_factory.mktemp("peft")
    targets = ["q", "v"]
    configs = {
        "LORA": peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["head"]),
        "LOKR": peft.LoKrConfig(r=1, target_modules=targets),
        "LOHA": peft.LoHaConfig(r=2, target_modules=targets),
        "VERA": peft.VeraConfig(r=2, target_modules=targets),
    }
    for method, config in configs.items():
        save_with_peft(config, folder / method)
    return folder


@pytest.fixture
def copy_of(saved, tmp_path):
    def copy(method, tensors=None, config=None, drop=()):
        folder = shutil.copytree(saved / method, tmp_path / method)
        held = {k: t for k, t in load_file(folder / WEIGHTS).items() if k not in drop}
        save_file({**held, **(tensors or {})}, folder / WEIGHTS)
        written = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**written, **(config or {})}))
        return folder

    return copy


def assert_refused(folder, message, error=ValueError, model=None):
    model = make_model() if model is None else model
    with unchanged(model), pytest.raises(error, match=message) as caught:
        slt.from_peft(model, folder)
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize(
    ("method", "tensors", "message"),
    [
        ("LORA", {BASE + "lora_A.weight": torch.zeros(3, 24)}, r"must have one rank: got \[2, 3\]"),
        (
            "LORA",
            {
                BASE + "lora_A.weight": torch.zeros(3, 24),
                BASE + "lora_B.weight": torch.zeros(16, 3),
            },
            "must have rank 2, as the config says: got 3",
        ),
        ("LORA", {BASE + "lora_A.weight": torch.zeros(2, 25)}, r"shape \(16, 24\) instead of"),
        ("LORA", {BASE + "lora_A.weight": torch.zeros(2, 24, 1)}, "must have matrices: got lora_A"),
        ("LORA", {BASE + "lora_magnitude_vector": torch.zeros(16)}, "extra .*magnitude"),
        ("LORA", {"base_model.model.down.lora_A.weight": torch.zeros(2, 36)}, "none of the forms"),
        ("LORA", {"base_model.model.norm.weight": torch.zeros(36)}, r"extra .*norm\.weight"),
        ("LORA", {"base_model.model.head.weight": torch.zeros(3, 35)}, r"'head\.weight' has shape"),
        ("LORA", {"base_model.model.head.extra": torch.zeros(3)}, r"no parameter 'head\.extra'"),
        ("LORA", {"other": torch.zeros(3)}, "extra 'other'"),
        ("LORA", {BASE + "lora_A.weight": torch.zeros(2, 24, dtype=torch.int32)}, "dtype I32"),
        ("LOKR", {BASE + "lokr_t2": torch.zeros(1, 1)}, "extra .*lokr_t2"),
        ("LOKR", {BASE + "lokr_w1_a": torch.zeros(4, 1)}, "none of the forms of its method"),
        ("LOKR", {BASE + "lokr_w1": torch.zeros(3, 4)}, r"shape \(16, 24\) instead of \(12, 24\)"),
        ("LOKR", {BASE + "lokr_w2_b": torch.zeros(2, 6)}, r"must have one rank: got \[1, 2\]"),
        ("LOHA", {BASE + "hada_w2_a": torch.zeros(15, 2)}, "must have two products of one shape"),
        ("VERA", {"base_model.vera_A": torch.zeros(3, 24)}, "must have one rank"),
        ("VERA", {"base_model.vera_A": torch.zeros(2, 20)}, "must"),
        ("VERA", {"base_model.vera_A": torch.zeros(24)}, "must have rank 2"),
        ("VERA", {BASE + "vera_lambda_d": torch.zeros(3)}, "must have rank 2"),
    ],
)
def test_tensors_that_do_not_fit(copy_of, method, tensors, message):
    assert_refused(copy_of(method, tensors), message)


@pytest.mark.parametrize(
    ("method", "key", "message"),
    [
        ("LORA", BASE + "lora_A.weight", r"has \['lora_B.weight'\], none of the forms"),
        ("LOKR", BASE + "lokr_w1", "none of the forms"),
        ("VERA", "base_model.vera_A", "missing 'base_model.vera_A'"),
    ],
)
def test_missing_tensors(copy_of, method, key, message):
    assert_refused(copy_of(method, drop=(key,)), message)


def test_missing_layers_are_all_listed(copy_of):
    keys = [f"base_model.model.blocks.1.{p}.lora_{m}.weight" for p in "qv" for m in "AB"]
    assert_refused(copy_of("LORA", drop=keys), r"'blocks\.1\.q'.*'blocks\.1\.v'")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "OFT"}, "must be of peft_type LORA, LOHA, LOKR, VERA: got 'OFT'"),
        ({"peft_type": None}, "got None"),
        ({"peft_type": ["LORA"]}, "must be of peft_type"),
        ({"use_dora": True}, "no option beyond plain LORA: got use_dora=True"),
        ({"init_lora_weights": "pissa_niter_4"}, "relative to other base weights"),
        ({"target_modules": ["q"]}, "'blocks.0.v' is no target of the config"),
        ({"target_modules": ["q", "v", "down"]}, "missing the tensors of 'down'"),
        ({"target_modules": "blocks.*q"}, "'blocks.0.v' is no target"),
        ({"target_modules": "("}, "target_modules='\\('"),
        ({"target_modules": None}, "target_modules=None"),
        ({"r": 3}, "must have rank 3, as the config says: got 2"),
        ({"r": 0}, "r=0"),
        ({"r": True}, "r=True"),
        ({"r": "2"}, "r='2'"),
        ({"lora_alpha": None}, "lora_alpha=None"),
        ({"lora_alpha": 1e999}, "numbers must be finite: got Infinity"),
        ({"rank_pattern": {"q": "x"}}, "rank_pattern="),
        ({"rank_pattern": {"(": 2}}, "rank_pattern '\\('"),
        ({"rank_pattern": [2]}, "rank_pattern="),
        ({"rank_pattern": 2}, "rank_pattern=2"),
        ({"rank_pattern": {"q": 5}}, "must have rank 5"),
        ({"modules_to_save": None}, r"extra .*head\.bias"),
        ({"modules_to_save": 3}, "modules_to_save=3"),
        ({"modules_to_save": ["("]}, "modules_to_save="),
        ({"exclude_modules": 3}, "exclude_modules=3"),
        ({"exclude_modules": "("}, "exclude_modules='\\('"),
        ({"layers_to_transform": "x"}, "layers_to_transform='x'"),
        ({"layers_to_transform": [True]}, "layers_to_transform="),
        ({"layers_to_transform": [0], "layers_pattern": "("}, "layers_pattern='\\('"),
        ({"layers_to_transform": [0], "layers_pattern": 5}, "layers_pattern=5"),
        ({"bias": 3}, "bias=3"),
    ],
)
def test_config_that_contradicts_the_tensors(copy_of, config, message):
    assert_refused(copy_of("LORA", config=config), message)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"r": 2}', "[" * 100_000])
def test_unreadable_config(copy_of, text):
    folder = copy_of("LORA")
    (folder / CONFIG).write_text(text)
    assert_refused(folder, "must (be|have at most)")


def test_config_of_other_bytes(copy_of):
    folder = copy_of("LORA")
    (folder / CONFIG).write_bytes(b"\xff\xfe\x00")
    assert_refused(folder, "must be")


def test_missing_files(copy_of, tmp_path):
    assert_refused(tmp_path / "nowhere", "no adapter_config", FileNotFoundError)
    folder = copy_of("LORA")
    (folder / WEIGHTS).unlink()
    assert_refused(folder, "no adapter file", FileNotFoundError)


class Evil:
    """Whose unpickling leaves a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter.pt", "adapter.ckpt"])
def test_pickles_are_never_opened(copy_of, tmp_path, name):
    trace = tmp_path / "trace"
    folder = copy_of("LORA")
    (folder / WEIGHTS).unlink()
    torch.save({"x": Evil(trace)}, folder / name)
    model = make_model()
    message = r"may run any code when it is read; .* safetensors\.torch\.save_file"
    with unchanged(model):
        if name == "adapter_model.bin":
            with pytest.raises(ValueError, match=message):
                slt.from_peft(model, folder)
        else:
            with pytest.raises(ValueError, match=message):
                slt.from_lycoris(model, folder / name)
            with pytest.raises(ValueError, match=message):
                slt.load(model, folder / name)
    assert not trace.exists()


def test_truncated_file(copy_of):
    folder = copy_of("LORA")
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    assert_refused(folder, "must be a whole safetensors file")


def test_layers_absent_from_the_model_are_listed(copy_of):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    assert_refused(copy_of("LORA"), r"'blocks\.0\.q'", model=model)


def test_taken_name(copy_of):
    model = make_model()
    model.superlora = torch.nn.Identity()
    with unchanged(model), pytest.raises(RuntimeError, match="name must be free"):
        slt.from_peft(model, copy_of("LORA"))


def test_model_without_memory(copy_of):
    model = make_model().to("meta")
    assert_refused(copy_of("LORA"), "meta device", RuntimeError, model)


@pytest.fixture(scope="module")
def lycoris_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("lycoris") / "a.safetensors"
    save_with_lycoris(path, network_module="lokr", lora_dim=1, alpha=5)
    return path


Q = "lycoris_blocks_0_q."


@pytest.mark.parametrize(
    ("tensors", "drop", "message"),
    [
        ({"lycoris_nowhere.lokr_w1": torch.zeros(2, 2)}, (), "'lycoris_nowhere' is .*no layer"),
        ({"other": torch.zeros(2, 2)}, (), "'other' is"),
        ({Q + "oft_blocks": torch.zeros(2, 2)}, (), "no form of lora, loha, lokr, full"),
        ({Q + "dora_scale": torch.zeros(2, 2)}, (), "dora_scale.* no form of"),
        ({}, (Q + "lokr_w1",), "no form of"),
        ({Q + "alpha": torch.zeros(2)}, (), "one finite number alpha"),
        ({Q + "alpha": torch.tensor(float("nan"))}, (), r"must hold finite numbers.*q\.alpha"),
        ({Q + "lokr_w1": torch.zeros(4, 5)}, (), r"has shape \(16, 24\) instead of \(16, 30\)"),
        ({Q + "lokr_w2_a": torch.zeros(4, 1, 3, 3)}, (), "must have matrices"),
        ({Q + "lokr_w2_a": torch.zeros(4, 3)}, (), "must have one rank"),
    ],
)
def test_lycoris_files_that_do_not_fit(lycoris_file, tmp_path, tensors, drop, message):
    path = tmp_path / "a.safetensors"
    held = {key: t for key, t in load_file(lycoris_file).items() if key not in drop}
    save_file({**held, **tensors}, path)
    model = make_model()
    with unchanged(model), pytest.raises(ValueError, match=message):
        slt.from_lycoris(model, path)


def test_lycoris_names_that_two_layers_have(lycoris_file):
    model = make_model()
    model.add_module("blocks_0_q", torch.nn.Linear(24, 16))
    with unchanged(model), pytest.raises(ValueError, match=r"\['blocks\.0\.q', 'blocks_0_q'\]"):
        slt.from_lycoris(model, lycoris_file)


def test_empty_lycoris_file(tmp_path):
    save_file({}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="no tensor"):
        slt.from_lycoris(make_model(), tmp_path / "a.safetensors")
