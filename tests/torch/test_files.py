"""Save and load: the same floats, every factor once, deterministic, atomic."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from torch import nn

import superlora as sl
import superlora.torch as slt
from superlora.torch.files import safetensors_file as files
from tests.pairs import in_turn
from tests.torch.helpers import (
    LAYERS,
    SPECS,
    assert_near,
    attach_filled,
    base_bits,
    bits,
    every_spec,
    fill,
    make_input,
    make_net,
    targets_of,
    unchanged,
)


@in_turn("key", SPECS, "layer", LAYERS)
def test_save_load_gives_the_same_floats(key, layer, tmp_path):
    path = tmp_path / "a.safetensors"
    model = make_net(layer)
    adapter = attach_filled(model, key)
    adapter.scale = 0.3
    with unchanged(model):
        adapter.save(path)
    other = make_net(layer)
    before = base_bits(other)
    twin = slt.load(other, str(path), name="other")
    assert other.other is twin
    assert base_bits(other) == before
    assert {name: bits(factor) for name, factor in twin.factors().items()} == {
        name: bits(factor) for name, factor in adapter.factors().items()
    }
    assert twin.scale == 0.3
    assert twin.plan.shapes == adapter.plan.shapes
    x = make_input()
    assert torch.equal(other(x), model(x))
    assert not any(tensor.requires_grad for tensor in other.head.parameters())
    assert all(factor.requires_grad for factor in twin.parameters())
    adapter.merge()
    twin.merge()
    assert torch.equal(other(x), model(x))


@every_spec
def test_file_holds_every_factor_once(key, tmp_path):
    path = tmp_path / "a.safetensors"
    model = make_net()
    adapter = attach_filled(model, key)
    adapter.save(path)
    names = sum(len(name) for name in adapter.plan.shapes) + sum(map(len, adapter.factors()))
    assert path.stat().st_size <= 4 * adapter.num_parameters + 4096 + names
    with safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == sorted(dict(adapter.named_parameters()))
        header = json.loads(file.metadata()["superlora"])
        assert set(file.metadata()) == {"superlora"}
    assert header["format_version"] == 1
    assert sl.Spec.from_dict(header["spec"]) == SPECS[key]
    assert header["weights"] == [[name, list(shape)] for name, shape in adapter.plan.shapes.items()]


def test_size_of_a_shared_adapter(tmp_path):
    """Peers write shared factors once a layer."""
    model = nn.ModuleList(
        nn.ModuleDict({"q": nn.Linear(768, 768), "v": nn.Linear(768, 768)}) for _ in range(2)
    )
    adapter = slt.attach(model, sl.lorta(rank=5))
    adapter.save(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_size < 4 * adapter.num_parameters + 2000


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_of_factors_is_kept(dtype, tmp_path):
    model = make_net()
    adapter = fill(slt.attach(model, sl.lora(2), ["q"], dtype=dtype))
    adapter.save(tmp_path / "a.safetensors")
    other = make_net()
    twin = slt.load(other, tmp_path / "a.safetensors")
    assert {factor.dtype for factor in twin.parameters()} == {dtype}
    assert torch.equal(other(make_input()), model(make_input()))


SCRIPT = """
import sys, torch, superlora as sl, superlora.torch as slt
from tests.torch.helpers import make_net, SPECS
for key in ("cut", "lokr", "fact_tk"):
    slt.attach(make_net(), SPECS[key], ["q", "v"], seed=3).save(f"{sys.argv[1]}-{key}")
"""


def test_bytes_are_the_same_in_every_process(tmp_path):
    """This one and one with another hash seed."""
    other = "1" if os.environ.get("PYTHONHASHSEED") == "0" else "0"
    subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "1")],
        env={**os.environ, "PYTHONHASHSEED": other, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    for key in ("cut", "lokr", "fact_tk"):
        adapter = slt.attach(make_net(), SPECS[key], ["q", "v"], seed=3)
        adapter.save(tmp_path / f"0-{key}")
    for key in ("cut", "lokr", "fact_tk"):
        found = [(tmp_path / f"{seed}-{key}").read_bytes() for seed in ("0", "1")]
        assert found[0] == found[1]
        assert len(found[0]) > 400


@pytest.mark.parametrize("fault", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("old", [b"the old file", None])
def test_failed_save_leaves_the_old_file(fault, old, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    if old is not None:
        path.write_bytes(old)
    adapter = attach_filled(make_net(), "lora")

    def half(tensors, filename, metadata=None):
        with open(filename, "wb") as file:
            file.write(b"half of it")
        raise fault("disk full")

    monkeypatch.setattr(files, "save_file", half)
    with pytest.raises(fault, match="disk full"):
        adapter.save(path)
    monkeypatch.undo()
    assert [item.name for item in tmp_path.iterdir()] == ([path.name] if old else [])
    assert old is None or path.read_bytes() == old
    adapter.save(path)
    slt.load(make_net(), path)
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_saved_file_has_the_usual_permissions(tmp_path):
    attach_filled(make_net(), "lora").save(tmp_path / "a.safetensors")
    (tmp_path / "plain").touch()
    modes = {item.stat().st_mode for item in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("where", ["missing/a.safetensors", ""])
def test_save_to_no_place_leaves_nothing_behind(where, tmp_path):
    adapter = attach_filled(make_net(), "lora")
    with pytest.raises(OSError, match=r"missing|director"):
        adapter.save(tmp_path / where)
    assert list(tmp_path.parent.glob("*.part")) == []
    assert list(tmp_path.iterdir()) == []


def test_meta_factors_are_not_saved(tmp_path):
    with torch.device("meta"):
        model = make_net()
    adapter = slt.attach(model, sl.lora(2))
    with pytest.raises((sl.AdapterError, NotImplementedError), match="meta"):
        adapter.save(tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


class Reversed(nn.Module):
    """The layers of a net under the same names, listed the other way round."""

    def __init__(self, net):
        super().__init__()
        self.head = net.head
        self.blocks = nn.Module()
        for name in ("1", "0"):
            block = nn.Module()
            for part in ("o", "v", "q"):
                block.add_module(part, getattr(net.blocks[int(name)], part))
            self.blocks.add_module(name, block)


@every_spec
def test_order_of_weights_is_the_file_s(key, tmp_path):
    """Positions in a shared tensor go by the order at attachment, not by the model's."""
    path = tmp_path / "a.safetensors"
    adapter = attach_filled(make_net(), key)
    adapter.save(path)
    other = Reversed(make_net())
    twin = slt.load(other, path)
    assert list(twin.plan.shapes) == list(adapter.plan.shapes)
    for name, delta in adapter.deltas().items():
        assert torch.equal(twin.delta(name), delta)
    x = make_input()
    assert torch.equal(other.blocks.get_submodule("1.q")(x), output_of_copy(adapter, x))


