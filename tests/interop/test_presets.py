"""Every preset, exported: what the peers compute is what the adapter computes."""

from __future__ import annotations

import pytest
import torch

import superlora as sl
from tests.interop.models import (
    assert_outputs,
    attach_random,
    load_with_lycoris,
    load_with_peft,
    make_model,
    make_x,
    quiet,
)

pytestmark = quiet

# With and without bias, of unequal shapes; stacks take one shape.
SPECS = {
    "c3a": sl.c3a(4, scale=7.0),
    "cdka": sl.cdka(2, 4, 2, alpha=5),
    "dense": sl.dense(scale=0.7),
    "did": sl.did(7, scale=0.7),
    "fact_tk": sl.fact_tk(2, scale=0.7),
    "fact_tt": sl.fact_tt(2, scale=0.7),
    "fourierft": sl.fourierft(7),
    "gralora": sl.gralora(4, 2, alpha=5),
    "krona": sl.krona(scale=0.7),
    "loha": sl.loha(2, alpha=5),
    "lokr": sl.lokr(1, scale=0.7),
    "lonkr": sl.lonkr(1, splits=2, scale=0.7),
    "lora": sl.lora(3, alpha=5),
    "lora_fa": sl.lora_fa(3, alpha=5),
    "lora_xs": sl.lora_xs(3, scale=0.7),
    "lorta": sl.lorta(2, scale=0.7),
    "lorta_cp": sl.lorta_cp(3, fold=(2, 1, 4, 4, 24), scale=0.7),
    "lotr": sl.lotr(2, scale=0.7),
    "metatt": sl.metatt(2, scale=0.7),
    "miss": sl.miss(4, scale=0.7),
    "monarch": sl.monarch(2, scale=0.7),
    "nola": sl.nola(5, 3, scale=0.7),
    "said": sl.said(7, scale=0.7),
    "share_lora": sl.share_lora(3, alpha=5),
    "tenslora": sl.tenslora((1, 1, 2, 3), fold=(1, 2, 16, 24), scale=0.7),
    "tied_lora": sl.tied_lora(3, scale=0.7),
    "tinylora": sl.tinylora(2, 5, scale=0.7),
    "tt_lora": sl.tt_lora(2, scale=0.7),
    "unilora": sl.unilora(7, 3, scale=0.7),
    "vera": sl.vera(3, scale=0.7),
    "waveft": sl.waveft(7),
}
TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 4e-2}

every_preset = pytest.mark.parametrize("key", SPECS)
every_base = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def test_every_preset_is_here():
    """But those of several merge operations, which other libraries cannot hold."""
    made = {name for name in sl.presets.__all__ if not hasattr(sl.presets.operations, name)}
    assert set(SPECS) == made | {"dense", "lora"}  # which those use


def targets_of(layer: str) -> list[str]:
    return [f"blocks.{block}.{layer}" for block in (0, 1)]


@every_preset
@every_base
@pytest.mark.parametrize("layer", ["q", "v"], ids=["bias", "no-bias"])
def test_exported_to_peft(key, dtype, layer, tmp_path):
    spec = SPECS[key]
    if key == "lorta_cp" and layer == "v":
        spec = spec.replace(fold=(2, 1, 4, 3, 24))
    if key == "tenslora" and layer == "v":
        spec = spec.replace(fold=(1, 2, 12, 24))
    model, adapter = attach_random(spec, targets_of(layer), dtype=dtype)
    adapter.to_peft(tmp_path, rank=16)
    theirs = load_with_peft(tmp_path, make_model(dtype=dtype))
    expected = model(make_x(dtype=dtype)).float()
    assert_outputs(theirs(make_x(dtype=dtype)).float(), expected, TOLERANCES[dtype])
    merged = theirs.merge_and_unload()(make_x(dtype=dtype)).float()
    assert_outputs(merged, expected, TOLERANCES[dtype])


@every_preset
@every_base
def test_exported_to_lycoris(key, dtype, tmp_path):
    path = tmp_path / "a.safetensors"
    model, adapter = attach_random(SPECS[key], targets_of("q"), dtype=dtype)
    adapter.to_lycoris(path, rank=16)
    theirs = load_with_lycoris(path, make_model(dtype=dtype))
    expected = model(make_x(dtype=dtype)).float()
    assert_outputs(theirs(make_x(dtype=dtype)).float(), expected, TOLERANCES[dtype])
