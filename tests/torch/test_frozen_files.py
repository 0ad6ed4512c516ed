"""Files of adapters with frozen blocks: small, exact, and refused on another base or tampering."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import superlora as sl
import superlora.torch as slt
from tests.torch.helpers import (
    SPECS,
    attach_filled,
    bits,
    fill,
    make_input,
    make_net,
    targets_of,
    unchanged,
)
from tests.torch.test_bad_files import assert_refused, parts_of, write
from tests.torch.test_frozen import FROZEN, frozen_bits, frozen_specs, singular_specs, train

DIFFER = "frozen blocks must be made as they were when .* was saved"


@frozen_specs
def test_frozen_blocks_are_made_anew_bit_for_bit(key, tmp_path):
    model = make_net()
    adapter = slt.attach(model, SPECS[key], targets_of(key))
    train(model, adapter)
    adapter.merge()  # the singular vectors are not those of the merged weight
    adapter.save(tmp_path / "a.safetensors")
    adapter.unmerge()
    tensors, header = parts_of(tmp_path / "a.safetensors")
    assert tensors.keys() == dict(adapter.named_parameters()).keys()
    assert header["frozen"].keys() == adapter.plan.frozen_shapes.keys()
    other = make_net()
    twin = slt.load(other, tmp_path / "a.safetensors")
    assert frozen_bits(twin) == frozen_bits(adapter)
    assert not any(twin.factors()[name].requires_grad for name in twin.plan.frozen_shapes)
    assert torch.equal(other(make_input()), model(make_input()))
    train(other, twin)
    assert frozen_bits(twin) == frozen_bits(adapter)


@frozen_specs
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("when", ["attach", "after"])
def test_an_adapter_of_another_dtype_is_loaded_again(key, dtype, when, tmp_path):
    for seed in range(3):
        model = make_net(seed=seed)
        chosen = dtype if when == "attach" else None
        adapter = fill(
            slt.attach(model, SPECS[key].replace(seed=seed), targets_of(key), dtype=chosen)
        )
        adapter.to(dtype)
        adapter.save(tmp_path / "a.safetensors")
        twin = slt.load(make_net(seed=seed), tmp_path / "a.safetensors")
        assert {block.dtype for block in twin.factors().values()} == {dtype}
        for name, delta in adapter.deltas().items():
            error = (twin.delta(name) - delta).double().norm() / delta.double().norm()
            assert error <= {torch.float64: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.05}[dtype]


@singular_specs
def test_another_base_weight_is_refused_and_nothing_is_changed(key, tmp_path):
    attach_filled(make_net(), key).save(tmp_path / "a.safetensors")
    assert_refused(tmp_path / "a.safetensors", DIFFER, model=make_net(seed=5))
    near = make_net()
    with torch.no_grad():
        near.blocks[1].v.weight += 0.05 * torch.randn(8, 16)
    assert_refused(tmp_path / "a.safetensors", rf"{DIFFER}.*differ", model=near)
    merged = make_net()
    attach_filled(merged, "dense", name="other").merge()
    assert_refused(tmp_path / "a.safetensors", DIFFER, model=merged)


def test_random_blocks_do_not_depend_on_the_base(tmp_path):
    adapter = attach_filled(make_net(), "vera")
    adapter.save(tmp_path / "a.safetensors")
    twin = slt.load(make_net(seed=5), tmp_path / "a.safetensors")
    for name, delta in adapter.deltas().items():
        assert torch.equal(twin.delta(name), delta)


def fingerprints(change):
    def tamper(tensors, header):
        name = next(iter(header["frozen"]))
        header["frozen"] = {**header["frozen"], name: change(header["frozen"][name])}

    return tamper


def without(tensors, header):
    header["frozen"].pop(next(iter(header["frozen"])))


def setting(**changes):
    return lambda tensors, header: header.update(changes)


def other_seed(tensors, header):
    header["spec"]["seed"] += 1


def other_source(tensors, header):
    block = next(iter(header["spec"]["frozen"]))
    header["spec"]["frozen"][block] = "ones"


TAMPERED = {
    "fingerprint": fingerprints(lambda number: number + 0.01),
    "sign": fingerprints(lambda number: -number),
    "nan": fingerprints(lambda number: float("nan")),
    "infinite": fingerprints(lambda number: float("-inf")),
    "huge": fingerprints(lambda number: 1e300),
    "huge integer": fingerprints(lambda number: 10**400),
    "text": fingerprints(lambda number: "1"),
    "null": fingerprints(lambda number: None),
    "bool": fingerprints(lambda number: True),
    "a list": fingerprints(lambda number: [number]),
    "one missing": without,
    "all missing": setting(frozen={}),
    "frozen null": setting(frozen=None),
    "frozen a list": setting(frozen=[1.0]),
    "frozen a number": setting(frozen=1.0),
    "frozen a text": setting(frozen="0.0.factor1"),
    "scale a text": setting(scale="1"),
    "scale nan": setting(scale=float("nan")),
    "scale infinite": setting(scale=float("inf")),
    "scale huge": setting(scale=10**400),
    "scale a list": setting(scale=[1.0]),
    "scale null": setting(scale=None),
    "seed": other_seed,
    "source": other_source,
}


@pytest.mark.parametrize("tamper", TAMPERED.values(), ids=TAMPERED)
@pytest.mark.parametrize("key", ["lora_fa", "tinylora"])
def test_a_tampered_file_is_refused_and_nothing_is_changed(key, tamper, tmp_path):
    path = tmp_path / "a.safetensors"
    attach_filled(make_net(), key).save(path)
    tensors, header = parts_of(path)
    tamper(tensors, header)
    write(path, tensors, header)
    assert_refused(path, f"{DIFFER}|must have a valid superlora header|scale must be")


def test_fingerprints_without_frozen_blocks_are_harmless(tmp_path):
    path = tmp_path / "a.safetensors"
    adapter = attach_filled(make_net(), "lora")
    adapter.save(path)
    tensors, header = parts_of(path)
    assert "frozen" not in header
    write(path, tensors, {**header, "frozen": {"9.9.core": 1.0}})
    twin = slt.load(make_net(), path)
    assert all(torch.equal(twin.factors()[n], block) for n, block in adapter.factors().items())


def test_frozen_blocks_in_the_file_are_extra(tmp_path):
    path = tmp_path / "a.safetensors"
    adapter = attach_filled(make_net(), "lora_fa")
    adapter.save(path)
    _, header = parts_of(path)
    write(path, {name: block.detach().clone() for name, block in adapter.factors().items()}, header)
    assert_refused(path, "must hold the factors of its spec: extra '0.0.factor1'")


@pytest.fixture
def stored(tmp_path):
    """A file whose frozen blocks are of no seed and no weight, as a converted one's."""
    path = tmp_path / "stored.safetensors"
    adapter = attach_filled(make_net(), "lora_fa")
    adapter.save(path)
    _, header = parts_of(path)
    header["spec"]["frozen"] = {"0.factor1": "stored"}
    del header["frozen"]
    tensors = {name: block.detach().clone() for name, block in adapter.factors().items()}
    for name in adapter.plan.frozen_shapes:
        tensors[name] = 3 * tensors[name]
    write(path, tensors, header)
    return path, tensors


