"""Files that LyCORIS wrote, and files for LyCORIS to load."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import superlora as sl
import superlora.torch as slt
from tests.interop.models import (
    assert_outputs,
    attach_random,
    load_with_lycoris,
    make_model,
    make_x,
    save_with_lycoris,
)

ALGORITHMS = {
    "lora": {"network_module": "locon", "lora_dim": 3, "alpha": 7},
    "lora-rs": {"network_module": "locon", "lora_dim": 3, "alpha": 7, "rs_lora": True},
    "lora-rank-above-widths": {"network_module": "locon", "lora_dim": 20, "alpha": 7},
    "loha": {"network_module": "loha", "lora_dim": 2, "alpha": 5},
    "lokr": {"network_module": "lokr", "lora_dim": 1, "alpha": 5},
    "lokr-both": {"network_module": "lokr", "lora_dim": 1, "alpha": 5, "decompose_both": True},
    "lokr-factor": {"network_module": "lokr", "lora_dim": 2, "alpha": 5, "factor": 2},
    "lokr-unbalanced": {
        "network_module": "lokr",
        "lora_dim": 1,
        "alpha": 5,
        "factor": 2,
        "unbalanced_factorization": True,
    },
    "lokr-full-matrix": {"network_module": "lokr", "lora_dim": 2, "alpha": 5, "full_matrix": True},
    "full": {"network_module": "full"},
}
every_algorithm = pytest.mark.parametrize("options", ALGORITHMS.values(), ids=ALGORITHMS)


@every_algorithm
def test_lycoris_adapter_gives_its_outputs_here(options, tmp_path):
    path = tmp_path / "theirs.safetensors"
    expected = save_with_lycoris(path, **options)
    model = make_model()
    base = model(make_x())
    adapter = slt.from_lycoris(model, path)
    assert_outputs(model(make_x()), expected)
    adapter.merge()
    assert_outputs(model(make_x()), expected)
    adapter.unmerge()
    adapter.detach()
    assert torch.equal(model(make_x()), base)


@every_algorithm
def test_what_came_from_lycoris_goes_back_exactly(options, tmp_path):
    expected = save_with_lycoris(tmp_path / "in.safetensors", **options)
    adapter = slt.from_lycoris(make_model(), tmp_path / "in.safetensors")
    if adapter.replaced is not None:
        with pytest.raises(sl.AdapterError, match="replaced parameters of the model"):
            adapter.to_lycoris(tmp_path / "out.safetensors")
        return
    export = adapter.to_lycoris(tmp_path / "out.safetensors")
    assert set(export.errors.values()) == {0.0}
    assert_outputs(load_with_lycoris(tmp_path / "out.safetensors")(make_x()), expected)
    if options.get("unbalanced_factorization"):
        # LyCORIS guesses these sizes wrongly, also those of its own file: it is written as LoRA.
        with pytest.raises(RuntimeError, match="must match"):
            load_with_lycoris(tmp_path / "in.safetensors")
        return
    before, after = (load_file(tmp_path / f"{name}.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys()
    for key in before:
        method = options["network_module"]
        if method in ("locon", "full") or not key.endswith(("alpha", "_w1", "_w1_a")):
            assert torch.allclose(before[key], after[key], rtol=1e-6)
        elif key.endswith("alpha"):  # that of a scale of 1, which is in the first factor
            rank = 1 if options.get("full_matrix") else options["lora_dim"]
            assert float(after[key]) == rank


SPECS = {
    "lora": (sl.lora(3, alpha=7), "lora"),
    "dense": (sl.dense(scale=0.7), "full"),
    "lokr": (sl.lokr(1, scale=0.7), "lokr"),
    "lokr-both": (sl.lokr(1, decompose_both=True, scale=0.7), "lokr"),
    "lokr-factor": (sl.lokr(2, factor=2, scale=0.7), "lokr"),
    "krona": (sl.krona(scale=0.7), "lokr"),
    "loha": (sl.loha(2, alpha=5), "loha"),
    "vera": (sl.vera(3, scale=0.7), "lora"),
    "lora_xs": (sl.lora_xs(3, scale=0.7), "lora"),
    "lorta-aligned": (sl.lorta(2, fold="aligned", scale=0.7), "lora"),
}


@pytest.mark.parametrize(("spec", "method"), SPECS.values(), ids=SPECS)
def test_own_adapter_gives_its_outputs_in_lycoris(spec, method, tmp_path):
    path = tmp_path / "ours.safetensors"
    model, adapter = attach_random(spec)
    export = adapter.to_lycoris(path)
    assert set(export.errors.values()) == {0.0}
    assert set(export.methods.values()) == {method}
    assert_outputs(load_with_lycoris(path)(make_x()), model(make_x()))
    again = make_model()
    slt.from_lycoris(again, path)
    assert_outputs(again(make_x()), model(make_x()))


def test_methods_may_be_mixed(tmp_path):
    path = tmp_path / "mixed.safetensors"
    spec = sl.lora(
        2,
        alpha=3,
        overrides={
            "blocks.0.v": {"splits": 2, "combine": "hadamard"},
            "blocks.1.q": {"splits": 2, "rank": ("full", 1)},
            "blocks.1.v": {"order": 1, "rank": "full", "scale": -0.5},
        },
    )
    model, adapter = attach_random(spec)
    export = adapter.to_lycoris(path)
    assert list(export.methods.values()) == ["lora", "loha", "lokr", "full"]
    assert_outputs(load_with_lycoris(path)(make_x()), model(make_x()))
    again = make_model()
    back = slt.from_lycoris(again, path)
    assert back.num_parameters == adapter.num_parameters
    assert_outputs(again(make_x()), model(make_x()))


def test_another_prefix(tmp_path):
    path = tmp_path / "theirs.safetensors"
    expected = save_with_lycoris(path, **ALGORITHMS["lokr"])
    renamed = {f"strange{key.removeprefix('lycoris')}": t for key, t in load_file(path).items()}
    save_file(renamed, path)
    model = make_model()
    with pytest.raises(ValueError, match="no layer of the model"):
        slt.from_lycoris(model, path)
    slt.from_lycoris(model, path, prefix="strange")
    assert_outputs(model(make_x()), expected)


def test_lycoris_contradicts_itself():
    """Its merge multiplies by the scale twice; if this fails, the documentation is outdated."""
    locon = pytest.importorskip("lycoris.modules.lokr")
    layer = torch.nn.Linear(24, 16)
    module = locon.LokrModule("x", layer, lora_dim=1, alpha=5)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    x = make_x()
    with torch.no_grad():
        trained = module(x) - layer(x)
        merged = x @ module.get_diff_weight(shape=module.shape)[0].t()
    assert_outputs(merged, 5 * trained, 1e-5)


def test_layers_that_lycoris_lacks_are_refused(tmp_path):
    _, adapter = attach_random(sl.lora(2), ["q", "c"])
    with pytest.raises(ValueError, match=r"linear to be written for LyCORIS: got blocks\.0\.c"):
        adapter.to_lycoris(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
