"""Files and exports of mapped specs: seeds are stored and checked, what they stand for is not."""

import json
import time
import tracemalloc

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import superlora as sl
import superlora.torch as slt
from superlora import maps
from tests.torch.helpers import (
    SPECS,
    assert_near,
    attach_filled,
    fill,
    kept_blocks,
    make_input,
    make_net,
    targets_of,
    unchanged,
)

# Those that draw something: what their files hold of it is the seed and a checksum.
MAPPED = [
    key
    for key, spec in SPECS.items()
    if not isinstance(spec.map, (maps.Identity, maps.Circulant)) or spec.factor_map is not None
]
every_mapped = pytest.mark.parametrize("key", MAPPED)
TARGETS = ["q", "v", "o"]


def parts_of(path):
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["superlora"])
        return {name: file.get_tensor(name).clone() for name in file.keys()}, header  # noqa: SIM118


def write(path, tensors, header):
    save_file(tensors, path, metadata={"superlora": json.dumps(header)})


def saved(tmp_path, key):
    path = tmp_path / "a.safetensors"
    attach_filled(make_net(), key).save(path)
    return path, *parts_of(path)


def assert_refused(path, message, limit=2.0):
    model = make_net()
    tracemalloc.start()
    start = time.perf_counter()
    with unchanged(model), pytest.raises(ValueError, match=message) as caught:
        slt.load(model, path)
    assert time.perf_counter() - start < limit
    assert tracemalloc.get_traced_memory()[1] < 1 << 23
    tracemalloc.stop()
    assert len(str(caught.value)) < 2000, "a message is for people to read"


@every_mapped
def test_nothing_that_a_seed_gives_is_stored(key, tmp_path):
    model = make_net()
    adapter = attach_filled(model, key)
    model(make_input()).sum().backward()
    path = tmp_path / "a.safetensors"
    adapter.save(path)
    tensors, _ = parts_of(path)
    assert sum(tensor.numel() for tensor in tensors.values()) == adapter.num_parameters
    own = {n.removeprefix("superlora.") for n in model.state_dict() if n.startswith("superlora.")}
    assert own == set(kept_blocks(adapter.plan))
    again = make_net()
    slt.load(again, path)
    assert torch.equal(again(make_input()), model(make_input()))


@every_mapped
def test_a_map_that_is_drawn_otherwise_is_refused(key, tmp_path):
    path, tensors, header = saved(tmp_path, key)
    assert header["maps"]
    name, number = next(iter(header["maps"].items()))
    for wrong in (number ^ 1, str(number), None, [number], {}):
        write(path, tensors, {**header, "maps": {**header["maps"], name: wrong}})
        assert_refused(
            path,
            f"maps must be drawn from their seeds .*: those of the groups .* '{name}' differ",
        )
    write(path, tensors, {**header, "maps": {**header["maps"], "77": number}})
    assert_refused(path, "those of the groups or vectors '77' differ")
    write(path, tensors, {key: value for key, value in header.items() if key != "maps"})
    assert_refused(path, "maps must be drawn from their seeds")
    for wrong in (None, 3, "text", [], [1]):
        write(path, tensors, {**header, "maps": wrong})
        assert_refused(path, "must have a valid superlora header|maps must be drawn")


def with_other_seed(fields):
    if isinstance(fields, dict):
        return {k: v + 1 if k == "seed" else with_other_seed(v) for k, v in fields.items()}
    return fields


@every_mapped
def test_another_seed_is_refused(key, tmp_path):
    path, tensors, header = saved(tmp_path, key)
    spec = {k: with_other_seed(v) for k, v in header["spec"].items() if k != "seed"}
    write(path, tensors, {**header, "spec": spec})
    assert_refused(path, "maps must be drawn from their seeds as they were")


FIELDS = {
    "no such field": ({"salt": 1}, "map Fastfood has wrong fields"),
    "seed a float": ({"seed": 1.5}, "seed must be an integer"),
    "seed negative": ({"seed": -1}, "seed must be at least 0"),
    "another version": ({"version": 2}, "version must be 1"),
    "order unknown": ({"order": "forth"}, "order must be one of"),
    "shared a number": ({"shared": 1}, "shared must be one of"),
    "values a list": ({"values": ["sign"]}, "values must be one of"),
    "a map in a field": ({"order": {"name": "Fastfood"}}, "order must be one of"),
}