def test_stored_blocks_are_loaded_frozen_and_saved_again(stored, tmp_path):
    path, tensors = stored
    model = make_net(seed=4)
    adapter = slt.load(model, path)
    assert {name: bits(block) for name, block in adapter.factors().items()} == {
        name: bits(block) for name, block in tensors.items()
    }
    assert dict(adapter.named_parameters()).keys() == adapter.plan.factor_shapes.keys()
    assert adapter.state_dict().keys() == tensors.keys()
    before = frozen_bits(adapter)
    train(model, adapter)
    assert frozen_bits(adapter) == before
    adapter.save(tmp_path / "again")
    twin = slt.load(make_net(seed=4), tmp_path / "again")
    assert all(torch.equal(twin.factors()[n], block) for n, block in adapter.factors().items())


def test_a_missing_stored_block_is_named(stored):
    path, tensors = stored
    _, header = parts_of(path)
    del tensors["1.0.factor1"]
    write(path, tensors, header)
    assert_refused(path, "missing '1.0.factor1'")


KEYS = ["overrides", "compacter", "per-split-order", "loha", *FROZEN]
SCRIPT = f"""
import sys, superlora.torch as slt
from tests.torch.helpers import SPECS, fill, make_net, targets_of
for key in {KEYS}:
    adapter = slt.attach(make_net(), SPECS[key], targets_of(key), seed=3)
    adapter.save(f"{{sys.argv[1]}}-{{key}}")
"""