def output_of_copy(adapter, x):
    model = make_net()
    source = slt.attach(model, adapter.plan.spec, list(adapter.plan.shapes))
    source.load_state_dict(adapter.state_dict())
    return model.blocks[1].q(x)


def test_layer_that_the_model_lists_first_under_another_name(tmp_path):
    """The file's name reaches the layer, although the model's own first name is another."""
    model = make_net()
    adapter = attach_filled(model, "lora")
    adapter.save(tmp_path / "a.safetensors")
    other = nn.Module()
    net = make_net()
    other.first = net.blocks[0].q
    other.blocks = net.blocks
    twin = slt.load(other, tmp_path / "a.safetensors")
    x = make_input()
    assert torch.equal(other.blocks[0].q(x), model.blocks[0].q(x))
    assert list(twin.plan.shapes) == list(adapter.plan.shapes)


def test_loaded_adapter_goes_on_training(tmp_path):
    model = make_net()
    attach_filled(model, "cut").save(tmp_path / "a.safetensors")
    other = make_net()
    twin = slt.load(other, tmp_path / "a.safetensors")
    before = {name: bits(factor) for name, factor in twin.factors().items()}
    optimizer = torch.optim.SGD(twin.parameters(), 0.1)
    other(make_input()).square().mean().backward()
    optimizer.step()
    assert all(bits(factor) != before[name] for name, factor in twin.factors().items())
    twin.save(tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").stat().st_size == (
        tmp_path / "a.safetensors"
    ).stat().st_size


def test_loaded_factors_do_not_depend_on_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    adapter = attach_filled(make_net(), "lora")
    adapter.save(path)
    twin = slt.load(make_net(), path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(twin.factors()[name], p) for name, p in adapter.factors().items())
    for factor in twin.parameters():
        assert factor.untyped_storage().nbytes() == factor.nbytes


def test_save_while_merged_disabled_or_detached(tmp_path):
    model = make_net()
    adapter = attach_filled(model, "lora")
    adapter.save(tmp_path / "attached")
    adapter.merge()
    adapter.save(tmp_path / "merged")
    with adapter.disabled():
        adapter.save(tmp_path / "disabled")
    adapter.unmerge()
    adapter.detach()
    adapter.save(tmp_path / "detached")
    assert len({item.read_bytes() for item in tmp_path.iterdir()}) == 1


def test_scale_of_alpha_and_its_change_are_kept(tmp_path):
    for scale, expected in ((None, 2.5), (0.1 + 0.2, 0.1 + 0.2), (-1e-300, -1e-300)):
        adapter = attach_filled(make_net(), "lora")
        if scale is not None:
            adapter.scale = scale
        adapter.save(tmp_path / "a.safetensors")
        twin = slt.load(make_net(), tmp_path / "a.safetensors")
        assert twin.scale == expected
        assert twin.plan.spec.rank == 2


def test_load_into_meta_model_does_not_lose_the_factors(tmp_path):
    """To be given memory later: the factors must be there then, or loading is refused."""
    adapter = attach_filled(make_net(), "lora")
    adapter.save(tmp_path / "a.safetensors")
    with torch.device("meta"):
        model = make_net()
    try:
        twin = slt.load(model, tmp_path / "a.safetensors")
    except sl.AdapterError as error:
        assert "meta" in str(error)  # noqa: PT017
        return
    for name, factor in adapter.factors().items():
        assert not twin.factors()[name].is_meta
        assert torch.equal(twin.factors()[name], factor)


def test_file_of_linear_layers_serves_conv1d(tmp_path):
    """Shapes in the file are (output, input), however a layer stores its weight."""
    model = make_net(dtype=torch.float64)
    attach_filled(model, "cut").save(tmp_path / "a.safetensors")
    other = make_net("conv1d", dtype=torch.float64)
    twin = slt.load(other, tmp_path / "a.safetensors")
    x = make_input(dtype=torch.float64)
    with torch.no_grad():
        for name in twin.plan.shapes:
            other.get_submodule(name).weight.copy_(model.get_submodule(name).weight.t())
            other.get_submodule(name).bias.copy_(model.get_submodule(name).bias)
        other.head.load_state_dict(model.head.state_dict())
    assert_near(other(x), model(x))
    assert targets_of("cut") == ["q", "v", "o"]