@pytest.mark.parametrize(("fields", "message"), FIELDS.values(), ids=FIELDS)
def test_wrong_fields_of_a_map(fields, message, tmp_path):
    path, tensors, header = saved(tmp_path, "fastfood")
    spec = {**header["spec"], "map": {**header["spec"]["map"], **fields}}
    write(path, tensors, {**header, "spec": spec})
    assert_refused(path, f"must have a valid superlora header: .*{message}")


def test_maps_nested_too_deeply(tmp_path):
    path, tensors, header = saved(tmp_path, "composed")
    for depth in (50, 3000):
        spec, nested = dict(header["spec"]), {"name": "Identity"}
        for _ in range(depth):
            nested = {"name": "Composed", "first": nested, "second": {"name": "Identity"}}
        spec["map"] = nested
        try:
            write(path, tensors, {**header, "spec": spec})
        except RecursionError:  # json's own bound, where it is written in Python
            continue
        assert_refused(path, "must have|must hold")


BETWEEN = maps.Composed(first=maps.OneHot(), second=maps.Fastfood(), between=10**15)
ONE_VECTOR = {"order": 1, "rank": "full"}
# Specs whose parameters are few, as a file has them, and that stand for more than any memory.
ABSURD = {
    "rank of mapped factors": sl.unilora(5, rank=10**9, dense_from="never"),
    "rank with vectors": sl.nola(5, rank=10**9, dense_from="never"),
    "fold": sl.lora(1, order=8, fold=(100,) * 8, core="identity", map=maps.Fastfood()),
    "between": sl.Spec(map=BETWEEN, size=5, **ONE_VECTOR),
    "said": sl.said(10**12),
    "factor size": sl.lora(2, factor_map=maps.Fastfood(), factor_size=10**15),
}


@pytest.mark.parametrize("spec", ABSURD.values(), ids=ABSURD)
def test_absurd_sizes(spec, tmp_path):
    path, tensors, header = saved(tmp_path, "unilora")
    write(path, tensors, {**header, "spec": spec.to_dict()})
    assert_refused(path, "must have a valid superlora header: .*must (take|make)")


@pytest.mark.parametrize(
    "fixed",
    [
        maps.OneHot(),
        maps.OneHot(window=3),
        maps.Fourier(),
        maps.Wavelet(),
        maps.Gaussian(structured=True),
    ],
)
def test_absurd_weights(fixed, tmp_path):
    """Five numbers may stand for any weight: it is the model's that counts."""
    spec = sl.Spec(map=fixed, size=5, **ONE_VECTOR).to_dict()
    for width, message in ((10**12, "must have"), (10**6, "the model must have the layers of")):
        header = {"format_version": 1, "spec": spec, "weights": [["blocks.0.q", [width, width]]]}
        path = tmp_path / "a.safetensors"
        write(path, {"0.0.core": torch.ones(5)}, {**header, "maps": {"0": 3}})
        assert_refused(path, message)


@every_mapped
def test_exports(key, tmp_path):
    """Exact where the update is of low rank, else as near as the rank that is asked for."""
    model = make_net(dtype=torch.float64)
    adapter = attach_filled(model, key)
    x = make_input(dtype=torch.float64)
    y = model(x)
    export = adapter.to_peft(tmp_path / "peft", rank=8)
    assert max(export.errors.values()) <= 1e-6  # of full rank: the least width is 8
    adapter.to_lycoris(tmp_path / "a.safetensors", rank=8)
    adapter.detach()
    again = slt.from_peft(model, tmp_path / "peft")
    assert_near(model(x), y, torch.float32)
    again.detach()


@pytest.mark.parametrize("key", ["separable", "unilora", "nola"])
def test_what_stays_lora_is_exported_without_a_rank(key, tmp_path):
    model = make_net(dtype=torch.float64)
    adapter = fill(slt.attach(model, SPECS[key], TARGETS))
    y = model(make_input(dtype=torch.float64))
    export = adapter.to_peft(tmp_path / "peft")
    assert set(export.methods.values()) == {"lora"}
    assert not any(export.errors.values())
    adapter.detach()
    found = slt.from_peft(model, tmp_path / "peft")
    assert found.num_parameters == sl.Plan(sl.lora(2), found.plan.shapes).num_parameters
    assert_near(model(make_input(dtype=torch.float64)), y)


def test_what_is_mixed_needs_a_rank(tmp_path):
    adapter = attach_filled(make_net(), "fastfood")
    with pytest.raises(ValueError, match="rank"):
        adapter.to_peft(tmp_path / "peft")
    assert targets_of("fastfood") == TARGETS
