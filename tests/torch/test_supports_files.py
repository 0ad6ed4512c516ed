"""Files of merge operations: what they say, where they fit, and what is refused."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import superlora as sl
import superlora.torch as slt
from tests.torch.helpers import base_bits, bits, fill, make_input, make_net, unchanged
from tests.torch.support_cases import (
    DESIGNS,
    OF_A_BIAS,
    TARGETS,
    attach_small,
    every_pair,
    some_designs,
)


def parts_of(path):
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["superlora"])
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118


def saved(folder, key, layer="bias", seed=5, name="a"):
    adapter = attach_small(make_net(layer), key, seed=seed)
    path = folder / f"{name}.safetensors"
    adapter.save(path)
    return path, adapter


@every_pair
def test_a_file_gives_the_very_adapter(tmp_path, key, layer):
    model, fresh = make_net(layer), make_net(layer)
    adapter = attach_small(model, key)
    adapter.scale = -1.5
    x = make_input()
    expected = model(x)
    path = tmp_path / "a.safetensors"
    adapter.merge()
    adapter.save(path)
    loaded = slt.load(fresh, path)
    assert torch.equal(fresh(x), expected)
    assert loaded.scale == -1.5
    assert loaded.plan.spec == adapter.plan.spec
    assert {n: bits(f) for n, f in loaded.factors().items()} == {
        n: bits(f) for n, f in adapter.factors().items()
    }
    loaded.merge()
    assert base_bits(fresh) == base_bits(model)
    own = {name for name, shape in adapter.plan.factor_shapes.items() if shape}
    tensors, header = parts_of(path)
    assert tensors.keys() == own  # each block once, a shared one too
    assert [name for name, _ in header["weights"]] == list(adapter.layers())


@pytest.mark.parametrize("layer", ["bias", "no-bias", "conv1d"])
@pytest.mark.parametrize("merged", [True, False])
def test_the_header_names_the_layers_without_a_bias(tmp_path, layer, merged):
    model = make_net(layer)
    if layer == "bias":
        model.blocks[1].v.bias = None
    adapter = attach_small(model, "glora")
    if merged:
        adapter.merge()
    adapter.save(tmp_path / "a.safetensors")
    _, header = parts_of(tmp_path / "a.safetensors")
    bare = {"bias": ["blocks.1.v"], "no-bias": list(adapter.layers()), "conv1d": []}[layer]
    assert header.get("without_bias", []) == bare
    scaled = {name for name, own in adapter.plan.layout.supports.items() if "scale_bias" in own}
    assert scaled == set(adapter.layers()) - set(bare)


def test_a_weight_alone_says_nothing_of_biases(tmp_path):
    path, _ = saved(tmp_path, "scale_weight", "no-bias")
    assert "without_bias" not in parts_of(path)[1]
    slt.load(make_net("bias"), path)


@pytest.mark.parametrize("key", ["glora", "bitfit", "ssf", "prompt_add", "ia3", "all"])
def test_a_model_with_other_biases_is_refused(tmp_path, key):
    for mine, theirs, has in (("bias", "no-bias", "no"), ("no-bias", "bias", "a")):
        path, _ = saved(tmp_path, key, mine)
        model = make_net(theirs)
        message = f"layers must have a bias where they had one in .*'blocks.0.q' has {has} bias"
        with unchanged(model), pytest.raises(ValueError, match=message):
            slt.load(model, path)
    path, _ = saved(tmp_path, key)
    model = make_net()
    model.blocks[1].q.bias = None
    with unchanged(model), pytest.raises(ValueError, match=r"'blocks\.1\.q' has no bias") as caught:
        slt.load(model, path)
    assert "blocks.0" not in str(caught.value)


def test_a_bias_that_another_adapter_has_merged_is_none_of_the_layers_own(tmp_path):
    path, _ = saved(tmp_path, "glora", "no-bias")
    model = make_net("no-bias")
    below = attach_small(model, "bitfit", "below")
    below.merge()
    loaded = slt.load(model, path, name="above")
    attached = attach_small(model, "glora", "third")
    for adapter in (loaded, attached):
        assert adapter.gains_bias == list(adapter.layers())
        assert not any("scale_bias" in own for own in adapter.plan.layout.supports.values())
    for wanted in (loaded, attached):
        wanted.detach()
    below.unmerge()
    below.detach()
    assert all(block.q.bias is None for block in model.blocks)


@pytest.mark.parametrize("value", [3, [["q"]], {"q": {}}, None])
def test_a_header_with_other_values_is_refused_or_read_as_no_bias(tmp_path, value):
    path, _ = saved(tmp_path, "bitfit")
    tensors, header = parts_of(path)
    save_file(tensors, path, metadata={"superlora": json.dumps({**header, "without_bias": value})})
    model = make_net("no-bias")
    with unchanged(model), pytest.raises(ValueError, match=r"a\.safetensors"):
        slt.load(model, path)


@pytest.mark.parametrize(
    "supports",
    [
        3,
        [],
        [[["add_bias"], 3]],
        [[["add_bias"], sl.dense().to_dict()]] * 2,
        [[["multiply"], sl.dense().to_dict()]],
        [[["add_bias"], "scale_bias"]],
    ],
)
def test_a_design_that_is_none_is_refused(tmp_path, supports):
    path, _ = saved(tmp_path, "bitfit")
    tensors, header = parts_of(path)
    header["spec"] = {"supports": supports}
    save_file(tensors, path, metadata={"superlora": json.dumps(header)})
    model = make_net()
    with unchanged(model), pytest.raises(ValueError, match="must have a valid superlora header"):
        slt.load(model, path)


@some_designs
def test_swap_is_a_fresh_load(tmp_path, key):
    path, other = saved(tmp_path, key, seed=7)
    other.scale = 0.3
    other.save(path)
    model, fresh = make_net(), make_net()
    adapter = attach_small(model, key)
    tensors = list(adapter.parameters())
    x = make_input()
    before = model(x)
    adapter.swap(path)
    slt.load(fresh, path)
    assert torch.equal(model(x), fresh(x))
    assert not torch.equal(model(x), before)
    assert [id(t) for t in adapter.parameters()] == [id(t) for t in tensors]


def test_swap_refuses_another_design(tmp_path):
    model = make_net()
    adapter = attach_small(model, "glora")
    for key, message in {
        "ssf": "must be of the adapter.s design: other operations, or others together$",
        "glora, matrix": "must be of the adapter.s design: other operations, or others together$",
        "bitfit": "must be of the adapter.s design: other operations, or others together$",
    }.items():
        path, _ = saved(tmp_path, key)
        with unchanged(model), pytest.raises(ValueError, match=message):
            adapter.swap(path)
    larger = fill(slt.attach(make_net(), sl.glora(3), TARGETS))
    larger.save(tmp_path / "larger.safetensors")
    with unchanged(model), pytest.raises(ValueError, match="rank of add_weight 3 instead of 2, "):
        adapter.swap(tmp_path / "larger.safetensors")
    single = fill(slt.attach(make_net(), sl.lora(2), TARGETS))
    single.save(tmp_path / "lora.safetensors")
    with unchanged(model), pytest.raises(ValueError, match="only one of the two has merge"):
        adapter.swap(tmp_path / "lora.safetensors")
    path, _ = saved(tmp_path, "glora")
    with pytest.raises(ValueError, match="only one of the two has merge"):
        single.swap(path)


@pytest.mark.parametrize(("mine", "theirs"), [("bias", "no-bias"), ("no-bias", "bias")])
def test_swap_refuses_a_file_of_layers_with_other_biases(tmp_path, mine, theirs):
    model = make_net(mine)
    for key, message in {
        "bitfit": f"'blocks.0.q' has {'a' if mine == 'bias' else 'no'} bias",
        # What scales a bias is left out where there is none.
        "glora": "must be of the adapter.s design",
    }.items():
        path, _ = saved(tmp_path, key, theirs)
        adapter = attach_small(model, key)
        with unchanged(model), pytest.raises(ValueError, match=message):
            adapter.swap(path)
        adapter.detach()


@pytest.mark.parametrize("key", [key for key in DESIGNS if key not in OF_A_BIAS])
def test_export_is_refused(tmp_path, key):
    model = make_net()
    adapter = attach_small(model, key)
    operations = list(adapter.plan.spec.operations)
    for export in (adapter.to_peft, adapter.to_lycoris):
        with unchanged(model), pytest.raises(ValueError, match="must be of one spec") as error:
            export(tmp_path / "out")
        assert f"a mapping of {operations}; merge it instead" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_merged_model_is_a_plain_checkpoint(tmp_path):
    model = make_net("no-bias")
    adapter = attach_small(model, "glora")
    x = make_input()
    adapter.merge()
    expected = model(x)
    adapter.detach(keep_merged=True)
    save_file(model.state_dict(), tmp_path / "model.safetensors")  # which shares no memory
    fresh = make_net("bias")
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(fresh(x), expected)
    assert isinstance(fresh.blocks[0].q, nn.Linear)


def test_a_state_dict_of_a_merged_model_is_refused():
    model, fresh = make_net("no-bias"), make_net("no-bias")
    adapter = attach_small(model, "glora")
    attach_small(fresh, "glora", seed=8)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    fresh.load_state_dict(state)
    assert torch.equal(fresh(make_input()), model(make_input()))
    adapter.merge()
    with pytest.raises(sl.AdapterError, match="must be unmerged"):
        fresh.load_state_dict(model.state_dict())
