"""`Adapter.swap`: another file, in place; equal to a fresh load, or nothing is changed."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import superlora as sl
import superlora.torch as slt
from tests.pairs import in_turn
from tests.torch.helpers import (
    SPECS,
    attach_filled,
    bits,
    every_layer,
    fill,
    gradients,
    loss_of,
    make_input,
    make_net,
    slow_but,
    some_specs,
    targets_of,
    unchanged,
)


def saved(folder, key, *, seed=5, scale=None, model=None, spec=None, name="a"):
    """Write the file of another adapter of the same layers."""
    model = make_net() if model is None else model
    adapter = fill(slt.attach(model, spec or SPECS[key], targets_of(key), name="other"), seed)
    if scale is not None:
        adapter.scale = scale
    path = folder / f"{name}.safetensors"
    adapter.save(path)
    adapter.detach()
    return path


def parts_of(path):
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["superlora"])
        return {name: file.get_tensor(name).clone() for name in file.keys()}, header  # noqa: SIM118


def write(path, tensors, header):
    save_file(tensors, path, metadata={"superlora": json.dumps(header)})


def assert_refused(model, adapter, path, message, error=ValueError):
    scale = adapter.scale
    with unchanged(model), pytest.raises(error, match=message) as caught:
        adapter.swap(path)
    assert len(str(caught.value)) < 2000
    assert adapter.scale == scale


@in_turn("key", SPECS, "scale", [None, 0.3])
def test_equals_a_fresh_load(key, scale, tmp_path):
    path = saved(tmp_path, key, scale=scale)
    model = make_net()
    adapter = attach_filled(model, key)
    model(make_input())
    kept = {name: id(parameter) for name, parameter in adapter.named_parameters()}
    adapter.swap(path)
    assert {name: id(parameter) for name, parameter in adapter.named_parameters()} == kept
    other = make_net()
    loaded = slt.load(other, path)
    assert adapter.scale == loaded.scale
    for name, block in loaded.factors().items():
        assert bits(adapter.factors()[name]) == bits(block)
    assert torch.equal(model(make_input()), other(make_input()))


@every_layer
def test_swapping_there_and_back_restores_every_bit(layer, tmp_path):
    path = saved(tmp_path, "lora", scale=0.3, model=make_net(layer))
    model = make_net(layer)
    adapter = attach_filled(model, "lora")
    own = tmp_path / "own.safetensors"
    adapter.save(own)
    expected = model(make_input())
    adapter.swap(path)
    assert not torch.equal(model(make_input()), expected)
    adapter.swap(own)
    assert torch.equal(model(make_input()), expected)


@some_specs
def test_what_is_saved_after_a_swap_is_the_file(key, tmp_path):
    path = saved(tmp_path, key, scale=0.3)
    adapter = attach_filled(make_net(), key)
    adapter.swap(path)
    again = tmp_path / "again.safetensors"
    adapter.save(again)
    assert again.read_bytes() == path.read_bytes()


@some_specs
def test_gradients_after_a_swap_are_those_of_the_file(key, tmp_path):
    path = saved(tmp_path, key)
    model, other = make_net(), make_net()
    adapter, loaded = attach_filled(model, key), slt.load(other, path)
    loss_of(model(make_input())).backward()
    adapter.swap(path)
    expected = gradients(loaded, loss_of(other(make_input())))
    for name, found in gradients(adapter, loss_of(model(make_input()))).items():
        assert torch.equal(found, expected[name])


def test_an_optimiser_goes_on(tmp_path):
    path = saved(tmp_path, "lora")
    model = make_net()
    adapter = attach_filled(model, "lora")
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    adapter.swap(path)
    before = [bits(parameter) for parameter in adapter.parameters()]
    loss_of(model(make_input())).backward()
    optimizer.step()
    assert all(bits(p) != old for p, old in zip(adapter.parameters(), before, strict=True))


@pytest.mark.parametrize("key", slow_but(["lora", "dense"], ["lora", "dense", "cut", "fastfood"]))
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("scale", [None, 0.3], ids=["same scale", "another scale"])
def test_compiled_code_is_not_compiled_again(key, scale, tmp_path):
    path = saved(tmp_path, key, scale=scale)
    model = make_net(depth=2)
    adapter = attach_filled(model, key)
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()
    call = torch.compile(model, fullgraph=True, backend=backend)
    call(make_input())
    count = len(compilations)
    adapter.swap(path)
    y = call(make_input())
    torch._dynamo.reset()
    assert len(compilations) == count
    torch.testing.assert_close(y, model(make_input()))


@pytest.mark.parametrize("where", ["no_grad", "inference_mode"])
def test_inside_contexts_without_gradients(where, tmp_path):
    path = saved(tmp_path, "fastfood")
    model = make_net()
    adapter = attach_filled(model, "fastfood")
    with getattr(torch, where)():
        model(make_input())
        adapter.swap(path)
        y = model(make_input())
    other = make_net()
    slt.load(other, path)
    assert torch.equal(y, other(make_input()))
    assert all(p.requires_grad and not p.is_inference() for p in adapter.parameters())


def test_a_disabled_adapter_takes_the_file(tmp_path):
    path = saved(tmp_path, "lora")
    model = make_net()
    adapter = attach_filled(model, "lora")
    with adapter.disabled():
        adapter.swap(path)
    other = make_net()
    slt.load(other, path)
    assert torch.equal(model(make_input()), other(make_input()))


# Designs.


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (sl.lora(3, alpha=5), "rank 3 instead of 2"),
        (sl.lora(2, alpha=5, order=3), "order 3 instead of 2"),
        (sl.lora(2, alpha=5, overrides={"v": {"rank": 1}}), "overrides"),
        (sl.lokr(2, scale=0.7), r"splits 2 instead of 1"),
    ],
    ids=["rank", "order", "overrides", "method"],
)
def test_another_design_is_refused(spec, message, tmp_path):
    model = make_net()
    adapter = attach_filled(model, "lora")
    path = saved(tmp_path, "lora", spec=spec)
    assert_refused(model, adapter, path, f"must be of the adapter's design: .*{message}")


def test_other_layers_are_refused_and_listed(tmp_path):
    model = make_net()
    adapter = attach_filled(model, "lora")
    other = make_net(depth=3)
    other.blocks[1].q = torch.nn.Linear(16, 9)
    other.blocks[1].v = torch.nn.Linear(16, 9)
    del other.blocks[0].o
    path = tmp_path / "a.safetensors"
    names = "blocks.[02].q|blocks.[12].v|blocks.[12].o|blocks.0.v"
    slt.attach(other, SPECS["lora"], names).save(path)
    listed = (
        "no layer 'blocks.0.o'",
        "no layer 'blocks.1.q'",
        "another layer 'blocks.2.q'",
        r"'blocks.1.v' has shape \(9, 16\) instead of \(8, 16\)",
    )
    assert_refused(model, adapter, path, "".join(f"(?=.*{text})" for text in listed))


def test_layers_in_another_order_are_refused(tmp_path):
    model = make_net()
    adapter = attach_filled(model, "one-group")
    path = saved(tmp_path, "one-group")
    tensors, header = parts_of(path)
    write(path, tensors, {**header, "weights": header["weights"][::-1]})
    assert_refused(model, adapter, path, "another order")


@pytest.mark.parametrize(
    "changes", [{"alpha": 7.0}, {"alpha": None, "scale": 0.25}, {"rslora": True}]
)
def test_a_spec_of_another_scale_is_the_same_design(changes, tmp_path):
    spec = SPECS["lora"].replace(**changes)
    path = saved(tmp_path, "lora", spec=spec)
    model, other = make_net(), make_net()
    adapter = attach_filled(model, "lora")
    adapter.swap(path)
    assert adapter.scale == spec.scaling
    slt.load(other, path)
    assert torch.equal(model(make_input()), other(make_input()))


def test_a_header_in_other_words_is_the_same_design(tmp_path):
    """A file need not name the fields that have their default."""
    path = saved(tmp_path, "lora")
    tensors, header = parts_of(path)
    default = sl.Spec(rank=1).to_dict()
    spec = {k: v for k, v in header["spec"].items() if k == "rank" or v != default[k]}
    write(path, tensors, {**header, "spec": spec})
    model, other = make_net(), make_net()
    attach_filled(model, "lora").swap(path)
    slt.load(other, path)
    assert torch.equal(model(make_input()), other(make_input()))


def test_overrides_whose_scale_would_be_another_are_refused(tmp_path):
    overrides = {"v": {"scale": 3.0}}
    model = make_net()
    adapter = slt.attach(model, sl.lora(2, alpha=5, overrides=overrides), ["q", "v", "o"])
    path = saved(tmp_path, "lora", spec=sl.lora(2, alpha=6, overrides=overrides))
    assert_refused(model, adapter, path, "'blocks.0.v' of scale 3 where .* 3.6")


def test_overrides_in_proportion_are_taken(tmp_path):
    overrides = {"v": {"rank": 3}}
    model, other = (make_net(dtype=torch.float64) for _ in range(2))
    adapter = slt.attach(model, sl.lora(2, alpha=5, overrides=overrides), ["q", "v", "o"])
    spec = sl.lora(2, alpha=6, overrides=overrides)
    path = saved(tmp_path, "lora", spec=spec, model=make_net(dtype=torch.float64))
    adapter.swap(path)
    slt.load(other, path)
    x = make_input(dtype=torch.float64)
    torch.testing.assert_close(model(x), other(x))


# States and files.


def test_merged_detached_and_empty_adapters_are_refused(tmp_path):
    path = saved(tmp_path, "lora")
    model = make_net()
    adapter = attach_filled(model, "lora")
    adapter.merge()
    assert_refused(model, adapter, path, "must be unmerged", sl.AdapterError)
    adapter.unmerge()
    adapter.detach()
    assert_refused(model, adapter, path, "must be attached", sl.AdapterError)
    with torch.device("meta"):
        empty = make_net()
    adapter = slt.attach(empty, SPECS["lora"], targets_of("lora"))
    assert_refused(empty, adapter, path, "lie on the meta device", sl.AdapterError)


def test_no_such_file(tmp_path):
    model = make_net()
    adapter = attach_filled(model, "lora")
    assert_refused(model, adapter, tmp_path / "none", "no adapter file", FileNotFoundError)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated(share, tmp_path):
    model = make_net()
    adapter = attach_filled(model, "lora")
    path = saved(tmp_path, "lora")
    os.truncate(path, int(path.stat().st_size * share))
    assert_refused(model, adapter, path, "whole safetensors file")


HEADERS = {
    "version": ({"format_version": 2}, "must be of format version 1"),
    "no spec": ({"spec": None}, "must have a valid superlora header"),
    "spec": ({"spec": {"rank": 0}}, "must have a valid superlora header"),
    "no weights": ({"weights": None}, "must have a valid superlora header"),
    "scale a text": ({"scale": "much"}, "must have a valid superlora header"),
    "scale infinite": ({"scale": float("inf")}, "numbers must be finite: got Infinity"),
    "frozen a list": ({"frozen": [1]}, "must have a valid superlora header"),
    "maps a list": ({"maps": [1]}, "must have a valid superlora header"),
    "maps of none": ({"maps": {"0": 1}}, "maps must be drawn .*'0'"),
}


@pytest.mark.parametrize(("changes", "message"), HEADERS.values(), ids=HEADERS)
def test_other_headers(changes, message, tmp_path):
    model = make_net()
    adapter = attach_filled(model, "lora")
    path = saved(tmp_path, "lora")
    tensors, header = parts_of(path)
    write(path, tensors, {**header, **changes})
    assert_refused(model, adapter, path, message)


def test_other_tensors_are_listed(tmp_path):
    model = make_net()
    adapter = attach_filled(model, "lora")
    path = saved(tmp_path, "lora")
    tensors, header = parts_of(path)
    del tensors["0.0.factor0"]
    tensors["1.0.factor0"] = torch.ones(3, 2)
    tensors["9.0.core"] = torch.ones(2)
    write(path, tensors, header)
    shape = r"'1.0.factor0' of shape \(3, 2\) instead of \(8, 2\)"
    listed = ("missing '0.0.factor0'", "extra '9.0.core'", shape)
    assert_refused(model, adapter, path, "".join(f"(?=.*{text})" for text in listed))


@pytest.mark.parametrize("key", ["lora_fa", "vera", "lora_xs", "tinylora"])
def test_other_frozen_blocks_are_refused(key, tmp_path):
    model = make_net()
    adapter = attach_filled(model, key)
    path = saved(tmp_path, key)
    adapter.swap(path)
    tensors, header = parts_of(path)
    name = next(iter(header["frozen"]))
    write(path, tensors, {**header, "frozen": {**header["frozen"], name: 0.9}})
    assert_refused(model, adapter, path, f"frozen blocks .*{name} differ")


@pytest.mark.parametrize("key", ["lora_xs", "tinylora"])
def test_another_base_is_refused_where_it_decides_frozen_blocks(key, tmp_path):
    model = make_net()
    adapter = attach_filled(model, key)
    path = saved(tmp_path, key, model=make_net(seed=7))
    assert_refused(model, adapter, path, "frozen blocks must be made as they were")


def test_frozen_blocks_that_were_changed_are_seen(tmp_path):
    """Their fingerprints are kept, but not beyond a change."""
    model = make_net()
    adapter = attach_filled(model, "vera")
    path = saved(tmp_path, "vera")
    adapter.swap(path)
    next(iter(adapter.buffers())).neg_()
    assert_refused(model, adapter, path, "frozen blocks")


@pytest.mark.parametrize("key", ["unilora", "fastfood"])
def test_other_maps_are_refused(key, tmp_path):
    model = make_net()
    adapter = attach_filled(model, key)
    path = saved(tmp_path, key)
    tensors, header = parts_of(path)
    write(path, tensors, {**header, "maps": {n: v + 1 for n, v in header["maps"].items()}})
    assert_refused(model, adapter, path, "maps must be drawn")
