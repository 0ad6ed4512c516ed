"""Mutated folders of PEFT and files of LyCORIS: refused in words, or read right."""

from __future__ import annotations

import random
import shutil

import pytest

import superlora.torch as slt
from tests.interop.models import (
    make_model,
    make_x,
    peft,
    quiet,
    save_with_lycoris,
    save_with_peft,
)
from tests.mutations import mutate_file, mutate_json
from tests.torch.test_mutated_files import check

pytestmark = quiet

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CONFIGS = {
    "lora": peft.LoraConfig(
        r=2, target_modules=["q", "v"], modules_to_save=["head"], rank_pattern={"q": 3}
    ),
    "lora-pattern": peft.LoraConfig(
        r=2, target_modules=r".*\.(q|v)", alpha_pattern={r"blocks\.0\..*": 5}
    ),
    "lokr": peft.LoKrConfig(r=1, target_modules=["q", "v"]),
    "vera": peft.VeraConfig(r=2, target_modules=["q", "v"]),
}
counts = pytest.mark.parametrize("count", [250, pytest.param(2500, marks=pytest.mark.slow)])


@counts
@pytest.mark.parametrize("kind", CONFIGS)
def test_folders(kind, count, tmp_path):
    save_with_peft(CONFIGS[kind], tmp_path / "saved")
    folder = shutil.copytree(tmp_path / "saved", tmp_path / "mutated")
    config, tensors = (folder / CONFIG).read_text(), (folder / WEIGHTS).read_bytes()
    model, x, loaded = make_model(), make_x(), 0
    for number in range(count):
        draw = random.Random(f"{kind} {number}")
        if draw.random() < 0.6:
            (folder / CONFIG).write_text(mutate_json(config, draw))
            (folder / WEIGHTS).write_bytes(tensors)
        else:
            (folder / CONFIG).write_text(config)
            (folder / WEIGHTS).write_bytes(mutate_file(tensors, draw))
        try:
            loaded += check(model, slt.from_peft, folder, x)
        except Exception as error:
            raise AssertionError(f"mutation {number} of {kind}: {error!r}") from error
    assert 0 < loaded < count


@counts
@pytest.mark.parametrize("method", ["locon", "lokr"])
def test_files(method, count, tmp_path):
    path = tmp_path / "a.safetensors"
    save_with_lycoris(path, network_module=method, lora_dim=1, alpha=5)
    content = path.read_bytes()
    model, x, loaded = make_model(), make_x(), 0
    for number in range(count):
        path.write_bytes(mutate_file(content, random.Random(f"{method} {number}")))
        try:
            loaded += check(model, slt.from_lycoris, path, x)
        except Exception as error:
            raise AssertionError(f"mutation {number} of {method}: {error!r}") from error
    assert 0 < loaded < count