@pytest.mark.slow
def test_bytes_are_the_same_in_every_process(tmp_path):
    """This one and two with other hash seeds: no set or hash decides an order or a stream."""
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path / seed)],
            env={
                **os.environ,
                "PYTHONHASHSEED": seed,
                "PYTHONPATH": os.pathsep.join(sys.path),
                "OMP_NUM_THREADS": "1",
            },
            check=True,
        )
    for key in KEYS:
        slt.attach(make_net(), SPECS[key], targets_of(key), seed=3).save(tmp_path / f"0-{key}")
        contents = {(tmp_path / f"{seed}-{key}").read_bytes() for seed in "012"}
        assert len(contents) == 1, key


GREEDY = {
    "frozen core": {
        "rank": [10**9, 2, 2],
        "order": 3,
        "fold": "stack",
        "core": "full",
        "frozen": {"0.core": "random", "0.factor0": "ones", "0.factor2": "ones"},
    },
    "frozen factors": {
        "rank": 10**10,
        "order": 3,
        "fold": "stack",
        "core": "diagonal",
        "frozen": dict.fromkeys(["0.core", "0.factor0", "0.factor2"], "random"),
    },
    "Tucker of a high order": {
        "rank": [8] * 16,
        "order": 16,
        "fold": [1] * 14 + [8, 8],
        "core": "full",
        "frozen": {"0.core": "random"},
    },
}
LIMITED = """
import resource, signal, sys
import torch, superlora.torch as slt

def give_up(*_):
    raise TimeoutError("two seconds of processor time")

signal.signal(signal.SIGVTALRM, give_up)
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
for path in sys.argv[1:]:
    signal.setitimer(signal.ITIMER_VIRTUAL, 2)
    try:
        slt.load(torch.nn.Linear(8, 8), path)
    except BaseException as error:
        print(type(error).__name__)
    else:
        print("loaded")
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
"""


def test_a_small_file_cannot_ask_for_frozen_blocks_of_any_size(tmp_path):
    """A frozen block takes no room in the file, but it does in memory."""
    pytest.importorskip("resource", reason="the system limits no memory")
    for key, changes in GREEDY.items():
        spec = sl.Spec.from_dict({**sl.Spec().to_dict(), **changes})
        tensors = {"0.0.factor1": torch.ones(8, 2)}
        header = {"format_version": 1, "spec": spec.to_dict(), "weights": [["", [8, 8]]]}
        write(tmp_path / key, tensors, {**header, "frozen": {}})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIMITED, *(str(tmp_path / key) for key in GREEDY)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = dict(zip(GREEDY, done.stdout.split(), strict=True))
    assert found == dict.fromkeys(GREEDY, "ValueError")


def test_files_of_frozen_adapters_say_what_they_need(tmp_path):
    """The header alone makes the plan: spec, weights in order, a fingerprint a frozen block."""
    adapter = attach_filled(make_net(), "vera")
    adapter.save(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["superlora"])
    assert list(header) == ["format_version", "spec", "weights", "transposed", "frozen"]
    assert all(-10 < number < 10 for number in header["frozen"].values())
    plan = sl.Plan(sl.Spec.from_dict(header["spec"]), dict(header["weights"]))
    assert plan.frozen_shapes.keys() == header["frozen"].keys()
    with unchanged(make_net()):
        save_file({}, tmp_path / "empty", metadata={"superlora": json.dumps(header)})
        assert_refused(tmp_path / "empty", "missing '0.0.core'")
